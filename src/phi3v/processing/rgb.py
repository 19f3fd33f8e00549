"""An image of any mode as RGB with 8 bits per channel: the only place that converts colours.

The result equals ``.convert("RGB")`` wherever that is right. It is wrong for grey values of more than 8 bits, which it
clips to white, and for transparency, which it drops so that the hidden colour shows.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags


class GreyRangeError(ValueError):
    """Grey values whose range, and so the value of white, is unknown."""


def is_deep_grey(image: Image.Image) -> bool:
    """Whether grey values have more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as RGB: deep grey scaled to 8 bits, transparency over white. A new image, unless it is RGB already.

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
    """The image as RGBA if any pixel is transparent, otherwise None."""
    if is_deep_grey(image) or not image.has_transparency_data:
        return None
    clear = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        # A PNG with 16 bits per channel, which Pillow reads as 8.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return None if rgba.getchannel("A").getextrema()[0] == 255 else rgba


def _scaled_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    lowest, highest = float(values.min()), float(values.max())
    tags = getattr(image, "tag_v2", {})
    white = _white(image, highest)
    if not 0 <= lowest <= highest <= white:  # also false for NaN
        raise GreyRangeError(f"has grey values from {lowest:g} to {highest:g}, and it is unknown which value is white")
    grey = np.rint(values * np.float32(255 / white)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _white(image: Image.Image, highest: float) -> int:
    """The value of white: from the depth of the file; for 32 bits, the smallest usual range that covers all values."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16 if image.mode.startswith("I;16") or image.format in ("PPM", "PNG") else 32,))
    if image.mode != "F" and bits[0] < 32:
        is_signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
        return int(2 ** (bits[0] - is_signed)) - 1
    ranges = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    return next((white for white in ranges if highest <= white), ranges[-1])
