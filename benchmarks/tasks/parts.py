"""What the stand-ins are drawn from, in parts that training and test do not share.

Photographs are split across their width. The pretrained base model has seen none of them: it learnt from others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from drawing import TASK_PHOTOS, choose, font_files, photo

Split = Literal["train", "val", "test"]
Rng = np.random.Generator
Colour = tuple[int, int, int]

SPLITS: tuple[Split, ...] = ("train", "val", "test")
COLOURS: dict[str, Colour] = {
    "red": (205, 30, 40),
    "green": (30, 140, 50),
    "blue": (30, 70, 200),
    "yellow": (245, 215, 50),
    "black": (20, 20, 20),
    "purple": (125, 45, 155),
    "orange": (240, 135, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BY_POINT = {True: ("triangle", "star"), False: ("circle", "ring")}  # pointed shapes, round shapes

# Of the width of a photograph.
_PHOTO = {"train": (0.0, 0.55), "val": (0.55, 0.7), "test": (0.7, 1.0)}
_SEEDS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Sizes:
    """How many pages, statements, memes or clips each split has."""

    train: int
    val: int
    test: int

    def of(self, split: Split) -> int:
        return {"train": self.train, "val": self.val, "test": self.test}[split]


def generators(seed: int, split: Split) -> Iterator[Rng]:
    """A generator for every item of a split, so that an item does not depend on how many there are."""
    return (np.random.default_rng([seed, _SEEDS[split], number]) for number in count())


def background(rng: Rng, split: Split, size: tuple[int, int], *, strength: float) -> Image.Image:
    """A part of a photograph, faded towards a pale shade: ``strength`` 1 is the photograph, 0 the shade."""
    image = photo(choose(rng, TASK_PHOTOS))
    low, high = (int(part * image.width) for part in _PHOTO[split])
    scale = rng.uniform(0.5, 1.0) * min((high - low) / size[0], image.height / size[1])
    width, height = int(size[0] * scale), int(size[1] * scale)
    left = low + int(rng.integers(high - low - width + 1))
    top = int(rng.integers(image.height - height + 1))
    part = image.resize(size, box=(left, top, left + width, top + height))
    shade = tuple(int(value) for value in rng.integers(190, 240, size=3))
    return Image.blend(Image.new("RGB", size, shade), part, strength)


def draw_shape(page: Image.Image, shape: str, colour: str, centre: tuple[float, float], radius: float) -> None:
    """A shape with a thin outline that keeps it visible on any ground."""
    draw, (x, y) = ImageDraw.Draw(page), centre
    fill, edge = COLOURS[colour], (90, 90, 90)
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=edge)
    elif shape == "ring":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=fill, width=int(radius * 0.3))
    else:
        draw.polygon([(x + radius * a, y + radius * b) for a, b in _outline(shape)], fill=fill, outline=edge)


def _outline(shape: str) -> list[tuple[float, float]]:
    if shape == "cross":
        a, b = 0.34, 0.95
        return [
            (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)
        ]  # fmt: skip
    corners, inner, turn = {"square": (4, 1.0, 0.125), "triangle": (3, 1.0, 0.0), "star": (10, 0.45, 0.0)}[shape]
    points = []
    for index in range(corners):
        angle = 2 * math.pi * (index / corners + turn) - math.pi / 2
        reach = inner if index % 2 else 1.0
        points.append((reach * math.cos(angle), reach * math.sin(angle)))
    return points


def any_font(rng: Rng) -> Path:
    path: Path = choose(rng, font_files())
    return path


def even_labels(rng: Rng, number: int, values: Iterable[Any]) -> list[Any]:
    """``number`` labels in random order, each value as often as the others (one more where it does not divide)."""
    values = list(values)
    labels = [values[index % len(values)] for index in range(number)]
    return [labels[index] for index in rng.permutation(number)]
