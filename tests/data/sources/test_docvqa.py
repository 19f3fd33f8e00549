from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_files import DOCVQA_1200, cauldron_row, docvqa_row, write_parquet
from sample_files import image_bytes, records, tree, without_ids

from phi3v.data.check import check_file
from phi3v.data.convert import BadUnitsError, ConversionResult, ConvertOptions
from phi3v.data.sources import SOURCES
from phi3v.errors import UserError

# (question, answers) of every page
PAGES: dict[str, list[list[tuple[str, list[str]]]]] = {
    "train": [[(f"q{p}.{k}", [f"a{p}.{k}"]) for k in range(1 + p % 4)] for p in range(7)],
    "val": [[(f"v{p}.{k}", [f"b{p}.{k}"]) for k in range(4)] for p in range(3)],
}


def run(out: Path, source: Path | str | None, **options: Any) -> ConversionResult:
    return SOURCES["docvqa"](ConvertOptions(out, None if source is None else str(source), **options))


def page(split: str, number: int) -> bytes:
    return image_bytes(number + 100 * (split == "val"))


def write_original(folder: Path, pages: dict[str, list[list[tuple[str, list[str]]]]] = PAGES) -> Path:
    """As the challenge gives it: the questions of a page need not follow each other."""
    (folder / "documents").mkdir(parents=True)
    for split, of_split in pages.items():
        entries = []
        for number, questions in enumerate(of_split):
            image = f"documents/{split}_{number}.png"
            (folder / image).write_bytes(page(split, number))
            for k, (question, answers) in enumerate(questions):
                entry = {"questionId": 10 * number + k, "question": question, "image": image, "docId": number}
                entries.append((k, number, entry | {"answers": answers, "data_split": split}))
        entries.sort(key=lambda entry: entry[:2])
        data = {"dataset_name": "docvqa", "dataset_split": split, "data": [entry for _, _, entry in entries]}
        (folder / f"{split}_v1.0_withQT.json").write_text(json.dumps(data))
    return folder


def write_cauldron(folder: Path) -> Path:
    for split, of_split in PAGES.items():
        rows = [
            cauldron_row([page(split, number)], [(question, answers[0]) for question, answers in questions])
            for number, questions in enumerate(of_split)
        ]
        write_parquet(folder / f"{split}-00000-of-00001.parquet", rows)
    return folder


def write_rows(folder: Path, pages: dict[str, list[list[tuple[str, list[str]]]]] = PAGES) -> Path:
    for split, of_split in pages.items():
        rows = [
            docvqa_row(page(split, number), question, answers)
            for number, questions in enumerate(of_split)
            for question, answers in questions
        ]
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows, DOCVQA_1200)
    return folder


def test_all_three_forms_give_the_same_bytes_but_for_ids(tmp_path: Path) -> None:
    run(tmp_path / "original", write_original(tmp_path / "a"), workers=2)
    run(tmp_path / "cauldron", write_cauldron(tmp_path / "b"), workers=1)
    run(tmp_path / "rows", write_rows(tmp_path / "c"), workers=2)
    expected = tree(tmp_path / "original")
    assert len(expected) == 2 + 10
    assert tree(tmp_path / "cauldron") == tree(tmp_path / "rows")
    assert without_ids(tree(tmp_path / "rows")) == without_ids(expected)


def test_the_questions_of_a_page_follow_each_other_and_share_its_file(tmp_path: Path) -> None:
    result = run(tmp_path / "out", write_original(tmp_path / "a"))
    assert (result.records, result.images) == ({"train": 16, "val": 12}, 10)
    lines = records(result.files["val"])
    assert lines[5] == {
        "id": "11",
        "source": "docvqa",
        "conversations": [{"images": ["val/000001.png"], "user": "v1.1", "assistant": "b1.1"}],
    }
    assert [line["conversations"][0]["images"] for line in lines] == [[f"val/{k // 4:06d}.png"] for k in range(12)]
    assert (tmp_path / "out" / "images" / "val" / "000001.png").read_bytes() == page("val", 1)
    for file in result.files.values():
        assert check_file(file).ok


@pytest.mark.parametrize("write", [write_original, write_rows])
def test_all_reference_answers_are_kept(tmp_path: Path, write: Any) -> None:
    pages = {"train": [[("when?", ["1999", "in 1999", "1999"]), ("who?", ["me", "me"])]]}
    result = run(tmp_path / "out", write(tmp_path / "a", pages))
    turns = [line["conversations"][0] for line in records(result.files["train"])]
    assert (turns[0]["assistant"], turns[0]["answers"]) == ("1999", ["1999", "in 1999"])
    assert turns[1]["assistant"] == "me"
    assert "answers" not in turns[1]


