from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from own_files import Convert, save_images
from sample_files import convert_until_killed, image_bytes, tree


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    save_images(folder, "0.png", "photos/my cat.jpg", "photos/größe.png")
    return folder


def write(folder: Path, text: str, name: str = "pets.csv", encoding: str = "utf-8") -> Path:
    file = folder / name
    file.write_bytes(text.encode(encoding))
    return file


def test_usual_columns_are_found_and_said(convert: Convert, data: Path) -> None:
    file = write(data, "File Name,Prompt,Label,id,note\n0.png,Which?,cat,a,x\nphotos/my cat.jpg,Which?,dog,b,\n")
    result = convert("csv", file)
    assert result.records() == [
        {"id": "a", "source": "csv", "conversations": [{"images": ["0.png"], "user": "Which?", "assistant": "cat"}]},
        {
            "id": "b",
            "source": "csv",
            "conversations": [{"images": ["photos/my cat.jpg"], "user": "Which?", "assistant": "dog"}],
        },
    ]
    assert result.said["notes"] == [
        "columns chosen by their names: image: 'File Name', question: 'Prompt', answer: 'Label', id: 'id'"
    ]
    assert (result.out / "images" / "0.png").read_bytes() == (data / "0.png").read_bytes()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(("delimiter", "name"), [(",", "a.csv"), (";", "a.csv"), ("\t", "a.tsv"), ("|", "a.CSV")])
def test_the_forms_in_which_tables_are_saved(
    convert: Convert, data: Path, end: str, mark: str, delimiter: str, name: str
) -> None:
    rows = [
        ["image", "question", "answer"],
        ["photos/größe.png", '"Which ""one"",' + end + ' ; | or?"', " as it is "],
        ["", "No image?", "日本"],  # rows with and without
        ["", "", ""],
        [" 0.png ", "Last?", "yes"],
    ]
    result = convert("csv", write(data, mark + end.join(delimiter.join(row) for row in rows), name))
    text = f'Which "one",{end} ; | or?'
    assert result.turns() == [
        {"images": ["photos/größe.png"], "user": text, "assistant": " as it is "},
        {"user": "No image?", "assistant": "日本"},
        {"images": ["0.png"], "user": "Last?", "assistant": "yes"},
    ]


def test_named_columns_several_images_and_one_question(convert: Convert, data: Path) -> None:
    file = write(data, "left,right,same,image\n0.png,photos/my cat.jpg,no,x\n0.png,,no,x\n")
    result = convert(
        "csv",
        file,
        "--image-column",
        "left",
        "--image-column",
        "right",
        "--answer-column",
        "same",
        "--question",
        "Same?",
    )
    assert result.turns() == [
        {"images": ["0.png", "photos/my cat.jpg"], "user": "Same?", "assistant": "no"},
        {"images": ["0.png"], "user": "Same?", "assistant": "no"},
    ]
    assert result.said["notes"] == []


def test_splits(convert: Convert, data: Path) -> None:
    file = write(data, "image,question,answer,fold\n0.png,Q,1,Train\n0.png,Q,2,dev\n0.png,Q,3,train\n0.png,Q,4,test\n")
    result = convert("csv", file, "--split-column", "fold")
    found = {
        split: [row["conversations"][0]["assistant"] for row in result.records(split)] for split in result.said["files"]
    }
    assert found == {"train": ["1", "3"], "val": ["2"], "test": ["4"]}
    write(data, "image,question,answer,fold\n0.png,Q,1,train\n0.png,Q,2,fold 3\n")
    stopped = convert("csv", file, "--split-column", "fold", out="other")
    assert stopped.code == 2
    assert f"{file}:3: fold: is no split: 'fold 3'" in stopped.error
    refused = convert("csv", file, "--split-column", "fold", "--eval-share", "0.1", out="other")
    assert "the data has splits already" in refused.error


def test_a_share_for_evaluation(convert: Convert, data: Path) -> None:
    names = [f"many/{k}.png" for k in range(40)]
    save_images(data, *names)
    file = write(data, "image,question,answer\n" + "".join(f"{name},Q,A\n{name},Q2,A\n" for name in names))
    result = convert("csv", file, "--eval-share", "0.25")
    splits = [
        {turn["images"][0] for row in result.records(split) for turn in row["conversations"]}
        for split in ("train", "eval")
    ]
    assert not splits[0] & splits[1]
    assert 3 <= len(splits[1]) <= 20


