"""The HD transform: an image of any mode and shape to its RGB page of 336 x 336 crops, and pages to crops.

Resizing and padding follow `HD_transform` and `padding_336` of the official ``processing_phi3_v.py``, with PIL instead
of torchvision (which calls PIL for PIL images), so the pixels are equal. Cutting, normalising and the global view run
on the device of the pages: the processor cuts on the CPU and returns ``pixel_values``; training and evaluation send
uint8 pages, a quarter of the bytes, and the model cuts them on its device. Only that needs torch, which is imported
there: exported graphs run without it.

Shapes: ``n`` pages of one size, ``r`` x ``c`` their rows and columns of crops, ``P`` pixels of all pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

PREPROCESSOR_CONFIG = "preprocessor_config.json"
CROP_SIZE = 336
TOKENS_PER_CROP = 144
PAD_COLOUR = (255, 255, 255)
# CLIP's statistics of the red, green and blue channel.
OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PageGeometry:
    """Position and size of an image on its page, in pixels; the page has ``rows`` x ``columns`` crops."""

    resized: tuple[int, int]  # width, height of the image on the page
    offset: tuple[int, int]  # left, top
    rows: int
    columns: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the page, as in ``image_sizes``."""
        return self.rows * CROP_SIZE, self.columns * CROP_SIZE

    @property
    def num_img_tokens(self) -> int:
        return num_img_tokens(self.rows, self.columns)

    @property
    def num_distinct_crops(self) -> int:
        return num_distinct_crops(self.rows, self.columns)


def num_img_tokens(rows: int, columns: int) -> int:
    """Tokens of an image of rows x columns crops: page, separator, global view, one line end per row of patches."""
    return (rows * columns + 1) * TOKENS_PER_CROP + 1 + (rows + 1) * 12


def num_distinct_crops(rows: int, columns: int) -> int:
    """Crops of an image without duplicates: the global view and the page; a page of one crop is its own global view."""
    return 1 if rows * columns == 1 else 1 + rows * columns


def page_geometry(width: int, height: int, num_crops: int) -> PageGeometry:
    """The page of a ``width`` x ``height`` image with at most ``num_crops`` crops.

    A tall image is processed as its transpose. The scale (crops along the long side) is the largest with
    ``scale * ceil(scale / ratio) <= num_crops``.

    Raises:
        ValueError: ``num_crops`` below 1.
    """
    if num_crops < 1:
        raise ValueError(f"num_crops must be at least 1, got {num_crops}")
    if width < height:
        upright = page_geometry(height, width, num_crops)
        return PageGeometry(upright.resized[::-1], upright.offset[::-1], upright.columns, upright.rows)
    ratio = width / height
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
        scale += 1
    new_width = scale * CROP_SIZE
    # The reference gets a height of zero (and crashes) for images over `new_width` times wider than high.
    new_height = max(1, int(new_width / ratio))
    rows = math.ceil(new_height / CROP_SIZE)
    top = int((rows * CROP_SIZE - new_height) / 2)
    return PageGeometry((new_width, new_height), (0, top), rows, scale)


def hd_transform(image: Image.Image, num_crops: int) -> Image.Image:
    """``image`` (RGB) resized and padded with white to its page; the result's sides are multiples of 336."""
    geometry = page_geometry(*image.size, num_crops)
    new_width, new_height = geometry.resized
    if image.width < image.height:
        # PIL resizes rows, then columns, with rounding in between. The reference works on the transpose, so a tall
        # image is resized columns first; two calls do that without transposing.
        image = image.resize((image.width, new_height), Image.Resampling.BILINEAR)
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    height, width = geometry.size
    page = Image.new("RGB", (width, height), PAD_COLOUR)
    page.paste(resized, geometry.offset)
    return page


def to_page(image: Image.Image, num_crops: int) -> torch.Tensor:
    """An RGB image resized and padded to its page, uint8 (height, width, 3), both multiples of 336."""
    import torch

    return torch.from_numpy(np.array(hd_transform(image, num_crops)))


