"""Data files for the tests of mixtures, made of a little of easy-vqa."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def questions(easy_vqa: Path, records: range, turn: int, name: str) -> list[dict[str, Any]]:
    """Single questions: that of one turn of each of some records, about its image."""
    made = []
    lines = (easy_vqa / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for index in records:
        turns = json.loads(lines[index])["conversations"]
        asked = {**turns[turn], "images": turns[0]["images"]}
        made.append({"id": f"{name}-{index}", "conversations": [asked]})
    return made


def write(easy_vqa: Path, file: Path, records: list[dict[str, Any]]) -> Path:
    """A data file whose ``images/`` are those of easy-vqa, in a folder of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not (file.parent / "images").exists():
        (file.parent / "images").symlink_to(easy_vqa / "images")
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def two_sources(easy_vqa: Path, folder: Path) -> tuple[Path, Path]:
    """Twelve questions about twelve images, and twenty about ten of which six are among those, in another folder."""
    one = write(easy_vqa, folder / "one" / "a.jsonl", questions(easy_vqa, range(12), 0, "a"))
    more = questions(easy_vqa, range(6, 16), 1, "b") + questions(easy_vqa, range(6, 16), 2, "c")
    return one, write(easy_vqa, folder / "two" / "b.jsonl", more)
