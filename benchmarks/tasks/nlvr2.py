"""A stand-in of NLVR2: pairs of pictures, and statements about both that are true or false.

A picture shows one coloured shape, pointed or round, on a part of a photograph. A set of pairs, four as in the dataset
(eight in training), is asked about with one statement, true of half of its pairs and false of the others, so that the
statement alone says nothing. There are four claims; every set words its claim in a way of its own, so that no sentence
is in training and test and consistency, which goes by sentence, is that of a set. Written as the dataset is
distributed: ``data/{train,dev,test1}.json`` with one example a line (``identifier`` is split-set-pair-sentence) and
the pictures in ``images/train/DIRECTORY``, ``images/dev`` and ``images/test1``.
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

# What can be claimed, and whether it is true given that the (left, right) picture shows a pointed shape.
Holds = Callable[[bool, bool], bool]
CLAIMS: dict[str, Holds] = {
    "{there_is} a pointed {shape} in the left {image}.": lambda left, right: left,
    "{there_is} a pointed {shape} in the right {image}.": lambda left, right: right,
    "Each {image} {contains} a pointed {shape}.": lambda left, right: left and right,
    "At least one {image} {contains} a pointed {shape}.": lambda left, right: left or right,
}
WORDS = {
    "there_is": ("There is", "You can see", "One sees", "We find"),
    "contains": ("contains", "shows", "has", "includes"),
    "shape": ("shape", "figure", "form", "sign", "object"),
    "image": ("image", "picture", "photo", "photograph"),
}


def wordings(claim: str) -> list[str]:
    """Every way to word a claim."""
    names = [name for name in WORDS if f"{{{name}}}" in claim]
    return [
        claim.format_map(dict(zip(names, words, strict=True)))
        for words in itertools.product(*(WORDS[name] for name in names))
    ]


def make(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write the stand-in into ``folder``; ``sizes`` counts sets of pairs.

    Raises:
        ValueError: more sets than ways to word their claims.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 9])
    left = {claim: list(rng.permutation(wordings(claim))) for claim in CLAIMS}
    for split in SPLITS:
        claims = even_labels(rng, sizes.of(split), CLAIMS)
        if any(claims.count(claim) > len(left[claim]) for claim in CLAIMS):
            raise ValueError(f"{sizes} has more sets than there are wordings")
        with (folder / "data" / f"{NAMES[split]}.json").open("w", encoding="utf-8") as file:
            for number, (claim, of_set) in enumerate(zip(claims, generators(seed, split), strict=False)):
                sentence = str(left[claim].pop())
                for example in _examples(folder, split, number, sentence, CLAIMS[claim], of_set):
                    file.write(json.dumps(example) + "\n")


def _examples(
    folder: Path, split: Split, number: int, sentence: str, holds: Holds, rng: Rng
) -> list[dict[str, object]]:
    """One statement about the pairs of a set; the pictures are written."""
    name = NAMES[split]
    directory = number % 100  # as the training pictures are spread
    images = folder / "images" / (f"train/{directory}" if split == "train" else name)
    images.mkdir(parents=True, exist_ok=True)
    examples = []
    for pair, label in enumerate(even_labels(rng, PAIRS_A_SET[split], (True, False))):
        for side, pointed in enumerate(_pair(rng, holds, label)):
            _draw(rng, split, pointed).save(images / f"{name}-{number}-{pair}-img{side}.png")
        example: dict[str, object] = {
            "identifier": f"{name}-{number}-{pair}-0",
            "sentence": sentence,
            "label": str(label),
            "left_url": f"{name}-{number}-{pair}-img0",
            "right_url": f"{name}-{number}-{pair}-img1",
            "synset": "figure",
            "query": "a pointed shape",
        }
        examples.append(example | ({"directory": directory} if split == "train" else {}))
    return examples


def _pair(rng: Rng, holds: Holds, label: bool) -> tuple[bool, bool]:
    """Which pictures show a pointed shape so that the statement has the label: every way as likely as the others."""
    return choose(rng, [way for way in itertools.product((True, False), repeat=2) if holds(*way) == label])


def _draw(rng: Rng, split: Split, pointed: bool) -> Image.Image:
    page = background(rng, split, (SIDE, SIDE), strength=rng.uniform(0.0, 0.5))
    x, y = SIDE / 2 + rng.uniform(-0.08, 0.08, size=2) * SIDE
    shape, colour = choose(rng, BY_POINT[pointed]), choose(rng, list(COLOURS))
    draw_shape(page, shape, colour, (x, y), SIDE * rng.uniform(0.28, 0.4))
    return page
