"""What may be given to a chat, and where it listens."""

from __future__ import annotations

import socket
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from sample_files import clip, image_bytes

from phi3v.cli import main
from phi3v.errors import UserError
from phi3v.serve.address import Address, free_port
from phi3v.serve.limits import LIMITS, Limits
from phi3v.serve.media import read_media


def test_pictures_and_clips_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    media = read_media([clip(tmp_path / "film.avi"), tmp_path / "a.png"], frames=5)
    assert [(each.name, each.is_clip, len(each.images)) for each in media] == [
        ("film.avi", True, 5),
        ("a.png", False, 1),
    ]


@pytest.mark.parametrize(
    ("name", "limits", "words"),
    [
        ("a.png", {"file_mb": 1e-5}, "is larger than 1e-05 MB"),
        ("a.png", {"pixels": 100}, "above the limit of 100"),
        ("a.png", {"total_pixels": 10}, "have more than 10 pixels together"),
        ("film.avi", {"clip_frames": 11}, "is too long: 12 frames"),
        ("film.avi", {"pixels": 3071}, "frames of 64x48"),
        ("film.avi", {"frames": 7}, "between 1 and 7"),
        ("a.txt", {}, "is not an image"),
        ("broken.mp4", {}, "cannot be decoded"),
        ("folder", {}, "is not a file"),
        ("missing.png", {}, "cannot be read"),
    ],
)
def test_limits_name_the_file_but_not_its_folder(name: str, limits: dict[str, int], words: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "broken.mp4").write_bytes(b"secret" * 100)
    (tmp_path / "folder").mkdir()
    clip(tmp_path / "film.avi")
    with pytest.raises(UserError) as error:
        read_media([tmp_path / name], frames=8, limits=replace(LIMITS, **limits))
    assert words in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_a_huge_picture_is_refused_by_its_header(tmp_path: Path) -> None:
    content = bytearray(image_bytes(1))
    content[16:24] = struct.pack(">II", 30_000, 30_000)  # width and height in a PNG's first chunk
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(UserError, match="900,000,000 pixels"):
        read_media([tmp_path / "bomb.png"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("https://example.com/page.png", "https://example.com/page.png: is an address, and nothing is fetched"),
        ("HTTP://example.com/a.png", "http://example.com/a.png: is an address"),
        ("s3://bucket/page.png", "s3://bucket/page.png: is an address"),
        ("file:///tmp/page.png", "name it as /tmp/page.png"),
        ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUg", "write its content to a file"),
    ],
)
def test_an_address_is_no_file(name: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        read_media([Path(name)])
    assert words in str(error.value)


def test_a_limit_is_an_option(tmp_path: Path, small_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    images = [part for _ in range(3) for part in ("--image", str(tmp_path / "a.png"))]
    ask = ["chat", str(small_model_dir), "--prompt", "hello", "--max-new-tokens", "1", "--num-crops", "1", *images]
    for name, value, words in (
        ("--max-images", 2, "3 images and frames are too many"),
        ("--max-characters", 4, "the question is too long: 5 characters"),
        ("--max-file-mb", 1e-5, "is larger than"),
        ("--max-frames", 0, "must be above 0"),
    ):
        assert main([*ask, name, str(value)]) == 2
        shown = capsys.readouterr().err
        assert words in shown
        assert name in shown
    assert main([*ask, "--max-images", "3", "--max-characters", "5"]) == 0


def test_twenty_pages_are_no_exception(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    assert len(read_media([tmp_path / "a.png"] * 64)) == 64
    with pytest.raises(UserError, match="65 images"):
        read_media([tmp_path / "a.png"] * 65)
    assert len(read_media([tmp_path / "a.png"] * 65, limits=Limits(images=65))) == 65


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.com"])
def test_others_need_a_password(host: str) -> None:
    with pytest.raises(UserError, match="there is no password"):
        Address(host)
    assert "long enough" not in repr(Address(host, password="long enough"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    assert Address(host).is_loopback


def test_a_port_that_is_taken_gives_way_to_the_next() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < free_port("127.0.0.1", port) < port + 50
    with pytest.raises(UserError, match="no such address"):
        free_port("no.such.host.invalid", 7860)
    with pytest.raises(UserError, match="cannot listen there"):
        free_port("192.0.2.1", 7860)  # an address for documentation: nobody's


def test_the_orientation_of_a_photograph_is_that_of_the_run(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    for applied, size in ((True, (20, 30)), (False, (30, 20))):
        (media,) = read_media([tmp_path / "a.jpg"], exif_orientation=applied)
        assert media.images[0].size == size


def test_a_limit_of_pixels_is_named_with_its_option(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    with pytest.raises(UserError, match="raise --max-pixels"):
        read_media([tmp_path / "a.png"], limits=replace(LIMITS, pixels=10))
