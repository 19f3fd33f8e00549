from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_files import cauldron_row, write_parquet
from sample_files import image_bytes, records, tree, without_ids

from phi3v.data.check import check_file
from phi3v.data.convert import BadUnitsError, ConversionResult, ConvertOptions
from phi3v.data.sources import SOURCES
from phi3v.data.sources.nlvr2 import QUESTION
from phi3v.errors import UserError

# (set, pair) -> (sentence, label) of every statement
PAIRS: dict[tuple[int, int], list[tuple[str, str]]] = {
    (7, 0): [("There is a dog.", "True"), ("Both are red.", "False")],
    (7, 1): [("There is a dog.", "False")],
    (12, 0): [("At least {two} cats sleep.", "True")],
}


def run(out: Path, source: Path, **options: Any) -> ConversionResult:
    return SOURCES["nlvr2"](ConvertOptions(out, str(source), **options))


def image_pair(split: str, number: int) -> list[bytes]:
    return [image_bytes(2 * number + side + 50 * (split == "dev")) for side in range(2)]


def write_original(folder: Path) -> Path:
    """Train as its own folders of images, dev flat; statements about a pair do not follow each other."""
    (folder / "data").mkdir(parents=True)
    for split in ("train", "dev"):
        lines = []
        for number, ((group, pair), statements) in enumerate(PAIRS.items()):
            images = folder / "images" / "train" / "33" if split == "train" else folder / "dev"
            images.mkdir(parents=True, exist_ok=True)
            for side, data in enumerate(image_pair(split, number)):
                (images / f"{split}-{group}-{pair}-img{side}.png").write_bytes(data)
            for k, (sentence, label) in enumerate(statements):
                row = {"identifier": f"{split}-{group}-{pair}-{k}", "sentence": sentence, "label": label}
                lines.append((k, row | ({"directory": 33} if split == "train" else {})))
        lines.sort(key=lambda line: line[0])
        (folder / "data" / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for _, row in lines))
    return folder


def write_cauldron(folder: Path) -> Path:
    for split, file in (("train", "train"), ("dev", "test")):
        rows = [
            cauldron_row(
                image_pair(split, number), [(QUESTION.format(sentence=text), label) for text, label in statements]
            )
            for number, statements in enumerate(PAIRS.values())
        ]
        write_parquet(folder / f"{file}-00000-of-00001.parquet", rows)
    return folder


def test_both_forms_give_the_same_records(tmp_path: Path) -> None:
    """But for the name of the split that is not train: a table has no ``dev``."""
    run(tmp_path / "original", write_original(tmp_path / "a"), workers=2)
    run(tmp_path / "cauldron", write_cauldron(tmp_path / "b"), workers=1)
    original = without_ids(tree(tmp_path / "original"))
    assert len(original) == 2 + 12
    renamed = {
        name.replace("test", "dev"): data.replace(b"test", b"dev") if name.endswith("jsonl") else data
        for name, data in without_ids(tree(tmp_path / "cauldron")).items()
    }
    assert renamed == original


def test_both_images_are_in_one_turn_and_the_statements_of_a_pair_follow_each_other(tmp_path: Path) -> None:
    result = run(tmp_path / "out", write_original(tmp_path / "in"))
    assert (result.records, result.images) == ({"train": 4, "dev": 4}, 12)
    lines = records(result.files["train"])
    assert lines[1] == {
        "id": "train-7-0-1",
        "source": "nlvr2",
        "conversations": [
            {
                "images": ["train/000000.0.png", "train/000000.1.png"],
                "user": QUESTION.format(sentence="Both are red."),
                "assistant": "False",
            }
        ],
    }
    assert [line["conversations"][0]["images"][0] for line in lines] == [f"train/00000{k}.0.png" for k in (0, 0, 1, 2)]
    assert (tmp_path / "out" / "images" / "train" / "000000.1.png").read_bytes() == image_pair("train", 0)[1]
    for file in result.files.values():
        assert check_file(file).ok


def test_bad_lines_and_images_are_reported_with_their_place(tmp_path: Path) -> None:
    source = write_original(tmp_path / "in")
    file = source / "data" / "dev.json"
    with file.open("a") as more:
        more.write('{"identifier": "dev-7-0-5", "sentence": "Half a li\n')
        more.write('{"identifier": "dev-7-0", "sentence": "x", "label": "True"}\n')
        more.write('{"identifier": "dev-7-0-6", "sentence": "x", "label": "maybe"}\n')
        more.write('{"identifier": "dev-99-0-0", "sentence": "x", "label": "True"}\n')
    (source / "dev" / "dev-12-0-img1.png").unlink()
    with pytest.raises(BadUnitsError) as caught:
        run(tmp_path / "out", source)
    for line, what in {
        5: "is not valid JSON",
        6: "identifier is not SPLIT-SET-PAIR-SENTENCE",
        7: "label is neither True nor False: 'maybe'",
        8: "does not exist: 'dev-99-0-img0.png'",
        3: "does not exist: 'dev-12-0-img1.png'",
    }.items():
        assert any(str(bad).startswith(f"{file}:{line}: ") and what in str(bad) for bad in caught.value.bad), line
    result = run(tmp_path / "out", source, on_bad="skip")
    assert (result.records, len(result.skipped)) == ({"train": 4, "dev": 3}, 5)


def test_annotations_without_images(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text('{"identifier": "dev-1-0-0", "sentence": "x", "label": "True"}\n')
    with pytest.raises(UserError, match=r"it holds dev\.json") as caught:
        run(tmp_path / "out", tmp_path)
    assert "images/dev/ or dev/" in str(caught.value)


def test_a_row_with_one_image(tmp_path: Path) -> None:
    rows = [cauldron_row([image_bytes(0), image_bytes(1)], [("q", "True")])] * 2
    write_parquet(tmp_path / "in" / "train-0.parquet", rows)
    write_parquet(tmp_path / "in" / "val-0.parquet", [*rows, cauldron_row([image_bytes(1)], [("q", "True")])])
    with pytest.raises(BadUnitsError, match="val, row 2: has 1 images, not 2"):
        run(tmp_path / "out", tmp_path / "in")
