"""A stand-in of NLVR2: pairs of pictures, and statements about both that are true or false.

A picture shows one coloured shape, pointed or round, on a part of a photograph. A set of pairs, four as in the dataset
(eight in training), is asked about with one of four statements, true of half of its pairs and false of the others, so
that the statement alone says nothing. Written as the dataset is distributed: ``data/{train,dev,test1}.json`` with one
example a line (``identifier`` is split-set-pair-sentence) and the pictures in ``images/train/DIRECTORY``,
``images/dev`` and ``images/test1``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from drawing import choose
from tasks.parts import BY_POINT, COLOURS, SPLITS, Rng, Sizes, Split, background, draw_shape, even_labels, generators

SIDE = 224
NAMES = {"train": "train", "val": "dev", "test": "test1"}  # the dataset's names of the splits
PAIRS_A_SET = {"train": 8, "val": 4, "test": 4}

# What a statement claims, and whether it is true given that the (left, right) picture shows a pointed shape.
STATEMENTS: dict[str, Callable[[bool, bool], bool]] = {
    "There is a pointed shape in the left image.": lambda left, right: left,
    "There is a pointed shape in the right image.": lambda left, right: right,
    "Each image contains a pointed shape.": lambda left, right: left and right,
    "At least one image contains a pointed shape.": lambda left, right: left or right,
}


def make(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write the stand-in into ``folder``; ``sizes`` counts sets of pairs."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        statements = even_labels(np.random.default_rng([seed, 9]), sizes.of(split), STATEMENTS)
        with (folder / "data" / f"{NAMES[split]}.json").open("w", encoding="utf-8") as file:
            for number, (statement, rng) in enumerate(zip(statements, generators(seed, split), strict=False)):
                for example in _examples(folder, split, number, statement, rng):
                    file.write(json.dumps(example) + "\n")


def _examples(folder: Path, split: Split, number: int, statement: str, rng: Rng) -> list[dict[str, object]]:
    """One statement about the pairs of a set; the pictures are written."""
    name = NAMES[split]
    directory = number % 100  # as the training pictures are spread
    images = folder / "images" / (f"train/{directory}" if split == "train" else name)
    images.mkdir(parents=True, exist_ok=True)
    examples = []
    for pair, label in enumerate(even_labels(rng, PAIRS_A_SET[split], (True, False))):
        for side, pointed in enumerate(_pair(rng, statement, label)):
            _draw(rng, split, pointed).save(images / f"{name}-{number}-{pair}-img{side}.png")
        example: dict[str, object] = {
            "identifier": f"{name}-{number}-{pair}-0",
            "sentence": statement,
            "label": str(label),
            "left_url": f"{name}-{number}-{pair}-img0",
            "right_url": f"{name}-{number}-{pair}-img1",
            "synset": "figure",
            "query": "a pointed shape",
        }
        examples.append(example | ({"directory": directory} if split == "train" else {}))
    return examples


def _pair(rng: Rng, statement: str, label: bool) -> tuple[bool, bool]:
    """Which pictures show a pointed shape so that the statement has the label: every way as likely as the others."""
    holds = STATEMENTS[statement]
    return choose(rng, [way for way in itertools.product((True, False), repeat=2) if holds(*way) == label])


def _draw(rng: Rng, split: Split, pointed: bool) -> Image.Image:
    page = background(rng, split, (SIDE, SIDE), strength=rng.uniform(0.0, 0.5))
    x, y = SIDE / 2 + rng.uniform(-0.08, 0.08, size=2) * SIDE
    shape, colour = choose(rng, BY_POINT[pointed]), choose(rng, list(COLOURS))
    draw_shape(page, shape, colour, (x, y), SIDE * rng.uniform(0.28, 0.4))
    return page
