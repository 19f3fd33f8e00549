from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from sample_files import clip, convert_until_killed, records, tree

from phi3v.data import image_folder
from phi3v.data.check import check_file
from phi3v.data.convert import BadUnitsError, ConversionResult, ConvertOptions
from phi3v.data.sources import SOURCES, ucf101
from phi3v.errors import UserError

CLIPS = [
    "train/Biking/v_Biking_g08_c01.avi",
    "train/Biking/v_Biking_g08_c02.avi",
    "train/Archery/v_Archery_g10_c01.avi",
    "val/Biking/v_Biking_g21_c04.avi",
    "test/Archery/v_Archery_g01_c01.avi",
]
PROMPT = "Classify the video into one of the following classes: Archery, Biking."


def run(out: Path, source: Path | str | None, **options: Any) -> ConversionResult:
    options = {"num_frames": 3} | options
    return SOURCES["ucf101"](ConvertOptions(out, None if source is None else str(source), **options))


def write_clips(folder: Path, names: list[str] = CLIPS) -> Path:
    for k, name in enumerate(names):
        clip(folder / name, start=k % 30, length=9)
    return folder


def write_tar(folder: Path, archive: Path, mode: Any = "w") -> Path:
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, "UCF101_subset")
    return archive


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_clips(tmp_path / "clips")


def test_the_tree_and_the_records_are_the_recipes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(out, source)
    stems = [name.removesuffix(".avi") for name in CLIPS]
    images = {f"images/{stem}.{k}.jpg" for stem in stems for k in range(3)}
    assert set(tree(out)) == images | {f"ucf101_{split}.jsonl" for split in ("train", "val", "test")}
    assert [(line["id"], line["conversations"][0]["assistant"]) for line in records(out / "ucf101_train.jsonl")] == [
        ("Archery/v_Archery_g10_c01", "Archery"),
        ("Biking/v_Biking_g08_c01", "Biking"),
        ("Biking/v_Biking_g08_c02", "Biking"),
    ]
    assert records(out / "ucf101_val.jsonl") == [
        {
            "id": "Biking/v_Biking_g21_c04",
            "source": "ucf101",
            "conversations": [
                {
                    "images": [f"val/Biking/v_Biking_g21_c04.{k}.jpg" for k in range(3)],
                    "user": PROMPT,
                    "assistant": "Biking",
                }
            ],
        }
    ]
    assert records(out / "ucf101_test.jsonl")[0]["id"] == "Archery/v_Archery_g01_c01"
    assert (result.records, result.images) == ({"train": 3, "val": 1, "test": 1}, 15)
    for file in result.files.values():
        assert check_file(file).ok


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar", "w"), ("lie.tar.gz", "w"), ("a.tar.gz", "w:gz"), ("a.tar.xz", "w:xz")]
)
def test_a_tar_gives_the_same_bytes_as_the_folder(source: Path, tmp_path: Path, name: str, mode: str) -> None:
    """The hub's .tar.gz is a plain tar in truth."""
    run(tmp_path / "folder", source, workers=1)
    archive = write_tar(source, tmp_path / name, mode)
    run(tmp_path / "out", archive, workers=2)
    assert tree(tmp_path / "out") == tree(tmp_path / "folder")


def test_a_folder_that_holds_the_tar(source: Path, tmp_path: Path) -> None:
    (tmp_path / "download").mkdir()
    write_tar(source, tmp_path / "download" / "UCF101_subset.tar.gz")
    assert run(tmp_path / "out", tmp_path / "download").images == 15


