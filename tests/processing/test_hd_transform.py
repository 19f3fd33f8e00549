"""Page geometry against the published rule, over many sizes, and the pixels of the page."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from PIL import Image

from phi3v.processing.hd_transform import CROP_SIZE, hd_transform, num_img_tokens, page_geometry

NUM_CROPS = (1, 2, 3, 4, 5, 6, 9, 12, 16)


def rule(width: int, height: int, num_crops: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The rule of DESIGN, step by step: size on the page, offset, (height, width) of the page."""
    tall = width < height
    if tall:
        width, height = height, width
    ratio = width / height
    scale = 1
    while scale * math.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    new_width = scale * 336
    new_height = int(new_width / ratio)
    padded = int(math.ceil(new_height / 336) * 336)
    top = int((padded - new_height) / 2)
    if tall:
        return (new_height, new_width), (top, 0), (new_width, padded)
    return (new_width, new_height), (0, top), (padded, new_width)


def sizes(count: int) -> list[tuple[int, int]]:
    """Sizes of all shapes: some that sit on a boundary, and random ones, spread over the logarithm of the sides."""
    chosen = random.Random(0)
    edges = [(1, 1), (336, 336), (337, 336), (336, 337), (672, 336), (335, 671), (1275, 1650), (4096, 1), (1, 300)]
    return edges + [(int(2 ** chosen.uniform(0, 13)), int(2 ** chosen.uniform(0, 13))) for _ in range(count)]


@pytest.mark.parametrize("num_crops", NUM_CROPS)
def test_geometry_is_the_published_rule(num_crops: int) -> None:
    for width, height in sizes(1500):
        resized, offset, size = rule(width, height, num_crops)
        if 0 in resized:  # where the reference itself crashes; see the next tests
            continue
        page = page_geometry(width, height, num_crops)
        assert (page.resized, page.offset, page.size) == (resized, offset, size), (width, height)


@pytest.mark.parametrize("num_crops", NUM_CROPS)
def test_page_holds_the_image_and_keeps_within_num_crops(num_crops: int) -> None:
    for width, height in sizes(500):
        page = page_geometry(width, height, num_crops)
        rows, columns = page.rows, page.columns
        assert 1 <= rows * columns <= num_crops, (width, height)
        assert min(page.resized) >= 1
        assert page.offset[0] + page.resized[0] <= columns * CROP_SIZE
        assert page.offset[1] + page.resized[1] <= rows * CROP_SIZE
        assert page.num_img_tokens == num_img_tokens(rows, columns) == (rows * columns + 1) * 144 + 1 + (rows + 1) * 12


def test_geometry_of_the_transpose_is_the_transpose() -> None:
    for width, height in sizes(500):
        if width == height:
            continue
        page, transposed = page_geometry(width, height, 16), page_geometry(height, width, 16)
        assert page.resized == transposed.resized[::-1]
        assert page.offset == transposed.offset[::-1]
        assert (page.rows, page.columns) == (transposed.columns, transposed.rows)


@pytest.mark.parametrize(
    ("size", "crops"), [((20000, 10), (1, 16)), ((10, 20000), (16, 1)), ((20000, 1), (1, 16)), ((1, 1), (4, 4))]
)
def test_extreme_ratios_give_a_page(size: tuple[int, int], crops: tuple[int, int]) -> None:
    page = hd_transform(Image.new("RGB", size, (10, 20, 30)), 16)
    assert (page.height // CROP_SIZE, page.width // CROP_SIZE) == crops
    assert (10, 20, 30) in {page.getpixel((page.width // 2, page.height // 2 - dy)) for dy in (0, 1)}


@pytest.mark.parametrize("num_crops", [0, -1])
def test_no_crop_is_an_error(num_crops: int) -> None:
    with pytest.raises(ValueError, match=rf"num_crops must be at least 1, got {num_crops}"):
        page_geometry(640, 480, num_crops)


@pytest.mark.parametrize("size", [(127, 165), (10, 900), (333, 334), (336, 700), (1, 3), (500, 2000)])
def test_a_tall_image_is_worked_on_as_its_transpose(size: tuple[int, int]) -> None:
    """To the bit, though nothing is turned over: the order of resizing columns and rows is what matters."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    flipped = Image.fromarray(pixels).transpose(Image.Transpose.TRANSPOSE)
    for num_crops in (1, 6):
        page = hd_transform(Image.fromarray(pixels), num_crops)
        expected = hd_transform(flipped, num_crops).transpose(Image.Transpose.TRANSPOSE)
        assert np.array_equal(np.asarray(page), np.asarray(expected))


def test_page_is_the_image_on_white() -> None:
    page = np.asarray(hd_transform(Image.new("RGB", (600, 200), (0, 0, 0)), 4))
    geometry = page_geometry(600, 200, 4)
    assert geometry.resized == (672 + 336, 336)
    assert (page == 0).all()
    page = np.asarray(hd_transform(Image.new("RGB", (500, 200), (0, 0, 0)), 1))
    (width, height), (left, top) = page_geometry(500, 200, 1).resized, page_geometry(500, 200, 1).offset
    assert (width, height, left, top) == (336, 134, 0, 101)
    inside = np.zeros(page.shape[:2], dtype=bool)
    inside[top : top + height, left : left + width] = True
    assert (page[inside] == 0).all()
    assert (page[~inside] == 255).all()
