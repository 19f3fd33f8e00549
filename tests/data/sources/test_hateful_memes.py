from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hub_files import cauldron_row, write_parquet
from sample_files import convert_until_killed, image_bytes, records, tree, without_ids

from phi3v.data.check import check_file
from phi3v.data.convert import BadUnitsError, ConversionResult, ConvertOptions
from phi3v.data.sources import SOURCES
from phi3v.data.sources.hateful_memes import QUESTION
from phi3v.errors import UserError


def run(out: Path, source: Path, **options: Any) -> ConversionResult:
    return SOURCES["hateful-memes"](ConvertOptions(out, str(source), **options))


def write_original(folder: Path, counts: dict[str, int]) -> Path:
    (folder / "img").mkdir(parents=True)
    number = 0
    for split, count in counts.items():
        lines = []
        for _ in range(count):
            image = f"img/{number:05d}.png"
            (folder / image).write_bytes(image_bytes(number))
            lines.append(json.dumps({"id": number, "img": image, "label": number % 2, "text": "its caption"}))
            number += 1
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def write_cauldron(folder: Path, counts: dict[str, int]) -> Path:
    number = 0
    for split, count in counts.items():
        rows = []
        for _ in range(count):
            rows.append(cauldron_row([image_bytes(number)], [(QUESTION, "Yes" if number % 2 else "No")]))
            number += 1
        write_parquet(folder / f"{split}-00000-of-00001.parquet", rows)
    return folder


def test_both_forms_give_the_same_bytes_but_for_ids(tmp_path: Path) -> None:
    counts = {"train": 9, "test": 4}
    run(tmp_path / "original", write_original(tmp_path / "a", counts), workers=2)
    run(tmp_path / "cauldron", write_cauldron(tmp_path / "b", counts), workers=1)
    assert len(tree(tmp_path / "original")) == 2 + 13
    assert without_ids(tree(tmp_path / "cauldron")) == without_ids(tree(tmp_path / "original"))


def test_every_file_is_a_split(tmp_path: Path) -> None:
    counts = {"train": 3, "dev_seen": 2, "dev_unseen": 1, "test_seen": 2, "test_unseen": 1}
    result = run(tmp_path / "out", write_original(tmp_path / "in", counts))
    assert result.records == counts
    assert records(result.files["dev_seen"])[0] == {
        "id": "3",
        "source": "hateful-memes",
        "conversations": [{"images": ["dev_seen/000000.png"], "user": QUESTION, "assistant": "Yes"}],
    }
    for file in result.files.values():
        assert check_file(file).ok


def test_a_file_without_labels_is_named_and_left(tmp_path: Path) -> None:
    source = write_original(tmp_path / "in", {"train": 3})
    (source / "test_unseen.jsonl").write_text('{"id": 1, "img": "img/00001.png", "text": "x"}\n')
    result = run(tmp_path / "out", source)
    assert list(result.files) == ["train"]
    assert result.notes == ("test_unseen.jsonl has no labels and is not converted",)


def test_the_first_500_rows_of_the_collection_are_held_out(tmp_path: Path) -> None:
    rows = [cauldron_row([image_bytes(0)], [(f"q{k}", "Yes")]) for k in range(2_501)]
    write_parquet(tmp_path / "in" / "train-0.parquet", rows)
    result = run(tmp_path / "out", tmp_path / "in")
    assert result.records == {"val": 500, "train": 2_001}
    assert records(result.files["val"])[-1]["conversations"][0]["user"] == "q499"
    assert records(result.files["train"])[0]["conversations"][0]["user"] == "q500"


def test_bad_lines_are_reported_with_their_place(tmp_path: Path) -> None:
    source = write_original(tmp_path / "in", {"train": 8, "dev_seen": 2})
    file = source / "train.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = lines[1][:20]
    lines[2] = '["a list"]'
    lines[3] = lines[3].replace('"label": 1', '"label": 7')
    lines[4] = lines[4].replace("img/00004.png", "../../secret.png")
    (source / "img" / "00005.png").unlink()
    (source / "img" / "00006.png").write_bytes(image_bytes(6)[:50])
    file.write_text("\n".join(lines) + "\n")
    expected = {
        2: "is not valid JSON",
        3: "must be a JSON object",
        4: "label is neither 0 nor 1: 7",
        5: "leaves the data root",
        6: "does not exist: 'img/00005.png'",
        7: "'img/00006.png'",
    }
    with pytest.raises(BadUnitsError) as caught:
        run(tmp_path / "out", source)
    assert str(caught.value).startswith("hateful-memes: 6 of 10 units cannot be converted")
    for line, what in expected.items():
        assert any(str(bad).startswith(f"{file}:{line}: ") and what in str(bad) for bad in caught.value.bad), line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dev_seen.jsonl", "images"]
    result = run(tmp_path / "out", source, on_bad="skip")
    assert [line["id"] for line in records(result.files["train"])] == ["0", "7"]
    assert len(result.skipped) == 6


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("form", [write_original, write_cauldron])
def test_a_killed_run_is_finished_by_the_next_with_the_same_bytes(tmp_path: Path, form: Any) -> None:
    source = form(tmp_path / "in", {"train": 12, "test": 3})
    run(tmp_path / "whole", source)
    out = tmp_path / "out"
    convert_until_killed(["hateful-memes", "--source", str(source), "--out", str(out)], writes=6)
    assert not list(out.glob("*.jsonl"))
    finished = [path for path in (out / "images").rglob("*.png") if not path.name.startswith(".")]
    assert len(finished) == 5
    times = {path: path.stat().st_mtime_ns for path in finished}
    result = run(out, source, workers=2)
    assert (result.images, result.images_kept) == (15, 5)
    assert {path: path.stat().st_mtime_ns for path in finished} == times
    assert tree(out) == tree(tmp_path / "whole")


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="it holds nothing") as caught:
        run(tmp_path / "out", tmp_path / "in")
    assert "dev_seen.jsonl" in str(caught.value)