def test_the_hub_is_asked_only_without_a_source(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_tar(source, tmp_path / "UCF101_subset.tar.gz")
    asked = []

    def download(*arguments: Any, **options: Any) -> str:
        asked.append((arguments, options))
        return str(archive)

    monkeypatch.setattr(ucf101.huggingface_hub, "hf_hub_download", download)
    run(tmp_path / "local", source)
    assert not asked
    run(tmp_path / "out", None)
    assert asked == [(("sayakpaul/ucf101-subset", "UCF101_subset.tar.gz"), {"repo_type": "dataset"})]
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


def test_without_the_hub_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sayakpaul/ucf101-subset: cannot be had from the hub") as caught:
        run(tmp_path / "out", None)
    assert "--source" in str(caught.value)


@pytest.mark.parametrize("name", ["../../evil/Biking/v_a_g01_c01.avi", "train/../../../Biking/v_a_g01_c01.avi"])
def test_a_tar_that_reaches_out_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    archive = write_tar(source, tmp_path / "a.tar")
    with tarfile.open(archive, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    with pytest.raises(UserError, match=r"a\.tar: is not safe"):
        run(tmp_path / "out", archive, on_bad="skip")
    assert tree(tmp_path / "out") == {}
    assert not list(tmp_path.rglob("v_a_*"))


def test_a_link_out_of_a_tar_is_refused(source: Path, tmp_path: Path) -> None:
    archive = write_tar(source, tmp_path / "a.tar")
    with tarfile.open(archive, "a") as tar:
        member = tarfile.TarInfo("UCF101_subset/train/Biking/v_Biking_g09_c01.avi")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(UserError, match="is not safe"):
        run(tmp_path / "out", archive)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_was_cut_off(source: Path, tmp_path: Path, mode: str) -> None:
    archive = write_tar(source, tmp_path / "a.tar.gz", mode)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(UserError, match=r"a\.tar\.gz: cannot be read"):
        run(tmp_path / "out", archive)


def test_broken_and_short_clips_are_reported_and_the_others_kept(source: Path, tmp_path: Path) -> None:
    broken = source / "train/Biking/v_Biking_g08_c01.avi"
    broken.write_bytes(b"junk")
    short = clip(source / "val/Archery/v_Archery_g20_c01.avi", length=2)
    out = tmp_path / "out"
    with pytest.raises(BadUnitsError) as caught:
        run(out, source)
    assert [bad.place for bad in caught.value.bad] == [str(broken), str(short)]
    assert "cannot be decoded" in caught.value.bad[0].what
    assert "is too short: 2 frames, 3 are wanted" in caught.value.bad[1].what
    assert [path.name for path in out.glob("*.jsonl")] == ["ucf101_test.jsonl"]
    result = run(out, source, on_bad="skip")
    assert (result.records, len(result.skipped), result.images_kept) == ({"train": 2, "val": 1, "test": 1}, 2, 12)
    assert [line["id"] for line in records(result.files["train"])] == [
        "Archery/v_Archery_g10_c01",
        "Biking/v_Biking_g08_c02",
    ]


def test_running_it_again_decodes_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "out", source)
    before = tree(tmp_path / "out")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(image_folder, "sample_frames", fail)
    assert run(tmp_path / "out", source).images_kept == 15
    assert tree(tmp_path / "out") == before


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_run_is_finished_by_the_next_with_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_tar(source, tmp_path / "a.tar.gz", "w:gz")
    run(tmp_path / "whole", archive)
    out = tmp_path / "out"
    # The second frame of the third clip.
    convert_until_killed(["ucf101", "--source", str(archive), "--out", str(out), "--frames", "3"], writes=8)
    assert not list(out.glob("*.jsonl"))
    decoded = []
    real = image_folder.sample_frames
    monkeypatch.setattr(image_folder, "sample_frames", lambda *a, **k: decoded.append(k["name"]) or real(*a, **k))
    result = run(out, archive, workers=2)
    assert (len(decoded), result.images_kept) == (3, 7)
    assert tree(out) == tree(tmp_path / "whole")


def test_the_lists_of_the_original(tmp_path: Path) -> None:
    names = [f"UCF-101/Biking/v_Biking_g{group:02d}_c01.avi" for group in (1, 8, 9, 10)]
    source = write_clips(tmp_path / "in", names)
    lists = source / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("Biking/v_Biking_g08_c01.avi 10\nBiking/v_Biking_g09_c01.avi 10\n")
    (lists / "testlist01.txt").write_text("Biking/v_Biking_g01_c01.avi\r\nBiking/v_Biking_g02_c01.avi\r\n")
    with pytest.raises(BadUnitsError, match=r"Biking/v_Biking_g02_c01\.avi: is in testlist01\.txt, but"):
        run(tmp_path / "out", source)
    result = run(tmp_path / "out", source, on_bad="skip")
    assert result.records == {"train": 2, "test": 1}
    assert result.notes == ("1 clips are in neither list and are not converted",)


def test_without_splits_no_group_is_in_two(tmp_path: Path) -> None:
    names = [f"Biking/v_Biking_g{group:02d}_c{k:02d}.avi" for group in range(1, 26) for k in (1, 2)]
    names += [f"Archery/v_Archery_g{group:02d}_c01.avi" for group in (3, 4)]
    source = write_clips(tmp_path / "in", names)
    result = run(tmp_path / "out", source, num_frames=1)
    groups = {
        split: {line["conversations"][0]["images"][0].split("_c")[0].split("/")[-1] for line in records(file)}
        for split, file in result.files.items()
    }
    # The original's first split has groups 1 to 7 in test.
    assert groups["test"] == {f"v_Biking_g{group:02d}" for group in range(1, 8)} | {"v_Archery_g03"}
    assert groups["val"] == {f"v_Biking_g{group:02d}" for group in (8, 9, 10)}
    assert groups["train"] == {f"v_Biking_g{group:02d}" for group in range(11, 26)} | {"v_Archery_g04"}
    assert result.notes == ("there are no splits; the clips were split by group",)


def test_a_clip_outside_of_the_splits_is_reported(source: Path, tmp_path: Path) -> None:
    clip(source / "Biking" / "v_Biking_g30_c01.avi")
    (source / "train" / "Biking" / "._v_Biking_g08_c01.avi").write_bytes(b"a Mac's notes")
    with pytest.raises(BadUnitsError, match=r"v_Biking_g30_c01\.avi: lies outside of train/, val/, test/"):
        run(tmp_path / "out", source)


def test_two_clips_of_one_name(source: Path, tmp_path: Path) -> None:
    clip(source / "val/Biking/v_Biking_g21_c04.mkv")
    with pytest.raises(BadUnitsError, match=r"v_Biking_g21_c04\.mkv: has the name of val/Biking/v_Biking_g21_c04\.avi"):
        run(tmp_path / "out", source)


@pytest.mark.parametrize("form", ["folder", "tar", "file"])
def test_something_else(tmp_path: Path, form: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("no clip")
    source = tmp_path / "in"
    if form == "tar":
        source = write_tar(source, tmp_path / "a.tar")
    elif form == "file":
        source = source / "notes.txt"
    with pytest.raises(UserError, match=r"form that is known here|cannot be read"):
        run(tmp_path / "out", source)
