from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phi3v.config import DEFAULT_MAX_PIXELS
from phi3v.data.images import ImageLevel, check_image, image_size, load_image
from phi3v.errors import UserError


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few dozen bytes that announces any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 16)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def what_is_wrong(path: str, root: Path, level: ImageLevel = "decode") -> str:
    """The message of `check_image`, which `load_image` has to raise as well."""
    wrong = check_image(path, root=root, level=level)
    assert wrong is not None
    if level == "decode":
        with pytest.raises(UserError) as caught:
            load_image(path, root=root)
        assert caught.value.what == f"the image {wrong[0]}"
        assert caught.value.hint == wrong[1]
        assert caught.value.where == str(root / path)
    return f"{wrong[0]} → {wrong[1]}"


@pytest.mark.parametrize("level", ["decode", "header", "off"])
def test_a_real_picture_is_fine(root: Path, level: ImageLevel) -> None:
    assert check_image("train/0.png", root=root, level=level) is None


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff", ".ppm", ".tga", ".jp2"])
def test_every_usual_format_is_read_as_pillow_reads_it(root: Path, drawing: Path, suffix: str) -> None:
    Image.open(drawing).convert("RGB").save(root / f"a{suffix}")
    assert check_image(f"a{suffix}", root=root) is None
    image = load_image(f"a{suffix}", root=root)
    assert image.mode == "RGB"
    assert np.array_equal(image, Image.open(root / f"a{suffix}").convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb_as_in_the_reference(root: Path, drawing: Path, mode: str) -> None:
    picture = Image.open(drawing).convert("L").convert(mode) if mode == "I;16" else Image.open(drawing).convert(mode)
    picture.save(root / "a.png")
    image = load_image("a.png", root=root)
    assert image.mode == "RGB"
    assert np.array_equal(image, Image.open(root / "a.png").convert("RGB"))


def test_a_photograph_is_read_without_its_exif_rotation(root: Path) -> None:
    skimage_data = pytest.importorskip("skimage.data", reason="scikit-image brings the photograph")
    photo = Image.fromarray(skimage_data.astronaut()).crop((0, 0, 512, 300))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    photo.save(root / "a.jpg", exif=exif)
    image = load_image("a.jpg", root=root)
    assert image.size == image_size("a.jpg", root=root) == (512, 300)
    assert np.array_equal(image, Image.open(root / "a.jpg").convert("RGB"))


def test_missing_files_suggest_what_was_meant(root: Path) -> None:
    assert "does not exist: 'train/0.jpg' → did you mean 'train/0.png'?" in what_is_wrong("train/0.jpg", root)
    assert "did you mean 'train/0.png'?" in what_is_wrong("train/0.PNG", root)
    assert "did you mean 'train'?" in what_is_wrong("Train/0.png", root)
    assert "paths are relative to images/: write 'train/0.png'" in what_is_wrong("images/train/0.png", root)
    assert f"it is looked up in {root}" in what_is_wrong("other/thing.gif", root)
    assert "there is no such folder" in what_is_wrong("train/0.png", root / "nowhere")
    assert "does not exist" in what_is_wrong("train/0.png/x.png", root)
    assert "cannot be read (File name too long)" in what_is_wrong("x" * 300, root)


def test_what_is_no_image(root: Path) -> None:
    (root / "empty.png").touch()
    (root / "text.png").write_text("<html>404 not found</html>")
    (root / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    os.mkfifo(root / "pipe.png")
    for level in ("decode", "header"):
        assert "is a folder" in what_is_wrong("train", root, level)
        assert "is an empty file" in what_is_wrong("empty.png", root, level)
        assert "is not an image that can be read" in what_is_wrong("text.png", root, level)
        assert "is not an image that can be read" in what_is_wrong("page.eps", root, level)
        assert "is not a regular file" in what_is_wrong("pipe.png", root, level)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission(root: Path) -> None:
    (root / "train" / "0.png").chmod(0)
    assert "cannot be read (Permission denied)" in what_is_wrong("train/0.png", root)


def test_a_failing_disk_is_not_called_a_bad_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", fail)
    assert "cannot be read (Permission denied)" in what_is_wrong("train/0.png", root)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".bmp"])
def test_a_truncated_file_is_found_by_decoding(root: Path, drawing: Path, suffix: str) -> None:
    path = root / f"a{suffix}"
    Image.open(drawing).convert("RGB").resize((336, 336)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    message = what_is_wrong(f"a{suffix}", root)
    # A WebP is read as one piece, so that its decoder only says that the piece is broken.
    assert "is truncated" in message or suffix == ".webp"
    assert "copy or download it again" in message or suffix == ".webp"


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_the_header_level_does_not_decode(root: Path, drawing: Path, suffix: str) -> None:
    path = root / f"a{suffix}"
    Image.open(drawing).convert("RGB").resize((336, 336)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert check_image(f"a{suffix}", root=root, level="header") is None
    assert image_size(f"a{suffix}", root=root) == (336, 336)


def test_damaged_bytes_inside_a_file(root: Path, drawing: Path) -> None:
    good = bytearray(drawing.read_bytes())
    start = good.index(b"IDAT") + 4
    good[start : start + 40] = b"\xff" * 40
    (root / "a.png").write_bytes(good)
    assert "is damaged (" in what_is_wrong("a.png", root)


@pytest.mark.parametrize("size", [(60_000, 60_000), (11_000, 11_000)])
def test_an_image_bomb_is_refused_from_its_header(root: Path, size: tuple[int, int]) -> None:
    """Above both of Pillow's limits, where it raises, and between them, where it warns."""
    (root / "bomb.png").write_bytes(png_header(*size))
    assert (root / "bomb.png").stat().st_size < 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for level in ("decode", "header"):
            assert f"{size[0]}x{size[1]} = {size[0] * size[1]:,} pixels" in what_is_wrong("bomb.png", root, level)
        assert check_image("bomb.png", root=root, max_pixels=10**10, level="header") is None


def test_the_pixel_limit_is_exact_and_pillows_own_stays_in_force(root: Path) -> None:
    assert Image.MAX_IMAGE_PIXELS == DEFAULT_MAX_PIXELS
    assert check_image("train/0.png", root=root, max_pixels=64 * 64) is None
    wrong = check_image("train/0.png", root=root, max_pixels=64 * 64 - 1)
    assert wrong is not None
    assert wrong[0] == "has 64x64 = 4,096 pixels, above the limit of 4,095: 'train/0.png'"
    assert Image.MAX_IMAGE_PIXELS == DEFAULT_MAX_PIXELS


def test_links_may_not_leave_the_data_root(root: Path, drawing: Path) -> None:
    (root / "out.png").symlink_to(drawing)
    (root / "outside").symlink_to(drawing.parent)
    (root / "in.png").symlink_to(root / "train" / "0.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    assert "leaves the data root through a link" in what_is_wrong("out.png", root)
    assert "leaves the data root through a link" in what_is_wrong("outside/0.png", root)
    assert "cannot be read" in what_is_wrong("loop.png", root)
    assert check_image("in.png", root=root) is None
    linked_root = root.parent / "linked"
    linked_root.symlink_to(root)
    assert check_image("train/0.png", root=linked_root) is None


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hosts", "a\\b.png", ""])
def test_paths_are_judged_before_the_disk_is_touched(root: Path, path: str) -> None:
    assert check_image(path, root=root, level="off") == check_image(path, root=root)
    with pytest.raises(UserError):
        load_image(path, root=root)


def test_off_never_looks_at_the_disk(root: Path) -> None:
    assert check_image("not/there.png", root=root, level="off") is None
