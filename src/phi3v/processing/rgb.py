"""An image of any mode as RGB, 8 bits a channel: the one place where colours are converted.

Where ``.convert("RGB")`` gives right values, this is what it gives. It does not for grey values of more than 8 bits,
which it clips to white, nor for transparency, which it drops and so shows whatever colour lies under it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags


class GreyRangeError(ValueError):
    """Grey values of which nothing says what is white."""


def is_deep_grey(image: Image.Image) -> bool:
    """Whether grey values have more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as RGB: deeper grey scaled to 8 bits, transparency laid over white. A new image, unless it is RGB.

    Raises:
        GreyRangeError: grey values are negative, not finite, or above 16 bits.
    """
    if is_deep_grey(image):
        return _scaled_grey(image).convert("RGB")
    rgba = as_transparent(image)
    if rgba is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    page = Image.new("RGB", image.size, "white")
    page.paste(rgba, mask=rgba)
    return page


def as_transparent(image: Image.Image) -> Image.Image | None:
    """An image that is transparent anywhere, as RGBA; None of one that only could be."""
    if is_deep_grey(image) or not image.has_transparency_data:
        return None
    clear = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        # Of a PNG with 16 bits a channel, which Pillow reads as 8.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return None if rgba.getchannel("A").getextrema()[0] == 255 else rgba


def _scaled_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    lowest, highest = float(values.min()), float(values.max())
    tags = getattr(image, "tag_v2", {})
    white = _white(image, highest)
    if not 0 <= lowest <= highest <= white:  # also where one is not a number
        raise GreyRangeError(f"holds grey values from {lowest:g} to {highest:g}, and nothing says which is white")
    grey = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _white(image: Image.Image, highest: float) -> int:
    """The value of white: as the file's depth says; for 32 bits, which say nothing, of the least range that holds."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16 if image.mode.startswith("I;16") or image.format in ("PPM", "PNG") else 32,))
    if image.mode != "F" and bits[0] < 32:
        is_signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
        return int(2 ** (bits[0] - is_signed)) - 1
    ranges = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    return next((white for white in ranges if highest <= white), ranges[-1])
