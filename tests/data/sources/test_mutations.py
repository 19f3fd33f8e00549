from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from mutations import FORMS, docvqa, easy_vqa, hateful_memes, image_folder, llava_array, try_mutation

from phi3v.cli import main


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_broken_source_is_refused_or_gives_records_without_a_fault(
    form: Callable[[Path], None], tmp_path: Path
) -> None:
    """No other error; of many seeds the first few. `mutations.py` tries more by hand."""
    outcomes = {try_mutation(form, seed, tmp_path / str(seed)) for seed in range(20)}
    assert outcomes <= {"refused", "converted"}


FOUND = {
    "half a surrogate pair, docvqa": (
        docvqa,
        "train_v1.0.json",
        '"documents/0.png"',
        r'"a\ud800.png"',
        "half of a surrogate",
    ),
    "half a surrogate pair, memes": (
        hateful_memes,
        "train.jsonl",
        '"img/0.png"',
        r'"a\ud800.png"',
        "half of a surrogate",
    ),
    "half a surrogate pair, llava": (llava_array, "a.json", '"0.png"', r'"/\ud800.png"', "half of a surrogate"),
    "no byte, llava": (llava_array, "a.json", '"0.png"', r'"file:///%00.png"', "has a NUL character"),
    "a number for a list": (docvqa, "train_v1.0.json", '"data": [', '"data": 7, "other": [', 'its "data" is no list'),
    "an object for a list": (
        docvqa,
        "val_v1.0.json",
        '"data": [',
        '"data": {"a": 1}, "other": [',
        'its "data" is no list',
    ),
    "no end of brackets": (docvqa, "val_v1.0.json", '"who?"', "[" * 9999 + "]" * 9999, "cannot be read"),
    "no end of brackets, easy-vqa": (easy_vqa, "test/questions.json", "0", "[" * 9999 + "]" * 9999, "cannot be read"),
    "no end of brackets, memes": (hateful_memes, "train.jsonl", '"x"', "[" * 9999 + "]" * 9999, "is not valid JSON"),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_crashed_once(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    form, name, old, new, what = FOUND[case]
    form(tmp_path / "in")
    file = tmp_path / "in" / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    command = ["data", "convert", FORMS[form], "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert what in capsys.readouterr().err


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file system takes any bytes; JSON does not."""
    image_folder(tmp_path / "in")
    os.rename(tmp_path / "in" / "cat" / "0.png", os.fsencode(tmp_path / "in" / "cat") + b"/\xff.png")
    command = ["data", "convert", "image-folder", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert r"has bytes that are not UTF-8: 'cat/\udcff.png'" in capsys.readouterr().err
    assert main([*command, "--on-bad", "skip", "--eval-share", "0"]) == 0
    assert "skipped: 1" in capsys.readouterr().out