BAD_ROWS = {
    "few cells": ("0.png,Q", "has 2 cells; there are 3 columns"),
    "many cells": ("0.png,Q,A,B", "has 4 cells; there are 3 columns (quote a cell that holds a ',')"),
    "missing": ("1.png,Q,A", "there is no such image: '1.png'"),
    "outside": ("../x.png,Q,A", "leaves the data root"),
    "url": ("https://a.org/1.png,Q,A", "image: is a URL, and nothing is downloaded here"),
    "no answer": ("0.png,Q,", "conversations[0].assistant: is empty"),
    "special": ("0.png,<|image_1|>,A", "conversations[0].user: holds text that the tokenizer reads as a special token"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_has_the_line_where_it_begins_and_may_be_skipped(convert: Convert, data: Path, case: str) -> None:
    row, what = BAD_ROWS[case]
    file = write(data, f'image,question,answer\n0.png,"two\nlines",good\n\n{row}\n0.png,Q,too\n')
    stopped = convert("csv", file)
    assert stopped.code == 2
    assert f"{file}:5: {what}" in stopped.error or (f"{file}:5: " in stopped.error and what in stopped.error)
    assert "1 of 3 units cannot be converted" in stopped.error
    skipped = convert("csv", file, "--on-bad", "skip")
    assert [turn["assistant"] for turn in skipped.turns()] == ["good", "too"]


BAD_FILES = {
    "empty": ("", "the first row is empty"),
    "no rows": ("image,question,answer\n", "holds no record"),
    "twice": ("image,image,answer\n", ":1: two columns have the name 'image'"),
    "quote": ('image,question,answer\n0.png,Q,A\n0.png,"Q,A\n0.png,Q,A\n', ":3: is not valid CSV"),
    "no image": ("question,answer\nQ,A\n", "no column looks like the image; there are 'question', 'answer'"),
    "no question": ("image,answer\n0.png,A\n", "no column looks like the question"),
    "no answer": ("image,question\n0.png,Q\n", "no column looks like the answer"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_table_that_cannot_be_used(convert: Convert, data: Path, case: str) -> None:
    text, what = BAD_FILES[case]
    result = convert("csv", write(data, text), "--on-bad", "skip")
    assert result.code == 2
    assert what in result.error
    assert not result.out.exists()


def test_an_unknown_column_names_those_that_are_there(convert: Convert, data: Path) -> None:
    file = write(data, "image,question,Antwort\n0.png,Q,A\n")
    for name, near in (
        ("Antword", "did you mean 'Antwort'?"),
        ("antwort", "did you mean 'Antwort'?"),
        ("zzz", "name one of"),
    ):
        result = convert("csv", file, "--answer-column", name)
        assert result.code == 2
        assert f"--answer-column: there is no column '{name}'; there are 'image', 'question', 'Antwort'" in result.error
        assert near in result.error


def test_one_column_is_not_two_parts(convert: Convert, data: Path) -> None:
    file = write(data, "image,question,answer\n0.png,Q,A\n")
    result = convert("csv", file, "--question-column", "answer")
    assert result.code == 2
    assert "two parts of a record are the same column" in result.error
    result = convert("csv", file, "--question-column", "question", "--question", "Q?")
    assert result.code == 2
    assert "either --question or --question-column" in result.error


def test_a_table_of_another_encoding(convert: Convert, data: Path) -> None:
    result = convert("csv", write(data, "image,question,answer\n0.png,Q,Größe\n", encoding="cp1252"))
    assert result.code == 2
    assert "is not UTF-8" in result.error
    assert "iconv" in result.error


def test_images_may_lie_elsewhere(convert: Convert, data: Path, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    file = write(tmp_path / "tables", "image,question,answer\nphotos\\my cat.jpg,Q,A\n")
    assert "--image-root names another folder" in convert("csv", file).error
    assert convert("csv", file, "--image-root", str(data)).turn()["images"] == ["photos/my cat.jpg"]


def test_parquet_with_embedded_and_named_images(convert: Convert, data: Path) -> None:
    rows = [{"image": {"bytes": image_bytes(9), "path": None}, "question": "Q", "label": 3}]
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "label": datasets.Value("int64")}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(data / "a.parquet")
    result = convert("csv", data / "a.parquet")
    (name,) = result.turn()["images"]
    assert (result.out / "images" / name).read_bytes() == image_bytes(9)
    assert result.turn()["assistant"] == "3"
    rows = [{"image": "0.png", "question": "Q", "label": "A"}, {"image": None, "question": "Q", "label": "B"}]
    datasets.Dataset.from_list(rows).to_parquet(data / "b.parquet")
    named = convert("csv", data / "b.parquet", out="named")
    assert named.turns() == [
        {"images": ["0.png"], "user": "Q", "assistant": "A"},
        {"user": "Q", "assistant": "B"},
    ]


def test_a_killed_conversion_is_finished_by_the_next(convert: Convert, data: Path, tmp_path: Path) -> None:
    file = write(data, "image,question,answer\n0.png,Q,A\nphotos/my cat.jpg,Q,B\nphotos/größe.png,Q,C\n")
    whole = convert("csv", file, out="whole")
    convert_until_killed(["csv", "--source", str(file), "--out", str(tmp_path / "out")], writes=2)
    result = convert("csv", file)
    assert result.said["images_kept"] == 1
    assert tree(result.out) == tree(whole.out)
    third = convert("csv", file)
    assert third.said["images_kept"] == 3
    assert tree(third.out) == tree(whole.out)


def test_other_images_of_the_same_name_are_not_overwritten(convert: Convert, data: Path) -> None:
    file = write(data, "image,question,answer\n0.png,Q,A\n")
    assert convert("csv", file).code == 0
    (data / "0.png").write_bytes(image_bytes(77))
    again = convert("csv", file)
    assert again.code == 2
    assert "exists with other content" in again.error