def test_a_train_split_alone_holds_its_first_rows_out(tmp_path: Path) -> None:
    rows = [cauldron_row([image_bytes(k)], [(f"q{k}", f"a{k}")]) for k in range(20)]
    write_parquet(tmp_path / "docvqa" / "train-00000-of-00001.parquet", rows)
    result = run(tmp_path / "out", tmp_path / "docvqa")
    users = {
        split: [line["conversations"][0]["user"] for line in records(file)] for split, file in result.files.items()
    }
    assert users == {"val": [f"q{k}" for k in range(4)], "train": [f"q{k}" for k in range(4, 20)]}
    assert "first 4 rows are held out as val" in result.notes[0]
    assert (tmp_path / "out" / "images" / "train" / "000000.png").read_bytes() == image_bytes(4)


def test_the_test_split_has_no_answers(tmp_path: Path) -> None:
    source = write_original(tmp_path / "a")
    (source / "test_v1.0.json").write_text(json.dumps({"data": [{"question": "q", "image": "documents/x.png"}]}))
    result = run(tmp_path / "out", source)
    assert sorted(result.files) == ["train", "val"]
    assert result.notes == ("test_v1.0.json has no answers and is not converted",)


def test_bad_entries_cost_nothing_of_the_good_ones(tmp_path: Path) -> None:
    source = write_original(tmp_path / "a")
    file = source / "val_v1.0_withQT.json"
    data = json.loads(file.read_text())
    data["data"][1]["answers"] = []  # of page 1
    data["data"][2]["image"] = "documents/none.png"  # a page of its own now
    data["data"][3] = "text"  # of page 0
    data["data"][4]["question"] = "  "  # of page 1
    file.write_text(json.dumps(data))
    with pytest.raises(BadUnitsError) as caught:
        run(tmp_path / "out", source)
    for part in (
        f"{file}: data[1] (questionId 10): has no answers",
        f"{file}: data[3]: must be an object",
        f"{file}: data[4] (questionId 11): the question",
        "documents/none.png: the image does not exist: 'documents/none.png'",
    ):
        assert part in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images", "train.jsonl"]
    result = run(tmp_path / "out", source, on_bad="skip")
    assert (result.records, len(result.skipped)) == ({"train": 16, "val": 8}, 4)


def test_a_bad_question_of_a_row_leaves_the_others(tmp_path: Path) -> None:
    rows = [cauldron_row([image_bytes(k)], [("q", "a"), ("", "a"), ("r", "b")]) for k in range(2)]
    write_parquet(tmp_path / "in" / "train-0.parquet", rows)
    write_parquet(tmp_path / "in" / "val-0.parquet", [*rows, cauldron_row([], [("q", "a")])])
    result = run(tmp_path / "out", tmp_path / "in", on_bad="skip")
    assert [line["id"] for line in records(result.files["train"])] == [
        f"train-00000{page}-0{question}" for page in (0, 1) for question in (0, 2)
    ]
    assert [bad.place.removeprefix(f"{tmp_path}/in, ") for bad in result.skipped] == [
        *("train, row 0, texts[1]", "train, row 1, texts[1]", "val, row 0, texts[1]", "val, row 1, texts[1]"),
        "val, row 2",
    ]
    assert "has 0 images, not 1" in result.skipped[-1].what


def test_an_annotation_file_that_is_broken(tmp_path: Path) -> None:
    source = write_original(tmp_path / "a")
    (source / "val_v1.0_withQT.json").write_text('{"data": [')
    with pytest.raises(UserError, match=r"val_v1\.0_withQT\.json: cannot be read"):
        run(tmp_path / "out", source)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"it holds notes\.txt") as caught:
        run(tmp_path / "out", tmp_path / "in")
    assert "train_v1.0*.json" in str(caught.value)
    assert "parquet" in str(caught.value)


def test_a_table_of_another_kind(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "in").mkdir()
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).to_parquet(tmp_path / "in" / "train.parquet")
    with pytest.raises(UserError, match="lacks the columns image, query, answers; it has text, label"):
        run(tmp_path / "out", tmp_path / "in")


def test_an_id_of_the_dataset_that_is_there_twice_is_a_fault(tmp_path: Path) -> None:
    source = write_original(tmp_path / "a", {"val": [[("q", ["a"])], [("r", ["b"])]]})
    file = source / "val_v1.0_withQT.json"
    file.write_text(file.read_text().replace('"questionId": 10', '"questionId": 0'))
    result = run(tmp_path / "out", source, on_bad="skip")
    assert [line["id"] for line in records(result.files["val"])] == ["0"]
    assert "the id '0' is that of an earlier record" in str(result.skipped[0])


def test_a_table_with_question_ids_keeps_them(tmp_path: Path) -> None:
    import datasets

    image = {"bytes": image_bytes(0), "path": None}
    rows = [{"questionId": str(k), "question": "q", "answers": ["a"], "image": image} for k in (337, 338)]
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("questionId", "question")}
        | {"answers": datasets.Sequence(datasets.Value("string")), "image": datasets.Image()}
    )
    write_parquet(tmp_path / "in" / "val-0.parquet", rows, features)
    result = run(tmp_path / "out", tmp_path / "in")
    assert [line["id"] for line in records(result.files["val"])] == ["337", "338"]
