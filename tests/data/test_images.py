from __future__ import annotations

import errno
import io
import os
import struct
import unicodedata
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from phi3v.config import DEFAULT_MAX_PIXELS
from phi3v.data.image_store import FolderStore, find_file
from phi3v.data.images import (
    ImageLevel,
    check_image,
    decode_image,
    describe_kinds,
    image_kinds,
    image_size,
    load_image,
    read_image,
)
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
    wrong = check_image(path, store=FolderStore(root), level=level)
    assert wrong is not None
    if level == "decode":
        with pytest.raises(UserError) as caught:
            load_image(path, store=FolderStore(root))
        assert caught.value.what == f"the image {wrong[0]}"
        assert caught.value.hint == wrong[1]
        assert caught.value.where == str(root / path)
    return f"{wrong[0]} → {wrong[1]}"


@pytest.mark.parametrize("level", ["decode", "header", "off"])
def test_a_real_image_is_fine(root: Path, level: ImageLevel) -> None:
    assert check_image("train/0.png", store=FolderStore(root), level=level) is None


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff", ".ppm", ".tga", ".jp2"])
def test_every_usual_format_is_read_as_pillow_reads_it(root: Path, drawing: Path, suffix: str) -> None:
    Image.open(drawing).convert("RGB").save(root / f"a{suffix}")
    assert check_image(f"a{suffix}", store=FolderStore(root)) is None
    image = load_image(f"a{suffix}", store=FolderStore(root))
    assert image.mode == "RGB"
    assert np.array_equal(image, Image.open(root / f"a{suffix}").convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_opaque_modes_become_rgb_as_in_the_reference(root: Path, drawing: Path, mode: str) -> None:
    Image.open(drawing).convert(mode).save(root / "a.png")
    image = load_image("a.png", store=FolderStore(root))
    assert image.mode == "RGB"
    assert np.array_equal(image, Image.open(root / "a.png").convert("RGB"))


ENCODINGS: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {}),
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("AVIF", {}),
    ("MPO", {}),
    ("TIFF", {}),  # which Pillow turns by itself, in two ways
    ("TIFF", {"compression": "tiff_lzw"}),
]


def with_orientation(image: Image.Image, encoding: str, orientation: int, **options: Any) -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, encoding, exif=exif, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied_or_left_by_pixels_and_sizes_alike(root: Path, orientation: int) -> None:
    photo = Image.linear_gradient("L").resize((30, 20)).rotate(30).convert("RGB")
    for encoding, options in ENCODINGS:
        (root / "a").write_bytes(with_orientation(photo, encoding, 1, **options))
        stored = load_image("a", store=FolderStore(root))
        (root / "a").write_bytes(with_orientation(photo, encoding, orientation, **options))
        tag = Image.Exif()
        tag[0x0112] = orientation
        marked = stored.copy()
        marked.info["exif"] = tag.tobytes()
        kinds: list[str] = []
        assert check_image("a", store=FolderStore(root), kinds=kinds) is None
        assert kinds == ["exif_orientation"] * (orientation != 1), encoding
        for applied, expected in ((True, ImageOps.exif_transpose(marked)), (False, stored)):
            image = load_image("a", store=FolderStore(root), exif_orientation=applied)
            assert np.array_equal(image, expected), (encoding, applied)
            assert image_size("a", store=FolderStore(root), exif_orientation=applied) == image.size, (encoding, applied)
            assert np.array_equal(decode_image((root / "a").read_bytes(), "a", exif_orientation=applied), image)


def test_an_orientation_behind_the_pixels_of_a_png_is_found_without_decoding(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    plain = png_header(30, 20)
    (root / "a.png").write_bytes(plain[:-12] + chunk + plain[-12:])
    assert image_size("a.png", store=FolderStore(root)) == (20, 30)
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "PNG")
    (root / "a.png").write_bytes(file.getvalue()[:-12] + chunk + file.getvalue()[-12:])
    assert load_image("a.png", store=FolderStore(root)).size == image_size("a.png", store=FolderStore(root)) == (20, 30)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"nonsense"])
