"""A stand-in of NLVR2: pairs of pictures, and statements about both that are true or false.

A picture shows one coloured shape on a part of a photograph. Every statement is asked about four pairs (in training
eight), true of half of them and false of the others, so that the statement alone says nothing; no statement of ``dev``
or ``test1`` is one of ``train``. Written as the dataset is distributed: ``data/{train,dev,test1}.json`` with one
example a line (``identifier`` is split-set-pair-sentence) and the pictures in ``images/train/DIRECTORY``,
``images/dev`` and ``images/test1``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from drawing import choose
from tasks.parts import COLOURS, SHAPES, SPLITS, Rng, Sizes, Split, background, draw_shape, generators

SIDE = 224
NAMES = {"train": "train", "val": "dev", "test": "test1"}  # the dataset's names of the splits
PAIRS_A_STATEMENT = {"train": 8, "val": 4, "test": 4}
NEAR = 0.25  # how often a thing that does not fit has the shape or the colour of one that does

# What a statement claims, and whether it is true given that the thing is in the (left, right) picture.
FORMS: dict[str, Callable[[bool, bool], bool]] = {
    "There is {} in the left image.": lambda left, right: left,
    "There is {} in the right image.": lambda left, right: right,
    "Each image contains {}.": lambda left, right: left and right,
    "At least one image contains {}.": lambda left, right: left or right,
}


@dataclass(frozen=True)
class Thing:
    """A coloured shape."""

    shape: str
    colour: str

    def fits(self, phrase: str) -> bool:
        return phrase in (_a(self.shape), _a(f"{self.colour} shape"), _a(f"{self.colour} {self.shape}"))


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


THINGS = [Thing(shape, colour) for shape in SHAPES for colour in COLOURS]
PHRASES = [
    *(_a(shape) for shape in SHAPES),
    *(_a(f"{colour} shape") for colour in COLOURS),
    *(_a(f"{colour} {shape}") for shape in SHAPES for colour in COLOURS),
]


def make(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write the stand-in into ``folder``; ``sizes`` counts statements."""
    statements = list(itertools.product(FORMS, PHRASES))
    order = np.random.default_rng(seed).permutation(len(statements))
    wanted = sum(map(sizes.of, SPLITS))
    if wanted > len(statements):
        raise ValueError(f"{wanted} statements are wanted, there are {len(statements)}")
    chosen = iter(order)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        with (folder / "data" / f"{NAMES[split]}.json").open("w", encoding="utf-8") as file:
            for group, rng in zip(range(sizes.of(split)), generators(seed, split), strict=False):
                form, phrase = statements[next(chosen)]
                for example in _examples(folder, split, group, form, phrase, rng):
                    file.write(json.dumps(example) + "\n")


def _examples(folder: Path, split: Split, group: int, form: str, phrase: str, rng: Rng) -> list[dict[str, object]]:
    """One statement about its pairs; the pictures are written."""
    name = NAMES[split]
    directory = group % 100  # as the training pictures are spread
    images = folder / "images" / (f"train/{directory}" if split == "train" else name)
    images.mkdir(parents=True, exist_ok=True)
    examples = []
    for pair, label in enumerate(rng.permutation([True, False] * (PAIRS_A_STATEMENT[split] // 2))):
        for side, thing in enumerate(_pair(rng, form, phrase, bool(label))):
            _draw(rng, split, thing).save(images / f"{name}-{group}-{pair}-img{side}.png")
        example: dict[str, object] = {
            "identifier": f"{name}-{group}-{pair}-0",
            "sentence": form.format(phrase),
            "label": str(bool(label)),
            "left_url": f"{name}-{group}-{pair}-img0",
            "right_url": f"{name}-{group}-{pair}-img1",
            "synset": "figure",
            "query": phrase,
        }
        examples.append(example | ({"directory": directory} if split == "train" else {}))
    return examples


def _pair(rng: Rng, form: str, phrase: str, label: bool) -> tuple[Thing, Thing]:
    """Two things of which the statement is true or false, every way of that as likely as the others.

    A thing that does not fit has at times (`NEAR`) the shape or the colour of one that does.
    """
    ways = [way for way in itertools.product((True, False), repeat=2) if FORMS[form](*way) == label]
    left, right = choose(rng, ways)
    return _thing(rng, phrase, left), _thing(rng, phrase, right)


def _thing(rng: Rng, phrase: str, fits: bool) -> Thing:
    fitting = [thing for thing in THINGS if thing.fits(phrase)]
    if fits:
        return choose(rng, fitting)
    model = choose(rng, fitting)
    others = [thing for thing in THINGS if not thing.fits(phrase)]
    near = [thing for thing in others if thing.shape == model.shape or thing.colour == model.colour]
    return choose(rng, near if rng.random() < NEAR else others)


def _draw(rng: Rng, split: Split, thing: Thing) -> Image.Image:
    page = background(rng, split, (SIDE, SIDE), strength=rng.uniform(0.0, 0.5))
    x, y = SIDE / 2 + rng.uniform(-0.08, 0.08, size=2) * SIDE
    draw_shape(page, thing.shape, thing.colour, (x, y), SIDE * rng.uniform(0.28, 0.4))
    return page
