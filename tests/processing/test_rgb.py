"""Colours are converted as the file's depth and transparency say."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from phi3v import Phi3VImageProcessor
from phi3v.processing.hd_transform import GreyRangeError, to_rgb

RAMP = np.linspace(0, 65535, 200).reshape(10, 20)  # of 16 bits
AS_8_BITS = np.rint(RAMP / 257).astype(np.uint8)


def stored(image: Image.Image, encoding: str, **options: Any) -> Image.Image:
    """The image as it comes from a file."""
    file = io.BytesIO()
    image.save(file, encoding, **options)
    return Image.open(file)


def grey(image: Image.Image) -> npt.NDArray[np.uint8]:
    rgb = np.asarray(to_rgb(image))
    assert (rgb == rgb[..., :1]).all()
    return np.asarray(rgb[..., 0])


@pytest.mark.parametrize("encoding", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_of_grey_become_8(encoding: str) -> None:
    image = stored(Image.fromarray(np.rint(RAMP).astype(np.uint16)), encoding)
    assert np.array_equal(grey(image), AS_8_BITS)
    dark = stored(Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)), encoding)
    assert (grey(dark) == 1).all()  # by the file's depth, not by what is in it


def test_big_endian_grey() -> None:
    image = Image.frombytes("I;16B", (20, 10), np.rint(RAMP).astype(">u2").tobytes())
    assert np.array_equal(grey(image), AS_8_BITS)
    assert np.array_equal(grey(stored(image, "TIFF")), AS_8_BITS)


def test_grey_whose_white_is_zero() -> None:
    image = stored(Image.fromarray(np.rint(RAMP).astype(np.uint16)), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(grey(image), 255 - AS_8_BITS)


@pytest.mark.parametrize(("mode", "white"), [("I", 255), ("I", 65535), ("F", 1), ("F", 255), ("F", 65535)])
def test_32_bits_are_of_the_least_range_that_holds_them(mode: str, white: int) -> None:
    values = RAMP / 65535 * white
    image = Image.fromarray(values.astype(np.float32) if mode == "F" else np.rint(values).astype(np.int32))
    assert np.abs(grey(stored(image, "TIFF")).astype(int) - AS_8_BITS).max() <= 1


@pytest.mark.parametrize("values", [RAMP - 1, RAMP * 9, RAMP * np.nan])
def test_grey_of_no_known_range_is_refused(values: npt.NDArray[np.float64]) -> None:
    with pytest.raises(GreyRangeError, match="it is unknown which value is white"):
        to_rgb(Image.fromarray(values.astype(np.float32)))


def clear_left_half(mode: str) -> Image.Image:
    """Black, and transparent on the left."""
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 2))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    image = clear_left_half("RGBA")
    image = image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [255, 255, 0, 0]


def test_half_transparency_is_blended() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize(("mode", "clear"), [("P", 0), ("L", 0), ("RGB", (0, 0, 0)), ("1", 0), ("I;16", 0)])
def test_a_colour_that_stands_for_transparency(mode: str, clear: Any) -> None:
    image = Image.new("L", (4, 2), 100)
    image.paste(0, (0, 0, 2, 2))
    if mode == "P":
        image.putpalette([0, 0, 0] + [100, 100, 100] * 255)
    else:
        image = image.convert("L").convert(mode) if mode != "1" else image.point(lambda value: 255 * (value > 0), "1")
    read = stored(image, "PNG", transparency=clear)
    assert read.mode == mode
    row = np.asarray(to_rgb(read))[0, :, 0].tolist()
    assert row[:2] == [255, 255]
    assert row[2:] != [255, 255] or mode == "1"


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "RGBX", "PA"])
def test_other_modes_are_as_the_library_converts_them(mode: str) -> None:
    image = Image.linear_gradient("L").convert("RGB").convert("L" if mode in ("LA", "PA") else "RGB").convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_rgb_is_not_touched() -> None:
    image = Image.radial_gradient("L").convert("RGB")
    assert to_rgb(image) is image


def test_cmyk_of_a_jpeg_is_not_inverted() -> None:
    for colour in ((0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)):
        read = stored(Image.new("CMYK", (16, 16), colour), "JPEG", quality=95)
        expected = Image.new("CMYK", (1, 1), colour).convert("RGB")
        assert np.abs(np.asarray(to_rgb(read))[8, 8].astype(int) - np.asarray(expected)[0, 0]).max() <= 3


def test_the_processor_converts_likewise() -> None:
    processor = Phi3VImageProcessor(num_crops=1)
    deep = Image.fromarray(np.full((8, 8), 30000, dtype=np.uint16))
    for image in (deep, clear_left_half("RGBA").resize((8, 8)), stored(clear_left_half("P"), "PNG")):
        assert np.array_equal(processor.page(image), processor.page(to_rgb(image)))
        assert processor(image)["pixel_values"].equal(processor(to_rgb(image))["pixel_values"])


def test_16_bits_a_channel_with_a_transparent_colour() -> None:
    """Pillow reads 8 of them, and the transparent colour with all 16."""
    image = stored(Image.new("RGB", (2, 1), (200, 100, 50)), "PNG")
    image.load()
    image.info["transparency"] = (200 * 257, 100 * 257, 50 * 257)
    assert np.asarray(to_rgb(image)).min() == 255
