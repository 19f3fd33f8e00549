from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from own_files import Convert, Converted, save_images
from sample_files import clip, convert_until_killed, tree

QUESTION = "Classify the image into one of the following classes: cat, große Hunde."


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    save_images(folder, *(f"cat/{k}.png" for k in range(20)), *(f"große Hunde/my dog {k}.jpeg" for k in range(10)))
    return folder


def answers(result: Converted, split: str) -> list[str]:
    return [row["conversations"][0]["assistant"] for row in result.records(split)]


def ids(result: Converted, split: str) -> set[str]:
    return {row["id"] for row in result.records(split)}


def test_a_folder_for_each_class(convert: Convert, classes: Path) -> None:
    result = convert("image-folder", classes)
    assert answers(result, "train") == ["cat"] * 18 + ["große Hunde"] * 9
    assert answers(result, "eval") == ["cat"] * 2 + ["große Hunde"]
    for row in [*result.records("train"), *result.records("eval")]:
        (turn,) = row["conversations"]
        assert row["source"] == "image-folder"
        assert turn["images"] == [row["id"]]
        assert turn["user"] == QUESTION
        assert row["id"].split("/")[0] == turn["assistant"]
        assert (result.out / "images" / row["id"]).read_bytes() == (classes / row["id"]).read_bytes()
    assert ids(result, "train") | ids(result, "eval") == set(tree(classes))


def test_the_share_is_of_each_class_and_the_same_again(convert: Convert, classes: Path, tmp_path: Path) -> None:
    first = convert("image-folder", classes, "--eval-share", "0.2")
    assert answers(first, "eval") == ["cat"] * 4 + ["große Hunde"] * 2
    moved = shutil.copytree(classes, tmp_path / "elsewhere")
    save_images(moved, "cat/new.png")
    again = convert("image-folder", moved, "--eval-share", "0.2", out="again")
    assert len(ids(again, "eval") ^ ids(first, "eval")) <= 2  # the new one, and at most one that it displaced
    none = convert("image-folder", classes, "--eval-share", "0", out="none")
    assert set(none.said["files"]) == {"train"}


def test_folders_of_splits_are_kept(convert: Convert, tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    save_images(folder, "Train/cat/1.png", "Train/dog/a/1.png", "validation/dog/1.png", "test/owl/1.png")
    result = convert("image-folder", folder)
    assert set(result.said["files"]) == {"train", "val", "test"}
    assert answers(result, "train") == ["cat", "dog"]
    (turn,) = result.records("test")[0]["conversations"]
    assert turn["images"] == ["test/owl/1.png"]
    assert turn["user"] == "Classify the image into one of the following classes: cat, dog, owl."
    refused = convert("image-folder", folder, "--eval-share", "0.5")
    assert refused.code == 2
    assert "--eval-share: the folders are splits already" in refused.error


def test_a_question_of_ones_own(convert: Convert, classes: Path) -> None:
    result = convert("image-folder", classes, "--question", "Which pet ({classes})?")
    assert result.turn()["user"] == "Which pet (cat, große Hunde)?"


def test_descriptions_beside_images(convert: Convert, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    save_images(folder, *(f"my photo {k}.jpg" for k in range(4)))
    for k in range(4):
        (folder / f"my photo {k}.txt").write_bytes(f"\ufeffA größe\r\nof {k}. \r\n".encode())
    result = convert("image-folder", folder)
    turns = [row["conversations"][0] for split in ("train", "eval") for row in result.records(split)]
    assert (len(result.records("train")), len(result.records("eval"))) == (3, 1)
    assert {turn["user"] for turn in turns} == {"Describe the image."}
    assert {turn["images"][0]: turn["assistant"] for turn in turns} == {
        f"my photo {k}.jpg": f"A größe\nof {k}." for k in range(4)
    }
    assert result.said["notes"] == []
    own = convert("image-folder", folder, "--question", "What is this?", "--eval-share", "0", out="own")
    assert own.turn()["user"] == "What is this?"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "has no description"),
        (b" \n", "assistant: is empty"),
        (b"\xff", "is not UTF-8"),
        (b"<s>", "special token"),
    ],
)
def test_a_description_that_is_no_use(convert: Convert, tmp_path: Path, content: bytes | None, what: str) -> None:
    folder = tmp_path / "photos"
    save_images(folder, "a.png", "b.png")
    (folder / "a.txt").write_text("A picture")
    if content is not None:
        (folder / "b.txt").write_bytes(content)
    stopped = convert("image-folder", folder, "--eval-share", "0")
    assert stopped.code == 2
    assert f"{folder / 'b.png'}: " in stopped.error
    assert what in stopped.error
    skipped = convert("image-folder", folder, "--eval-share", "0", "--on-bad", "skip")
    assert [turn["assistant"] for turn in skipped.turns()] == ["A picture"]


