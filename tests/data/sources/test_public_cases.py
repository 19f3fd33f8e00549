"""Tables and files that people report trouble with, through the real command line."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_files import Convert, save_images
from sample_files import image_bytes

CASES = Path(__file__).parents[2] / "fixtures" / "cases"


def write_llava(file: Path, *images: Any) -> Path:
    """A record an image."""
    turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "red"}]
    lines = [json.dumps({"id": str(k), "image": image, "conversations": turns}) for k, image in enumerate(images)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines))
    return file


def test_the_table_of_the_readme_is_split(convert: Convert) -> None:
    result = convert("csv", CASES / "readme" / "labels.csv", "--eval-share", "0.1")
    assert result.said["records"] == {"eval": 1, "train": 1}


@pytest.mark.parametrize("share", ["0.001", "0.5", "0.999"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_neither_split_is_empty(convert: Convert, tmp_path: Path, share: str, count: int) -> None:
    names = [f"{k}.png" for k in range(count)]
    save_images(tmp_path / "in", *names)
    file = tmp_path / "in" / "a.csv"
    file.write_text("image,question,answer\n" + "".join(f"{name},Q,A\n./{name},Q2,A\n" for name in names))
    result = convert("csv", file, "--eval-share", share)
    assert sum(result.said["records"].values()) == 2 * count
    shown = {
        split: {row["conversations"][0]["images"][0] for row in result.records(split)} for split in ("train", "eval")
    }
    assert shown["train"]
    assert shown["eval"]
    assert not shown["train"] & shown["eval"]


def test_one_image_cannot_be_split(convert: Convert, tmp_path: Path) -> None:
    save_images(tmp_path / "in", "0.png", "folder/a/0.png", "folder/b/0.png")
    file = tmp_path / "in" / "a.csv"
    file.write_text("image,question,answer\n0.png,Q,A\n0.png,Q2,A\n")
    result = convert("csv", file, "--eval-share", "0.1")
    assert result.code == 2
    assert "--eval-share: all records are about the same images" in result.error
    assert not result.out.exists()
    folders = convert("image-folder", tmp_path / "in" / "folder", out="default")
    assert list(folders.said["records"]) == ["train"]
    assert "none was held out" in folders.notes
    asked = convert("image-folder", tmp_path / "in" / "folder", "--eval-share", "0.1", out="asked")
    assert asked.said["records"] == {"train": 1, "eval": 1}


def answers(convert: Convert, file: Path, *options: str, out: str = "out") -> list[str]:
    result = convert("csv", file, "--question", "Which?", "--on-bad", "skip", *options, out=out)
    return [turn["assistant"] for turn in result.turns()]


def test_labels_are_their_names_and_whole_numbers_stay_whole(convert: Convert) -> None:
    assert answers(convert, CASES / "parquet" / "classlabel.parquet") == ["scratch", "dent", "ok"]
    assert answers(convert, CASES / "parquet" / "float.parquet", out="float") == ["3", "7"]


DAY, NOON = datetime.datetime(2024, 2, 3), datetime.datetime(2024, 2, 3, 12)
COLUMNS: dict[str, tuple[pa.Array, list[str]]] = {
    "integers": (pa.array([3, None, 2**60]), ["3", str(2**60)]),
    "nullable integers": (pa.array([3.0, None, float("nan"), -7.0]), ["3", "-7"]),
    "fractions": (pa.array([2.5, 3.0, None]), ["2.5", "3.0"]),
    "32 bits": (pa.array([0.1, 2.0], pa.float32()), ["0.1", "2.0"]),
    "no number": (pa.array([float("inf"), 1.5]), ["1.5"]),
    "booleans": (pa.array([True, None, False]), ["True", "False"]),
    "decimals": (pa.array([decimal.Decimal("12.50"), decimal.Decimal("0.00")]), ["12.50", "0.00"]),
    "large decimals": (pa.array([decimal.Decimal("1E+2")]), ["100"]),
    "days": (pa.array([DAY, None]), ["2024-02-03"]),
    "days in nanoseconds": (pa.array([DAY], pa.timestamp("ns")), ["2024-02-03"]),
    "times": (pa.array([DAY, NOON]), ["2024-02-03 00:00:00", "2024-02-03 12:00:00"]),
    "dates": (pa.array([DAY.date()]), ["2024-02-03"]),
    "categories": (pa.array(["cat", "dog", None]).dictionary_encode(), ["cat", "dog"]),
}


@pytest.mark.parametrize("case", COLUMNS)
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_cells_are_said_as_a_person_would(convert: Convert, tmp_path: Path, case: str, form: str) -> None:
    column, expected = COLUMNS[case]
    (tmp_path / "in").mkdir()
    save_images(tmp_path / "in", "0.png")
    table = pa.table({"image": ["0.png"] * len(column), "answer": column})
    file = tmp_path / "in" / f"a.{form}"
    if form == "parquet":
        pq.write_table(table, file)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    assert answers(convert, file) == expected


def test_a_column_is_of_whole_numbers_if_it_is_in_all_files(convert: Convert, tmp_path: Path) -> None:
    for split, values in (("train", [1.0, 2.0]), ("val", [1.0, 2.5])):
        save_images(tmp_path / "in", "0.png")
        pq.write_table(pa.table({"image": ["0.png"] * 2, "answer": values}), tmp_path / "in" / f"{split}.parquet")
    assert answers(convert, tmp_path / "in") == ["1.0", "2.0"]


def test_a_label_without_a_name_is_a_fault(convert: Convert, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    save_images(tmp_path / "in", "0.png")
    file = tmp_path / "in" / "a.parquet"
    table = datasets.Dataset.from_list([{"image": "0.png", "label": k} for k in (1, 0, -1)], features=features)
    table.to_parquet(file)
    assert answers(convert, file) == ["b", "a"]
    schema = pq.read_schema(file)
    pq.write_table(pa.table({"image": ["0.png"], "label": [7]}).replace_schema_metadata(schema.metadata), file)
    result = convert("csv", file, "--question", "Which?", out="other")
    assert result.code == 2
    assert "7 is no label of the column label, which has 2 classes" in result.error


@pytest.mark.parametrize("name", ["dict.json", "pretty.json", "rawb64.jsonl"])
def test_files_of_other_forms_are_read(convert: Convert, name: str) -> None:
    result = convert("llava", CASES / "sources" / name)
    assert {turn["assistant"] for turn in result.turns()} == {"red"}
    assert all(len(turn["images"]) == 1 for turn in result.turns())


@pytest.mark.parametrize("form", ["jsonl", "array", "pretty", "container"])
def test_messages_in_every_form_of_json(convert: Convert, tmp_path: Path, form: str) -> None:
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    rows: list[Any] = [{"id": k, "messages": chat} for k in "ab"]
    text = {
        "jsonl": "\n".join(map(json.dumps, rows)),
        "array": json.dumps(rows),
        "pretty": "\n".join(json.dumps(row, indent=4) for row in rows),
        "container": json.dumps({"version": 2, "items": rows}, indent=4),
    }[form]
    file = tmp_path / "chat.json"
    file.write_text(text)
    assert [row["id"] for row in convert("messages", file).records()] == ["a", "b"]


def uris(root: Path) -> dict[str, tuple[Any, str | None]]:
    """What a record may call ``a b.png``, and its path in the result; None for an embedded image."""
    data = (root / "a b.png").read_bytes()
    plain = base64.b64encode(data).decode()
    return {
        "percent": ("a%20b.png", "a b.png"),
        "percent in UTF-8": ("gr%C3%B6%C3%9Fe.png", "größe.png"),
        "its own percent": ("50%25.png", "50%25.png"),
        "percent that is none": ("50%.png", "50%.png"),
        "file": (f"file://{root}/a%20b.png", "a b.png"),
        "file, localhost": (f"file://localhost{root}/a b.png", "a b.png"),
        "file, one slash": (f"file:{root}/a%20b.png", "a b.png"),
        "file, relative": ("file://a%20b.png", "a b.png"),
        "file, relative below": ("FILE://sub/c.png", "sub/c.png"),
        "data": (f"data:image/png;base64,{plain}", None),
        "DATA": (f" DATA:image/png;BASE64,{plain}", None),
        "data without the word": (f"image/png;base64,{plain}", None),
        "data, escaped": ("data:image/png;base64," + plain.replace("+", "%2B").replace("/", "%2F"), None),
        "base64": (plain, None),
        "base64, lines": (base64.encodebytes(data).decode(), None),
        "base64, for URLs": (base64.urlsafe_b64encode(data).decode().rstrip("="), None),
        "base64, JPEG": (base64.b64encode(image_bytes(7, "JPEG")).decode(), None),
        "base64, WEBP": (base64.b64encode(image_bytes(7, "WEBP")).decode(), None),
        "bytes": ({"bytes": plain, "path": None}, None),
    }


@pytest.mark.parametrize("case", uris(CASES / "sources"))
def test_the_ways_to_name_an_image(convert: Convert, tmp_path: Path, case: str) -> None:
    root = tmp_path / "in"
    save_images(root, "a b.png", "größe.png", "50%25.png", "50%.png", "sub/c.png")
    named, path = uris(root)[case]
    (found,) = convert("llava", write_llava(root / "a.jsonl", named)).turn()["images"]
    if path is None:
        assert found.startswith("embedded/")
    else:
        assert found == path


REFUSED = {
    "url": ("https://a.org/1.png", "is a URL, and nothing is downloaded here: 'https://a.org/1.png'"),
    "another url": ("s3://bucket/1.png", "is a URL, and nothing is downloaded here: 's3://bucket/1.png'"),
    "file elsewhere": ("file:///nowhere/a.png", "is an absolute path: '/nowhere/a.png'"),
    "file of windows": ("file:///C:/a.png", "is an absolute path: 'C:/a.png'"),
    "file out of the folder": ("file://../a.png", "leaves the data root"),
    "no base64": ("data:image/png,abc", "is a data: URI that is not base64"),
    "damaged base64": ("data:image/png;base64,iVBORw0KGgo!", "is damaged base64"),
    "cut base64": (
        "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAABJ0lEQVR4nO2azQ6DMAyDx7T3f+XugMSBcX5d",
        "the image is ",
    ),
    "nothing": ("data:image/png;base64,", "is base64 of nothing"),
    "percent": ("a%20c.png", "there is no such image: 'a%20c.png'"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("source", ["llava", "csv"])
def test_what_cannot_be_read_says_why(convert: Convert, tmp_path: Path, case: str, source: str) -> None:
    value, what = REFUSED[case]
    save_images(tmp_path / "in", "a b.png")
    if source == "llava":
        file = write_llava(tmp_path / "in" / "a.jsonl", value)
    else:
        file = tmp_path / "in" / "a.csv"
        file.write_text(f'image,question,answer\n"{value}",Q,A\n')
    result = convert(source, file)
    assert result.code == 2
    assert "1 of 1 units cannot be converted" in result.error
    assert what in result.error


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "head",
    [
        '"image";question;"answer"',
        "sep=;\nimage;question;answer",
        '"sep=;"\nimage;question;answer',
        "image;question;answer",
        "SEP=;;;\nimage;question;answer",
    ],
)
def test_tables_as_excel_writes_them(convert: Convert, tmp_path: Path, head: str, end: str, encoding: str) -> None:
    save_images(tmp_path / "in", "a.png")
    file = tmp_path / "in" / "a.csv"
    file.write_bytes((head + "\na.png;Größe, bitte?;groß\n").replace("\n", end).encode(encoding))
    assert convert("csv", file).turns() == [{"images": ["a.png"], "user": "Größe, bitte?", "assistant": "groß"}]


def test_places_are_right_after_the_separator_line(convert: Convert, tmp_path: Path) -> None:
    save_images(tmp_path / "in", "a.png")
    file = tmp_path / "in" / "a.csv"
    file.write_bytes("sep=\t\r\nimage\tquestion\tanswer\r\na.png\tQ\tA\r\na.png\tQ\r\n".encode("utf-16"))
    result = convert("csv", file)
    assert result.code == 2
    assert f"{file}:4: has 2 cells; there are 3 columns" in result.error


def test_a_table_in_utf16_without_a_mark_is_one_error(convert: Convert, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes("image,question,answer\na.png,Q,A\n".encode("utf-16-le"))
    result = convert("csv", file)
    assert result.code == 2
    assert "is not UTF-8 but UTF-16LE" in result.error


def test_a_delimiter_within_quotes_is_none(convert: Convert, tmp_path: Path) -> None:
    save_images(tmp_path / "in", "a.png")
    file = tmp_path / "in" / "a.csv"
    file.write_text('image;"question, answer, or both";answer\na.png;Q;A\n')
    result = convert("csv", file, "--question-column", "question, answer, or both")
    assert result.turns() == [{"images": ["a.png"], "user": "Q", "assistant": "A"}]


CHATS: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "foreign_keys/system.jsonl": ("llava", [{"images": ["a.png"], "user": "Which colour?", "assistant": "rot"}], []),
    "foreign_keys/weight.jsonl": (
        "messages",
        [
            {"images": ["a.png"], "user": "Which colour?", "assistant": "WRONG GUESS", "weight": 0},
            {"user": "Look again.", "assistant": "red"},
        ],
        [],
    ),
    "foreign_keys/dpo.jsonl": (
        "messages",
        [{"images": ["a.png"], "user": "Which colour?", "assistant": "red", "rejected": ["blue"]}],
        [],
    ),
    "foreign_keys/qwenvl.jsonl": (
        "llava",
        [{"images": ["a.png"], "image_offsets": [11], "user": "Picture 1: \nWhich colour?", "assistant": "red"}],
        [],
    ),
    "grounding/g.jsonl": (
        "messages",
        [
            {"images": ["a.png"], "user": "Where is the red disc?", "assistant": "[(156,156),(844,844)]"},
            {"images": ["b.png"], "user": "Which discs are there?", "assistant": "blue disc[(156,156),(844,844)]"},
        ],
        ["a <bbox> was filled in as [(x1,y1),(x2,y2)], in thousandths of the image's width and height (2×)"],
    ),
    "tags/l.json": (
        "llava",
        [
            {
                "images": ["a.png", "b.png"],
                "image_offsets": [11, 23],
                "user": "Picture A: \nPicture B: \nWhich one is red?",
                "assistant": "A",
            },
            {
                "images": ["a.png"],
                "user": "Write this page as Markdown.",
                "assistant": "# Title\n\n![fig](<image>)\n\nText",
            },
            {"images": ["a.png", "b.png"], "image_offsets": [0, 5], "user": " and : same colour?", "assistant": "no"},
            *[{"images": ["a.png"], "user": "colour?", "assistant": "red"}] * 3,
        ],
        ["an answer holds an image tag, which is trained on as plain text (1×)"],
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_chats_of_other_tools(convert: Convert, name: str) -> None:
    source, turns, notes = CHATS[name]
    result = convert(source, CASES / name)
    assert (result.turns(), result.said["notes"]) == (turns, notes)
    assert (result.records()[0].get("system") == "Answer in German.") == (name == "foreign_keys/system.jsonl")


def test_values_that_are_no_text_are_named_by_kind(convert: Convert) -> None:
    result = convert("llava", CASES / "foreign_keys" / "values.jsonl")
    assert result.code == 2
    for kind in ("a number", "true", "null"):
        assert f"conversations[1].value: must be a string, not {kind}" in result.error
    skipped = convert("llava", CASES / "foreign_keys" / "values.jsonl", "--on-bad", "skip")
    assert [row["id"] for row in skipped.records()] == ["1.5", "z2", "1" + "0" * 30]
