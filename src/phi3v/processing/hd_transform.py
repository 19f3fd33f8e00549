"""The HD transform: resizes and pads an image of any shape to a page of 336 x 336 crops.

Follows `HD_transform` and `padding_336` of the official ``processing_phi3_v.py``, with PIL instead of torchvision
(which calls PIL for PIL images), so the pixels are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

CROP_SIZE = 336
TOKENS_PER_CROP = 144
PAD_COLOUR = (255, 255, 255)


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
