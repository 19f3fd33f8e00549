from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from own_files import Convert, save_images
from sample_files import clip, convert_until_killed, image_bytes, tree


def record(*turns: str, name: Any = "a", **fields: Any) -> dict[str, Any]:
    senders = ("human", "gpt")
    messages = [{"from": senders[k % 2], "value": text} for k, text in enumerate(turns)]
    return {"id": name, **fields, "conversations": messages}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    save_images(folder, "0.png", "coco/two words.jpg", "coco/größe.jpeg")
    return folder


def write(folder: Path, *rows: Any, name: str = "llava.json") -> Path:
    file = folder / name
    if name.endswith("l"):
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8-sig")
    else:
        file.write_text(json.dumps(rows, indent=1))
    return file


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_images_go_to_the_turns_of_their_tags(convert: Convert, data: Path, name: str) -> None:
    images = ["0.png", "coco/two words.jpg", "coco/größe.jpeg"]
    file = write(
        data,
        record("<image>\nWhat?", "A", "And <image>\nor <image>?", "B", "Why?", "C", image=images),
        record("Hello", "Hi", name=7),  # text only
        record("What?", "No tag", name="c", image="0.png"),
        name=name,
    )
    result = convert("llava", file)
    assert result.code == 0
    assert result.records() == [
        {
            "id": "a",
            "source": "llava",
            "conversations": [
                {"images": images[:1], "user": "What?", "assistant": "A"},
                {"images": images[1:], "image_offsets": [4, 8], "user": "And \nor ?", "assistant": "B"},
                {"user": "Why?", "assistant": "C"},
            ],
        },
        {"id": "7", "source": "llava", "conversations": [{"user": "Hello", "assistant": "Hi"}]},
        {
            "id": "c",
            "source": "llava",
            "conversations": [{"images": ["0.png"], "user": "What?", "assistant": "No tag"}],
        },
    ]
    for name in images:  # byte by byte, under their own names
        assert (result.out / "images" / name).read_bytes() == (data / name).read_bytes()
    assert result.said["notes"] == ["a record had images and no tag; they are in its first turn (1×)"]


@pytest.mark.parametrize("tag", ["<video>", "<image>", ""])
def test_clips_become_frames(convert: Convert, data: Path, tag: str) -> None:
    clip(data / "clips" / "a b.mp4")
    result = convert("llava", write(data, record(f"{tag}\nWhat?", "A", video="clips/a b.mp4")), "--frames", "3")
    assert result.turn()["images"] == [f"clips/a b.mp4.{k}.jpg" for k in range(3)]
    assert len(list((result.out / "images").rglob("*.jpg"))) == 3


