"""Images as people have them, through the real command line: what is read otherwise is counted, the rest is named."""

from __future__ import annotations

import base64
import io
import json
import unicodedata
from pathlib import Path

import pytest
from own_files import Convert, converter, save_images
from PIL import Image
from sample_files import image_bytes

from phi3v.cli import main


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    return converter(tmp_path, capsys)


def save_kinds(folder: Path) -> None:
    """An image of each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.save(folder / "turned.jpg", exif=exif)
    plain.save(folder / "pages.tif", save_all=True, append_images=[plain])
    Image.new("RGBA", (8, 8), (0, 0, 0, 9)).save(folder / "clear.png")
    plain.convert("CMYK").save(folder / "print.jpg")
    Image.new("I;16", (8, 8), 30000).save(folder / "deep.png")


KINDS = {"exif_orientation": 1, "several_pages": 1, "transparent": 1, "cmyk": 1, "deep_grey": 1}


def write_table(folder: Path, *paths: str) -> Path:
    file = folder / "t.csv"
    file.write_text("image,question,answer\n" + "".join(f"{path},what?,that\n" for path in paths), encoding="utf-8")
    return file


def test_kinds_are_summed_up_by_convert_and_by_check(
    tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    save_kinds(tmp_path)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    table = write_table(tmp_path, *names, *names)  # each image once, however many records name it
    assert convert("csv", table).said["image_kinds"] == KINDS
    again = convert("csv", table)
    assert again.said["image_kinds"] == KINDS
    assert again.said["images_kept"] == len(names)
    file = str(tmp_path / "out" / "train.jsonl")
    assert main(["data", "check", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image_kinds"] == KINDS
    assert main(["data", "check", file]) == 0
    told = capsys.readouterr().out
    assert "of these 1 turned by the EXIF orientation; 1 transparent, laid over white; 1 of several pages" in told
    assert main(["data", "convert", "csv", "--source", str(table), "--out", str(tmp_path / "out")]) == 0
    assert "of these 1 turned by the EXIF orientation" in capsys.readouterr().out


def test_an_image_that_becomes_png_keeps_its_orientation_as_a_tag(tmp_path: Path, convert: Convert) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (24, 16)).save(file, "WEBP", exif=exif)
    uri = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    rows = [{"image": uri, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}]
    (tmp_path / "l.json").write_text(json.dumps(rows), encoding="utf-8")
    result = convert("llava", tmp_path / "l.json")
    with Image.open(result.out / "images" / result.turn()["images"][0]) as image:
        assert (image.size, image.getexif()[0x0112]) == ((24, 16), 6)


@pytest.mark.parametrize("bad", ["photo.heic", "draw.svg", "scan.PDF", "raw.dng"])
def test_an_unreadable_image_in_a_folder_is_refused_by_name(tmp_path: Path, convert: Convert, bad: str) -> None:
    save_images(tmp_path / "in", "cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg")
    (tmp_path / "in" / "cat" / bad).write_bytes(b"\0\0\0\x18ftypheic")
    result = convert("image-folder", tmp_path / "in")
    assert result.code == 2
    assert f"cat/{bad}" in result.error
    assert "a HEIC or HEIF photo" in result.error
    skipped = convert("image-folder", tmp_path / "in", "--on-bad", "skip", out="skip").said
    assert [Path(unit["place"]).name for unit in skipped["skipped_units"]] == [bad]


def test_what_systems_leave_in_folders_is_no_news(tmp_path: Path, convert: Convert) -> None:
    save_images(tmp_path / "in", "cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg")
    for name in (".DS_Store", "cat/._1.jpg", "cat/Thumbs.db", "dog/desktop.ini", "__MACOSX/cat/1.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    assert convert("image-folder", tmp_path / "in").notes == ""


@pytest.mark.parametrize(("asked", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_unicode_form_are_found(tmp_path: Path, convert: Convert, asked: str, on_disk: str) -> None:
    name = "Müller/Rechnung ü.png"
    stored = unicodedata.normalize(on_disk, name)
    save_images(tmp_path, stored)
    result = convert("csv", write_table(tmp_path, unicodedata.normalize(asked, name)))
    assert result.turn()["images"] == [stored]  # as the disk spells it, and as it is copied


def test_class_names_are_in_the_composed_form(tmp_path: Path, convert: Convert) -> None:
    save_images(tmp_path / "in", *(f"{unicodedata.normalize('NFD', c)}/{k}.png" for c in ("Bär", "Kühe") for k in "12"))
    result = convert("image-folder", tmp_path / "in")
    assert {turn["assistant"] for turn in result.turns()} == {"Bär", "Kühe"}
    assert "Bär, Kühe" in result.turn()["user"]


@pytest.mark.parametrize(
    "path", ["photos\\a\\2.png", "photos/a\\2.png", ".\\photos\\a/2.png", "photos\\b\\..\\a\\2.png"]
)
def test_paths_of_windows_are_found(tmp_path: Path, convert: Convert, path: str) -> None:
    save_images(tmp_path, "photos/a/2.png")
    assert convert("csv", write_table(tmp_path, path)).turn()["images"] == ["photos/a/2.png"]


@pytest.mark.parametrize(
    "path", ["..\\secret.png", "a\\..\\..\\secret.png", "C:\\secret.png", "\\secret.png", "\\\\h\\s.png"]
)
def test_paths_of_windows_may_not_leave_the_folder(tmp_path: Path, convert: Convert, path: str) -> None:
    save_images(tmp_path, "secret.png", "in/a/1.png")
    result = convert("csv", write_table(tmp_path / "in", path))
    assert result.code == 2
    assert "leaves the data root" in result.error or "is an absolute path" in result.error


def test_a_limit_is_named_with_the_option_that_raises_it(tmp_path: Path, convert: Convert) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(0))
    table = write_table(tmp_path, "a.png")
    result = convert("csv", table, "--max-pixels", "100")
    assert result.code == 2
    assert "--max-pixels" in result.error
    assert "data.max_image_pixels" in result.error
    assert convert("csv", table, "--max-pixels", "384").code == 0
