from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from sample_files import clip, image_bytes, tree

from phi3v.data import image_folder
from phi3v.data.image_folder import ImageFolder, OutputError
from phi3v.errors import UserError


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Fail the test if one of these functions is called."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("done again")

    for name in names:
        monkeypatch.setattr(image_folder, name, fail)


@pytest.mark.parametrize(("encoding", "suffix"), [("PNG", "png"), ("JPEG", "jpg")])
def test_png_and_jpeg_are_taken_over_byte_by_byte(
    tmp_path: Path, encoding: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = image_bytes(1, encoding)
    assert ImageFolder(tmp_path).add("train/a", data) == f"train/a.{suffix}"
    assert tree(tmp_path) == {f"train/a.{suffix}": data}
    forbid(monkeypatch, "decode_image", "replacing")
    again = ImageFolder(tmp_path)
    assert again.add("train/a", data) == f"train/a.{suffix}"
    assert (again.total, again.kept) == (1, 1)


@pytest.mark.parametrize("encoding", ["TIFF", "WEBP", "BMP"])
def test_other_formats_become_png_once(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = image_bytes(1, encoding)
    assert ImageFolder(tmp_path).add("a", data) == "a.png"
    with Image.open(tmp_path / "a.png") as made, Image.open(io.BytesIO(data)) as expected:
        assert made.format == "PNG"
        assert ImageChops.difference(made, expected.convert("RGB")).getbbox() is None
    before = tree(tmp_path)
    forbid(monkeypatch, "decode_image", "replacing")
    ImageFolder(tmp_path).add("a", data)
    assert tree(tmp_path) == before
    with pytest.raises(OutputError, match="exists with other content"):
        ImageFolder(tmp_path).add("a", image_bytes(2, encoding))


@pytest.mark.parametrize("encoding", ["PNG", "JPEG", "WEBP"])
def test_a_file_is_copied_under_its_own_name_whatever_its_format(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "größe").mkdir(parents=True)
    (source / "größe" / "a b.x").write_bytes(image_bytes(1, encoding))
    assert ImageFolder(out).copy_file("größe/a b.x", root=source) == "größe/a b.x"
    assert tree(out) == tree(source)
    forbid(monkeypatch, "decode_image", "replacing")
    again = ImageFolder(out)
    again.copy_file("größe/a b.x", root=source)
    assert (again.total, again.kept) == (1, 1)
    (source / "größe" / "a b.x").write_bytes(image_bytes(2, encoding))
    with pytest.raises(OutputError, match="exists with other content"):
        again.copy_file("größe/a b.x", root=source)


def test_a_broken_file_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(1)[:-40])
    for name, what in (("a.png", "is truncated"), ("b.png", "does not exist"), ("../a.png", "leaves the data root")):
        with pytest.raises(UserError, match=what):
            ImageFolder(tmp_path / "out").copy_file(name, root=tmp_path)
    assert not (tmp_path / "out").exists()


def test_another_image_of_the_same_name_is_refused(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path)
    folder.add("a", image_bytes(1))
    with pytest.raises(OutputError, match=r"a\.png: exists with other content"):
        folder.add("a", image_bytes(2))
    assert (tmp_path / "a.png").read_bytes() == image_bytes(1)


def test_an_image_that_several_records_name_counts_once(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path)
    folder.add("a", image_bytes(1))
    folder.add("a", image_bytes(1))
    folder.add("b", image_bytes(2))
    assert (folder.total, folder.kept) == (2, 0)


@pytest.mark.parametrize("data", [b"", b"text", image_bytes(1)[:60]])
def test_a_bad_image_leaves_nothing(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match=r"the image .*'scan\.png'"):
        ImageFolder(tmp_path / "out").add("a", data, name="scan.png")
    assert not (tmp_path / "out").exists()


def test_names_stay_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves the data root"):
        ImageFolder(tmp_path / "out").add("../a", image_bytes(1))


def test_files_of_the_source_stay_in_its_root(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(image_bytes(1))
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    folder = ImageFolder(tmp_path / "out")
    for name, message in (
        ("../secret.png", "leaves the data root"),
        (str(tmp_path / "secret.png"), "is an absolute path"),
        ("link.png", "leaves the data root through a link"),
        ("none.png", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            folder.add_file("a", name, root=tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_frames_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clip(tmp_path / "a.avi")
    out = tmp_path / "out"
    names = ImageFolder(out).add_frames("val/a", path, 3)
    assert names == ["val/a.0.jpg", "val/a.1.jpg", "val/a.2.jpg"]
    before = tree(out)
    assert sorted(before) == names
    (out / "val" / "a.1.jpg").unlink()
    partly = ImageFolder(out)
    partly.add_frames("val/a", path.read_bytes(), 3)
    assert (partly.total, partly.kept) == (3, 2)
    assert tree(out) == before
    forbid(monkeypatch, "sample_frames", "replacing")
    assert ImageFolder(out).add_frames("val/a", path, 3) == names


def test_frames_of_another_clip_or_count_are_not_mixed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = clip(tmp_path / "a.avi")
    ImageFolder(out).add_frames("a", path, 3)
    before = tree(out)
    with pytest.raises(OutputError, match="exists with other content"):
        ImageFolder(out).add_frames("a", path, 4)
    with pytest.raises(OutputError, match="exists with other content"):
        ImageFolder(out).add_frames("a", clip(tmp_path / "b.avi", start=3), 3)
    assert tree(out) == before


def test_a_folder_that_cannot_be_written_is_not_the_images_fault(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        ImageFolder(tmp_path / "out").add("a", image_bytes(1))