def test_a_broken_image_costs_nothing_of_the_others(convert: Convert, classes: Path) -> None:
    good = classes / "cat" / "3.png"
    good.write_bytes(good.read_bytes()[:-30])
    stopped = convert("image-folder", classes)
    assert stopped.code == 2
    assert f"{good}: the image is truncated: 'cat/3.png'" in stopped.error
    skipped = convert("image-folder", classes, "--on-bad", "skip")
    assert skipped.said["skipped"] == 1
    assert len(ids(skipped, "train") | ids(skipped, "eval")) == 29


def test_other_files_are_left_out_and_counted(convert: Convert, classes: Path) -> None:
    for name in ("readme.md", "cat/Thumbs.db", "cat/.DS_Store", ".cache/cat/1.png"):
        (classes / name).parent.mkdir(parents=True, exist_ok=True)
        (classes / name).write_text("x")
    result = convert("image-folder", classes)
    assert result.said["notes"] == ["1 files are no images and were left out (endings: .md)"]


def test_any_format_is_copied_as_it_is(convert: Convert, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "pets"
    for name in ("cat/a.webp", "cat/a.JPEG", "dog/a.bmp", "dog/a.tif", "dog/a.gif"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").convert("RGB").save(folder / name)
    result = convert("image-folder", folder, "--eval-share", "0")
    assert tree(result.out / "images") == tree(folder)


BAD: dict[str, tuple[list[str], str]] = {
    "nothing": (["readme.md"], "is in no form that is known here"),
    "one class": (["cat/1.png", "cat/2.png"], "there is one class only, 'cat'"),
    "beside classes": (["cat/1.png", "dog/1.png", "1.png"], "'1.png' is in no folder of a class, and others are"),
    "mixed": (["train/cat/1.png", "train/dog/1.png", "extra/1.png"], "'train' is a split, and 'extra' is beside it"),
    "loose": (["train/cat/1.png", "1.png"], "'train' is a split, and '1.png' is beside it"),
}


@pytest.mark.parametrize("case", BAD)
def test_folders_of_no_known_form(convert: Convert, tmp_path: Path, case: str) -> None:
    names, what = BAD[case]
    save_images(tmp_path / "pets", *names)
    result = convert("image-folder", tmp_path / "pets")
    assert result.code == 2
    assert what in result.error
    assert not result.out.exists()


def test_a_file_is_no_folder(convert: Convert, classes: Path) -> None:
    result = convert("image-folder", classes / "cat" / "1.png")
    assert result.code == 2
    assert "is a file" in result.error


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    for k, name in enumerate(["run/a b.mp4", "run/a b.avi", "walk/c.mp4", "walk/d.mkv"]):
        clip(folder / name, start=3 * k)
    return folder


def test_clips(convert: Convert, clips: Path, tmp_path: Path) -> None:
    result = convert("video-folder", clips, "--frames", "3", "--eval-share", "0.5")
    rows: list[Any] = [*result.records("train"), *result.records("eval")]
    assert sorted(row["id"] for row in rows) == sorted(tree(clips))
    assert len(result.records("eval")) == 2
    for row in rows:
        (turn,) = row["conversations"]
        assert turn["images"] == [f"{row['id']}.{k}.jpg" for k in range(3)]
        assert turn["user"] == "Classify the video into one of the following classes: run, walk."
        assert turn["assistant"] == row["id"].split("/")[0]
    arguments = ["video-folder", "--source", str(clips), "--frames", "3", "--eval-share", "0.5"]
    convert_until_killed([*arguments, "--out", str(tmp_path / "killed")], writes=7)
    again = convert("video-folder", clips, "--frames", "3", "--eval-share", "0.5", out="killed")
    assert again.said["images_kept"] == 6
    assert tree(again.out) == tree(result.out)


def test_a_broken_and_a_short_clip(convert: Convert, clips: Path) -> None:
    (clips / "run" / "a b.mp4").write_bytes(b"no clip")
    clip(clips / "walk" / "c.mp4", length=5)
    stopped = convert("video-folder", clips)
    assert stopped.code == 2
    assert f"{clips / 'run' / 'a b.mp4'}: cannot be decoded" in stopped.error
    assert f"{clips / 'walk' / 'c.mp4'}: is too short: 5 frames, 8 are wanted" in stopped.error
    skipped = convert("video-folder", clips, "--on-bad", "skip", "--eval-share", "0")
    assert ids(skipped, "train") == {"run/a b.avi", "walk/d.mkv"}


def test_descriptions_of_clips(convert: Convert, tmp_path: Path) -> None:
    clip(tmp_path / "clips" / "a.mp4")
    (tmp_path / "clips" / "a.txt").write_text("A man talks.")
    result = convert("video-folder", tmp_path / "clips", "--frames", "1")
    assert result.turn() == {"images": ["a.mp4.0.jpg"], "user": "Describe the video.", "assistant": "A man talks."}