def _channel_values(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """(3, 1, 1) float32, on the device without waiting for it."""
    import torch

    return torch.tensor(values, dtype=torch.float32)[:, None, None].to(device, non_blocking=True)


def _normalised(pages: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """float32 (n, 3, height, width) of pages (n, height, width, 3)."""
    pixels = pages.permute(0, 3, 1, 2).float().div_(255)
    return pixels.sub_(_channel_values(mean, pages.device)).div_(_channel_values(std, pages.device))


def cut_pages(
    pages: torch.Tensor, mean: Sequence[float] = OPENAI_CLIP_MEAN, std: Sequence[float] = OPENAI_CLIP_STD
) -> torch.Tensor:
    """The crops of pages of one size, equal to those of the official processor.

    Sub-crops are bit-identical on every device: one subtraction and two divisions in float32. The global view is a
    bicubic resize, whose summation order depends on the device: it agrees within 1e-5 (values reach 2.7).

    Args:
        pages: (n, r * 336, c * 336, 3) uint8.
        mean, std: of each channel, for values in 0..1.

    Returns:
        float32 (n, 1 + r * c, 3, 336, 336), global view first, then the page's crops row by row.
    """
    from torch.nn import functional

    n, height, width, _ = pages.shape
    pixels = _normalised(pages, mean, std)
    # Without antialias, as in the reference.
    view = functional.interpolate(pixels, size=(CROP_SIZE, CROP_SIZE), mode="bicubic")  # [n, 3, 336, 336]
    rows, columns = height // CROP_SIZE, width // CROP_SIZE
    crops = pixels.new_empty(n, 1 + rows * columns, 3, CROP_SIZE, CROP_SIZE)
    crops[:, 0] = view
    grid = pixels.view(n, 3, rows, CROP_SIZE, columns, CROP_SIZE).permute(0, 2, 4, 1, 3, 5)
    crops[:, 1:].view(n, rows, columns, 3, CROP_SIZE, CROP_SIZE).copy_(grid)
    return crops


def flatten_pages(pages: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pages (height, width, 3) of any sizes as one tensor (P, 3), in order, for a single copy to the device."""
    import torch

    return torch.cat([page.reshape(-1, 3) for page in pages])


def cut_flat_pages(pages: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The distinct crops of pages of any sizes, normalised with CLIP's statistics.

    A page of one crop is bit-identical to its global view and is included once.

    Args:
        pages: (P, 3) uint8, from `flatten_pages`.
        sizes: (height, width) of each page in pixels, multiples of 336.

    Returns:
        float32 (crops of all pages, 3, 336, 336): for each page the global view, then its crops row by row,
        ``num_distinct_crops`` in all.

    Raises:
        ValueError: the number of pixels does not match ``sizes``.
    """
    import torch

    lengths = [height * width for height, width in sizes]
    if pages.shape[0] != sum(lengths):
        raise ValueError(f"the pages have {pages.shape[0]} pixels, but their sizes {list(sizes)} have {sum(lengths)}")
    flat = pages.split(lengths)
    # Pages of one size are cut together.
    places: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        places.setdefault(size, []).append(index)
    crops: list[torch.Tensor] = [pages] * len(sizes)
    for size, indices in places.items():
        alike = torch.stack([flat[i].view(*size, 3) for i in indices])
        if size == (CROP_SIZE, CROP_SIZE):
            cuts = _normalised(alike, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)[:, None]
        else:
            cuts = cut_pages(alike)
        for index, cut in zip(indices, cuts, strict=True):
            crops[index] = cut
    return torch.cat(crops)


# Colours: as ``.convert("RGB")`` wherever that is right. It is wrong for grey values of more than 8 bits, which it
# clips to white, and for transparency, which it drops so that the hidden colour shows.

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


# Pixel formats that Pillow reads by itself. Others stay out: EPS, for one, runs Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "JPEG2000", "PPM", "TGA")


def open_pixels(file: str | Path | BinaryIO) -> Image.Image:
    """`Image.open` for `FORMATS`."""
    Image.init()
    # MPO is opened as JPEG, and a Pillow may be built without a codec.
    return Image.open(file, formats=[known for known in FORMATS if known in Image.OPEN])


class ImageAlignmentError(ValueError):
    """Placeholders and images do not fit together; the message gives both counts and where.

    It starts with the words by which trainers of other libraries know what went wrong.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"Image features and image tokens do not match: {what}")


def image_runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """(number of the image, placeholder tokens) of every run of an image id, in order."""
    return [(-token, len(list(run))) for token, run in groupby(ids) if token < 0]


def check_image_runs(runs: Sequence[tuple[int, int]], image_sizes: Sequence[tuple[int, int]], where: str) -> None:
    """Check that every run of placeholders is as long as its image has tokens.

    Args:
        runs: as of `image_runs`.
        image_sizes: padded (height, width) of each image in pixels.
        where: the record or row, for the message.

    Raises:
        ImageAlignmentError: otherwise.
    """
    if len(runs) != len(image_sizes):
        raise ImageAlignmentError(f"{where} has placeholders for {len(runs)} images but {len(image_sizes)} images")
    for (number, length), (height, width) in zip(runs, image_sizes, strict=True):
        expected = num_img_tokens(height // CROP_SIZE, width // CROP_SIZE)
        if length != expected:
            raise ImageAlignmentError(
                f"{where}: image {number} has {length} placeholder tokens but {expected} features "
                f"({height} x {width} pixels)"
            )


def check_image_alignment(input_ids: torch.Tensor, image_sizes: Sequence[tuple[int, int]]) -> None:
    """Check that every run of an image's negative id in ``input_ids`` (B, T) is as long as its image has tokens.

    Raises:
        ImageAlignmentError: otherwise.
    """
    rows = [image_runs(ids) for ids in input_ids.clamp(max=0).tolist()]
    given = sum(map(len, rows))
    if given != len(image_sizes):
        raise ImageAlignmentError(
            f"the batch has placeholders for {given} images but {len(image_sizes)} images were given "
            f"(images per row: {dict(enumerate(map(len, rows)))})"
        )
    sizes = iter(image_sizes)
    for row, runs in enumerate(rows):
        check_image_runs(runs, [next(sizes) for _ in runs], f"row {row}")
