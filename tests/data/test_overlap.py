"""What the file to evaluate on shares with the file to train on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sample_files import image_bytes

from phi3v.data import overlap
from phi3v.data.image_store import FolderStore
from phi3v.data.overlap import Overlap, find_overlap
from phi3v.data.table import open_table


def turn(user: str, *images: str, **more: Any) -> dict[str, Any]:
    return {"images": list(images), "user": user, "assistant": "x", **more}


def write(folder: Path, *records: list[dict[str, Any]]) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = [{"id": str(k), "conversations": turns} for k, turns in enumerate(records)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "data.jsonl"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """In folders of their own, with images under other names."""
    train = write(
        tmp_path / "train",
        [turn("What colour?", "a.png"), turn("and here?", "b.png")],
        [turn("one and one?")],
    )
    other = write(
        tmp_path / "eval",
        [turn("What shape?", "new.png")],
        [turn("what  colour?", "copy of a.png")],  # the same as line 1 there
        [turn("What shape?", "copy of a.png")],  # another question about that image
        [turn("What colour?", "copy of a.png"), turn("and here?", "b.png")],  # both are there
        [turn("and here?", "b.png")],  # there it comes after another image
        [turn("one and one?")],
        [turn("two and two?")],
    )
    for number, name in enumerate(("train/images/a.png", "train/images/b.png", "eval/images/new.png")):
        (tmp_path / name).write_bytes(image_bytes(number))
    shutil.copy(tmp_path / "train/images/a.png", tmp_path / "eval/images/copy of a.png")
    shutil.copy(tmp_path / "train/images/b.png", tmp_path / "eval/images/b.png")
    return train, other


def test_pairs_and_images_are_counted_apart(files: tuple[Path, Path]) -> None:
    found = find_overlap(*map(open_table, files))
    assert found == Overlap(questions=8, same=4, same_image=2, first_at="line 2")
    assert found.finding is not None
    for words in ("of 8 questions 4 are asked there too", "2 more are about images", "first in line 2"):
        assert words in found.finding.what


def test_files_that_share_nothing_are_not_read(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _ = files
    other = write(tmp_path / "eval", [turn("What colour?", "c.png")])
    (tmp_path / "eval/images/c.png").write_bytes(image_bytes(5) + b" ")
    monkeypatch.setattr(FolderStore, "sha256", lambda store, name: pytest.fail(f"{name} was read"))
    assert find_overlap(open_table(train), open_table(other)).finding is None


def test_it_is_remembered_for_these_versions(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    train, other = files
    first = find_overlap(open_table(train), open_table(other))
    with monkeypatch.context() as patched:
        patched.setattr(overlap, "_compare", lambda *tables: pytest.fail("compared again"))
        assert find_overlap(open_table(train), open_table(other)) == first
    train.write_text(train.read_text().replace("one and one?", "another"))
    assert find_overlap(open_table(train), open_table(other)).same == first.same - 1