def test_ids_that_are_missing_or_there_twice(convert: Convert, data: Path) -> None:
    names: list[Any] = ["a", "a", "a-2", None, 5, "5", "a"]
    result = convert("llava", write(data, *(record("Q", "A", name=name) for name in names)))
    assert [row["id"] for row in result.records()] == ["a", "a-2", "a-2-2", "train-00000003", "5", "5-2", "a-3"]
    assert "an id was that of an earlier record; -2, -3 … was added to it (4×)" in result.notes


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "more tags": (record("<image><image>\nWhat?", "A", image="0.png"), "2 <image> tags for 1 image"),
    "fewer tags": (record("<image>\nWhat?", "A", image=["0.png", "0.png"]), "1 <image> tag for 2 images"),
    "no image": (record("<image>\nWhat?", "A"), "1 <image> tag for 0 images"),
    "no clip": (record("<video>\nWhat?", "A", image="0.png"), "0 <image> tags for 1 image"),
    "no answer": (record("What?"), "conversations[0]: the last question has no answer"),
    "empty answer": (record("What?", " "), "conversations[0].assistant: is empty"),
    "gpt first": ({"conversations": [{"from": "gpt", "value": "A"}]}, "conversations[0]: is a message of the assist"),
    "nobody": ({"conversations": [{"from": "me", "value": "A"}]}, "conversations[0].from: is no role known here: 'me'"),
    "no text": ({"conversations": [{"from": "human"}]}, "conversations[0].value: must be a string"),
    "nothing said": (record(), "the conversation has no message"),
    "no conversation": ({"id": "b"}, "has neither messages nor conversations"),
    "missing": (record("What?", "A", image="1.png"), "there is no such image: '1.png'"),
    "case": (record("What?", "A", image="coco/Two Words.jpg"), "did you mean 'coco/two words.jpg'?"),
    "outside": (record("What?", "A", image="../other/0.png"), "leaves the data root: '../other/0.png'"),
    "absolute": (record("What?", "A", image="/etc/hostname"), "is an absolute path"),
    "url": (record("What?", "A", image="https://a.org/0.png"), "image[0]: is a URL, and nothing is downloaded here"),
    "a text file": (record("What?", "A", image="llava.jsonl"), "is not an image that can be read"),
    "special": (record("Say <|end|>", "A"), "conversations[0].user: holds text that the tokenizer reads as a special"),
    "id": (record("What?", "A", name=[1]), "id: must be text or a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_has_its_place_and_may_be_skipped(convert: Convert, data: Path, case: str) -> None:
    bad, what = BAD[case]
    file = write(data, record("Hello", "Hi", name="good"), bad, record("Bye", "Bye", name="too"), name="llava.jsonl")
    stopped = convert("llava", file)
    assert stopped.code == 2
    assert f"{file}:2: " in stopped.error
    assert what in stopped.error
    assert "1 of 3 units cannot be converted" in stopped.error
    assert not list(stopped.out.glob("*.jsonl"))
    skipped = convert("llava", file, "--on-bad", "skip")
    assert skipped.code == 0
    assert [row["id"] for row in skipped.records()] == ["good", "too"]
    assert skipped.said["skipped"] == 1
    assert what.split(": ")[-1] in str(skipped.said["skipped_units"][0]).replace("\\'", "'").replace('\\"', '"')


def test_links_do_not_lead_out_of_the_folder(convert: Convert, data: Path, tmp_path: Path) -> None:
    clip(tmp_path / "secret.mp4")
    (tmp_path / "secret.png").write_bytes(image_bytes(0))
    (data / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    for fields in ({"image": "link.png"}, {"video": "link.mp4"}):
        result = convert("llava", write(data, record("What?", "A", **fields)))
        assert result.code == 2
        assert "leaves the data root through a link" in result.error


def test_special_text_may_be_escaped(convert: Convert, data: Path) -> None:
    file = write(data, record("Say <|end|> and <b>", "</s>"))
    result = convert("llava", file, "--special-text", "escape")
    assert result.turn() == {"user": "Say < |end|> and <b>", "assistant": "< /s>"}


def test_images_may_lie_elsewhere_and_be_named_from_windows_or_in_full(convert: Convert, data: Path) -> None:
    annotations = data.parent / "annotations"
    annotations.mkdir()
    rows = [
        record("Q", "A", name=str(k), image=name)
        for k, name in enumerate(["coco\\two words.jpg", "./coco//two words.jpg", str(data / "coco" / "two words.jpg")])
    ]
    file = write(annotations, *rows)
    assert convert("llava", file).code == 2
    result = convert("llava", file, "--image-root", str(data))
    assert [turn["images"] for turn in result.turns()] == [["coco/two words.jpg"]] * 3
    assert len(list((result.out / "images").rglob("*.*"))) == 1


def test_a_share_for_evaluation_keeps_what_is_about_one_image_together(convert: Convert, data: Path) -> None:
    names = [f"{k}.png" for k in range(30)]
    save_images(data, *names)
    rows = [record("Q", f"A{n}", name=f"{name} {n}", image=name) for name in names for n in range(2)]
    result = convert("llava", write(data, *rows), "--eval-share", "0.3")
    splits = {
        split: [turn["images"][0] for row in result.records(split) for turn in row["conversations"]]
        for split in ("train", "eval")
    }
    assert not set(splits["train"]) & set(splits["eval"])
    assert len(splits["train"]) + len(splits["eval"]) == 60
    assert 4 <= len(splits["eval"]) <= 32
    more = convert(
        "llava", write(data, *rows, record("Q", "A", name="new", image="0.png")), "--eval-share", "0.3", out="more"
    )
    assert {row["id"] for row in more.records("eval")} - {"new"} == {row["id"] for row in result.records("eval")}


def test_files_named_after_splits(convert: Convert, data: Path) -> None:
    write(data, record("Q", "A"), name="my_train.json")
    write(data, record("Q", "A"), name="validation.jsonl")
    result = convert("llava", data)
    assert set(result.said["files"]) == {"train", "val"}
    again = convert("llava", data, "--eval-share", "0.1")
    assert again.code == 2
    assert "--eval-share: the data has splits already" in again.error


def test_a_killed_conversion_is_finished_by_the_next(convert: Convert, data: Path, tmp_path: Path) -> None:
    clip(data / "a.mp4")
    file = write(
        data,
        record("<image>", "A", name="x", image="0.png"),
        record("Q", "A", name="y", video="a.mp4"),
        record("Q", "A", name="z", image=["coco/two words.jpg", "coco/größe.jpeg"]),
    )
    whole = convert("llava", file, out="whole")
    convert_until_killed(["llava", "--source", str(file), "--out", str(tmp_path / "out")], writes=4)
    assert not (tmp_path / "out" / "train.jsonl").exists()
    result = convert("llava", file)
    assert result.said["images_kept"] == 3
    assert tree(result.out) == tree(whole.out)


def test_a_broken_array_is_found_before_the_work(convert: Convert, data: Path) -> None:
    file = data / "llava.json"
    file.write_text(json.dumps([record("Q", "A", image="0.png")])[:-1] + ",\n{")
    result = convert("llava", file, "--on-bad", "skip")
    assert result.code == 2
    assert f"{file}:2: is not valid JSON" in result.error
    assert not (result.out / "images").exists()