def test_damaged_exif_data_does_no_harm(root: Path, exif: bytes) -> None:
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.new("RGB", (30, 20)).save(root / name, exif=exif)
        assert check_image(name, store=FolderStore(root)) is None
        assert load_image(name, store=FolderStore(root)).size == image_size(name, store=FolderStore(root)) == (30, 20)


def test_kinds_of_images_are_told(root: Path) -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for name in ("pages.tif", "moving.gif", "moving.webp", "moving.png"):
        pages[0].save(root / name, save_all=True, append_images=pages[1:])
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(root / "deep.png")
    Image.new("CMYK", (8, 8)).save(root / "print.jpg")
    Image.new("RGBA", (8, 8), (0, 0, 0, 9)).save(root / "clear.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 255)).save(root / "opaque.png")
    expected = {
        **{name: ["several_pages"] for name in ("pages.tif", "moving.gif", "moving.webp", "moving.png")},
        "deep.png": ["deep_grey"],
        "print.jpg": ["cmyk"],
        "clear.png": ["transparent"],
        "opaque.png": [],
        "train/0.png": [],
    }
    for name, of_image in expected.items():
        kinds: list[str] = []
        assert check_image(name, store=FolderStore(root), kinds=kinds) is None
        assert kinds == image_kinds((root / name).read_bytes(), name) == of_image, name
        if "several_pages" in kinds:
            red, green, _ = np.asarray(load_image(name, store=FolderStore(root)))[4, 4]
            assert red > 240
            assert green < 15
    assert describe_kinds({"cmyk": 1, "several_pages": 1200}) == (
        "1,200 of several pages or frames, the first one used; 1 CMYK, converted to RGB"
    )


def test_grey_of_no_known_range_is_a_fault(root: Path) -> None:
    Image.fromarray(np.full((4, 4), -1, dtype=np.float32)).save(root / "a.tif")
    message = what_is_wrong("a.tif", root)
    assert "from -1 to -1, and it is unknown which value is white: 'a.tif' → scale the values" in message


UNREADABLE = {
    "photo.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC or HEIF photo", "heif-convert"),
    "photo.heif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a HEIC or HEIF photo", "JPEG"),
    "photo.cr3": (b"\0\0\0\x18ftypcrx \0\0\0\1", "a camera's raw file", "develops"),
    "photo.cr2": (b"II*\0\x10\0\0\0CR\2\0", "a camera's raw file", "develops"),
    "photo.raf": (b"FUJIFILMCCD-RAW 0201", "a camera's raw file", "develops"),
    "draw.svg": (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing", "rsvg-convert"),
    "scan.pdf": (b"%PDF-1.7\n", "a PDF document", "pdftoppm"),
    "a.psd": (b"8BPS\0\1", "a Photoshop file", "export"),
    "a.jxl": (b"\xff\x0a\0\0", "a JPEG XL image", "djxl"),
    "page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript file", "render"),
    "gone.jpg": (b"<!DOCTYPE html><html>404</html>", "a web page", "download"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_other_formats_are_named_with_what_to_do(root: Path, name: str) -> None:
    content, what, hint = UNREADABLE[name]
    (root / name).write_bytes(content)
    for level in ("decode", "header"):
        message = what_is_wrong(name, root, level)
        assert f"is {what}, which is not read here" in message
        assert hint in message


def test_the_thumbnail_of_a_raw_file_is_not_taken_for_the_photograph(root: Path) -> None:
    """DNG, NEF and ARW are TIFFs, and their first image is a small preview."""
    for name, tags in (("a.dng", {50706: b"\1\4\0\0"}), ("a.nef", {254: 1})):
        Image.new("RGB", (16, 12)).save(root / name, "TIFF", tiffinfo=tags)
        assert "is a camera's raw file, of which only a small preview can be read" in what_is_wrong(name, root)


@pytest.mark.parametrize(("asked", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_in_another_unicode_form(root: Path, drawing: Path, asked: str, on_disk: str) -> None:
    path = "Müller/Übersicht é.png"
    stored = root / unicodedata.normalize(on_disk, path)
    stored.parent.mkdir()
    stored.write_bytes(drawing.read_bytes())
    name = unicodedata.normalize(asked, path)
    assert not (root / name).exists()
    assert check_image(name, store=FolderStore(root)) is None
    assert load_image(name, store=FolderStore(root)).size == image_size(name, store=FolderStore(root))
    assert read_image(name, store=FolderStore(root)) == drawing.read_bytes()
    assert find_file(name, root) == stored
    (stored.parent / unicodedata.normalize(on_disk, "später.png")).write_bytes(drawing.read_bytes())
    assert (
        check_image(unicodedata.normalize(asked, "Müller/später.png"), store=FolderStore(root)) is None
    )  # the folder has changed
    assert "does not exist" in what_is_wrong(unicodedata.normalize(asked, "Müller/nö.png"), root)


def test_a_name_in_another_unicode_form_may_not_leave_the_root(root: Path, drawing: Path) -> None:
    (root / unicodedata.normalize("NFD", "ü.png")).symlink_to(drawing)
    assert "leaves the data root through a link" in what_is_wrong("ü.png", root)


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
    (root / "text.png").write_text("404 not found")
    os.mkfifo(root / "pipe.png")
    for level in ("decode", "header"):
        assert "is a folder" in what_is_wrong("train", root, level)
        assert "is an empty file" in what_is_wrong("empty.png", root, level)
        assert "is not an image that can be read" in what_is_wrong("text.png", root, level)
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
    assert check_image(f"a{suffix}", store=FolderStore(root), level="header") is None
    assert image_size(f"a{suffix}", store=FolderStore(root)) == (336, 336)


def test_damaged_bytes_inside_a_file(root: Path, drawing: Path) -> None:
    good = bytearray(drawing.read_bytes())
    start = good.index(b"IDAT") + 4
    good[start : start + 40] = b"\xff" * 40
    (root / "a.png").write_bytes(good)
    assert "is damaged (" in what_is_wrong("a.png", root)


@pytest.mark.parametrize(("size", "pixels"), [((60_000, 60_000), "3,600,000,000"), ((11_000, 11_000), "121,000,000")])
def test_an_image_bomb_is_refused_from_its_header(
    root: Path, size: tuple[int, int], pixels: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Above both of Pillow's limits, where it raises, and between them, where it warns."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", DEFAULT_MAX_PIXELS)
    (root / "bomb.png").write_bytes(png_header(*size))
    assert (root / "bomb.png").stat().st_size < 100
    for level in ("decode", "header"):
        assert f"{pixels} pixels, above the limit of 89,478,485: 'bomb.png'" in what_is_wrong("bomb.png", root, level)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert f"has {pixels} pixels" in what_is_wrong("bomb.png", root)
    assert check_image("bomb.png", store=FolderStore(root), max_pixels=10**10, level="header") is None


def test_the_pixel_limit_is_exact_and_never_lowers_pillows_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", DEFAULT_MAX_PIXELS)
    assert check_image("train/0.png", store=FolderStore(root), max_pixels=64 * 64) is None
    wrong = check_image("train/0.png", store=FolderStore(root), max_pixels=64 * 64 - 1)
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
    assert check_image("in.png", store=FolderStore(root)) is None
    linked_root = root.parent / "linked"
    linked_root.symlink_to(root)
    assert check_image("train/0.png", store=FolderStore(linked_root)) is None


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hosts", "a\\b.png", ""])
def test_paths_are_judged_before_the_disk_is_touched(root: Path, path: str) -> None:
    assert check_image(path, store=FolderStore(root), level="off") == check_image(path, store=FolderStore(root))
    with pytest.raises(UserError):
        load_image(path, store=FolderStore(root))


def test_off_never_looks_at_the_disk(root: Path) -> None:
    assert check_image("not/there.png", store=FolderStore(root), level="off") is None


def test_too_few_open_files_are_no_matter_of_permissions(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="Too many open files") as caught:
        load_image("train/0.png", store=FolderStore(root))
    assert "ulimit -n" in str(caught.value)
