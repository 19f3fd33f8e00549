from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from own_files import Convert, save_images
from sample_files import clip, image_bytes

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def url(value: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": value}}


def record(*contents: Any, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": content} for k, content in enumerate(contents)], **fields}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    save_images(folder, "0.png", "photos/my cat.jpg")
    return folder


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def embedded(data: bytes, ending: str) -> str:
    return f"embedded/{hashlib.blake2b(data, digest_size=12).hexdigest()}.{ending}"


def test_parts_strings_and_tags(convert: Convert, data: Path) -> None:
    rows = [
        record(
            [IMAGE, text("What?")],
            "A",
            [IMAGE, text("And"), text("this?")],
            [text("B")],
            images=["0.png", "photos/my cat.jpg"],
        ),
        record([text("What is"), url("photos/my cat.jpg"), text("this?")], "A"),
        record([{"type": "image", "image": "0.png", "text": None}, {**text("What?"), "image": None}], "A"),
        record("<image>Who?", "A", images=["0.png"]),  # as LLaMA-Factory writes it
        record("Who?", "A", images=["0.png"]),
        record("Hello", "Hi", images=[], tools=None),
    ]
    result = convert("messages", write(data, *rows))
    assert [row["conversations"] for row in result.records()] == [
        [
            {"images": ["0.png"], "user": "What?", "assistant": "A"},
            {"images": ["photos/my cat.jpg"], "user": "And\nthis?", "assistant": "B"},
        ],
        [{"images": ["photos/my cat.jpg"], "image_offsets": [8], "user": "What is\n\nthis?", "assistant": "A"}],
        [{"images": ["0.png"], "user": "What?", "assistant": "A"}],
        [{"images": ["0.png"], "user": "Who?", "assistant": "A"}],
        [{"images": ["0.png"], "user": "Who?", "assistant": "A"}],
        [{"user": "Hello", "assistant": "Hi"}],
    ]
    assert [row["id"] for row in result.records()] == [f"train-{k:08d}" for k in range(6)]
    assert result.said["notes"] == ["a record had images and no tag; they are in its first turn (1×)"]


def test_data_uris_become_files_once(convert: Convert, data: Path) -> None:
    png, jpeg = image_bytes(3), image_bytes(4, "JPEG")
    uris = [
        f"data:image/{kind};base64,{base64.b64encode(raw).decode()}" for kind, raw in (("png", png), ("jpeg", jpeg))
    ]
    rows = [record([url(uris[0]), url(uris[1]), text("Q")], "A"), record([IMAGE, text("Q")], "A", images=uris[:1])]
    result = convert("messages", write(data, *rows))
    names = [embedded(png, "png"), embedded(jpeg, "jpg")]
    assert [turn["images"] for turn in result.turns()] == [names, names[:1]]
    assert [(result.out / "images" / name).read_bytes() for name in names] == [png, jpeg]
    assert result.said["images"] == 2


def test_clips_become_frames(convert: Convert, data: Path) -> None:
    clip(data / "a.mp4")
    row = record([{"type": "video"}, text("What?")], "A", videos=["a.mp4"])
    result = convert("messages", write(data, row), "--frames", "2")
    assert result.turn()["images"] == ["a.mp4.0.jpg", "a.mp4.1.jpg"]


def with_message(role: str, **fields: Any) -> dict[str, Any]:
    row = record("Q", "A")
    row["messages"].append({"role": role, "content": "x", **fields})
    return row


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "url": (record([url("https://a.org/0.png"), text("Q")], "A"), "[0].image_url: is a URL, and nothing is downloaded"),
    "url in images": (
        record("Q", "A", images=["HTTP://a.org/0.png"]),
        "images[0]: is a URL, and nothing is downloaded",
    ),
    "no base64": (record([url("data:image/png,abc"), text("Q")], "A"), "is a data: URI that is not base64"),
    "damaged base64": (record([url("data:image/png;base64,a"), text("Q")], "A"), "is damaged base64"),
    "no image": (record([url("data:image/png;base64,aGVsbG8="), text("Q")], "A"), "is not an image that can be read"),
    "two users": (
        {"messages": [{"role": "user", "content": "Q"}, {"role": "user", "content": "Q"}]},
        "messages[1]: is a message of the user where one of the assistant must stand",
    ),
    "late system": (with_message("system"), "messages[2]: is a message of the system where one of the user must"),
    "tool role": (with_message("tool"), "messages[2].role: is no role known here: 'tool'"),
    "tool call": (with_message("assistant", tool_calls=[{}]), "messages[2]: calls a tool"),
    "no answer": (with_message("user"), "messages[2]: the last question has no answer"),
    "image of the assistant": (record("Q", [IMAGE], images=["0.png"]), "messages[1]: is an answer with an image"),
    "too few images": (record([IMAGE, IMAGE, text("Q")], "A", images=["0.png"]), "2 <image> tags for 1 image"),
    "too many images": (
        record([url("0.png"), text("Q")], "A", images=["photos/my cat.jpg"]),
        "0 <image> tags for 1 image",
    ),
    "unknown part": (record([{"type": "audio"}], "A"), "messages[0].content[0]: is of a type unknown here: 'audio'"),
    "no part": (record(["Q"], "A"), "messages[0].content[0]: is no part of a message"),
    "empty url": (record([{"type": "image_url"}, text("Q")], "A"), "messages[0].content[0]: names no file"),
    "null": (record(None, "A"), "messages[0].content: must be a string, not null"),
    "no messages": ({"turns": []}, "has neither messages nor conversations"),
    "special": (record("Q", "<|assistant|>"), "conversations[0].assistant: holds text that the tokenizer reads"),
    "outside": (record("Q", "A", images=["../x.png"]), "leaves the data root"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_has_its_place_and_may_be_skipped(convert: Convert, data: Path, case: str) -> None:
    bad, what = BAD[case]
    file = write(data, record("Q", "good"), bad)
    stopped = convert("messages", file)
    assert stopped.code == 2
    assert f"{file}:2: " in stopped.error
    assert what in stopped.error
    skipped = convert("messages", file, "--on-bad", "skip")
    assert (skipped.code, skipped.said["skipped"]) == (0, 1)
    assert [turn["assistant"] for turn in skipped.turns()] == ["good"]


def test_parquet_with_embedded_images(convert: Convert, data: Path) -> None:
    """In the schema that `datasets` writes for TRL, where a part has the keys of all parts."""
    images = [image_bytes(0), image_bytes(1, "JPEG"), image_bytes(0)]
    rows = [
        record([{**IMAGE, "text": None}, text(f"Q{k}")], [text("A")], images=[{"bytes": raw, "path": "image.png"}])
        for k, raw in enumerate(images)
    ]
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)}),
            "images": datasets.List(datasets.Image()),
        }
    )
    dataset = datasets.Dataset.from_list(rows, features=features)
    folder = data / "hub"
    folder.mkdir()
    dataset.to_parquet(folder / "train-00000-of-00001.parquet")
    dataset.select([0]).to_parquet(folder / "test-00000-of-00001.parquet")
    result = convert("messages", folder)
    names = [embedded(images[0], "png"), embedded(images[1], "jpg"), embedded(images[0], "png")]
    assert result.turns() == [{"images": [name], "user": f"Q{k}", "assistant": "A"} for k, name in enumerate(names)]
    assert (result.out / "images" / names[1]).read_bytes() == images[1]
    assert len(result.records("test")) == 1
    alone = convert("messages", folder / "train-00000-of-00001.parquet", out="alone")
    assert alone.turns() == result.turns()


def test_a_bad_row_of_parquet_has_its_number(convert: Convert, data: Path) -> None:
    file = data / "chats.parquet"
    datasets.Dataset.from_list([record("Q", "A"), record("Q", "")]).to_parquet(file)
    result = convert("messages", file)
    assert result.code == 2
    assert f"{file}, train: row 2: conversations[0].assistant: is empty" in result.error


def test_parquet_of_something_else(convert: Convert, data: Path) -> None:
    datasets.Dataset.from_list([{"question": "Q"}]).to_parquet(data / "chats.parquet")
    result = convert("messages", data / "chats.parquet")
    assert result.code == 2
    assert "lacks the columns messages; it has question" in result.error
