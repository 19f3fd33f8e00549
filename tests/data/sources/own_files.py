"""People's own data made by hand, converted through the real command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_files import image_bytes, records

from phi3v.cli import main


def save_images(folder: Path, *names: str) -> None:
    """A small image of its own under each name."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number, "PNG" if name.endswith(".png") else "JPEG"))


class Converted:
    """What a run of ``phi3v data convert`` gave: exit code, the JSON object, what was said, the records."""

    def __init__(self, code: int, out: Path, shown: Any) -> None:
        self.code = code
        self.out = out
        self.error: str = shown.err
        self.said: dict[str, Any] = json.loads(shown.out) if shown.out else {}

    @property
    def notes(self) -> str:
        return "\n".join(self.said["notes"])

    def records(self, split: str = "train") -> list[dict[str, Any]]:
        return records(self.out / f"{split}.jsonl")

    def turn(self, number: int = 0) -> dict[str, Any]:
        """The only turn of a record of train."""
        (turn,) = self.records()[number]["conversations"]
        return turn

    def turns(self) -> list[dict[str, Any]]:
        """All turns of train."""
        return [turn for record in self.records() for turn in record["conversations"]]


Convert = Callable[..., Converted]


def converter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Runs the command; every split of a conversion that succeeds must pass ``phi3v data check``."""

    def convert(name: str, source: Path, *options: str, out: str = "out") -> Converted:
        folder = tmp_path / out
        command = ["data", "convert", name, "--source", str(source), "--out", str(folder), "--json", *options]
        code = main(command)
        result = Converted(code, folder, capsys.readouterr())
        for file in result.said.get("files", {}).values():
            assert main(["data", "check", file]) == 0, capsys.readouterr().out
            capsys.readouterr()
        return result

    return convert
