"""A stand-in of Hateful Memes in form only: nothing in it is hateful, and nothing is meant to be.

The real set asks whether a captioned picture is a hateful meme, and is built so that neither picture nor caption
decides it: the same caption is benign over one picture and not over another. Here the label is 1 where a shout (a
caption in capitals) stands over a picture of something pointed. Half of the memes have label 1; the others are as
often a shout over something round, quiet over something pointed, or quiet over something round, so that one of the
two alone gets five of six right at most. Written as the dataset is distributed:
``{train,dev_seen,test_seen}.jsonl`` and ``img/ID.png``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from drawing import CELL, CELLS, choose, write
from tasks.parts import (
    BY_POINT,
    COLOURS,
    SPLITS,
    Rng,
    Sizes,
    Split,
    any_font,
    background,
    draw_shape,
    even_labels,
    generators,
)

SIDE = CELL * CELLS
BAND = 3 * CELL  # the caption's strip above the picture
CAPTIONS = ("so good", "my day", "see this", "what now", "oh no", "for you")
NAMES = {"train": "train", "val": "dev_seen", "test": "test_seen"}


def make(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write the stand-in into ``folder``; ``sizes`` counts memes."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    first = 1000
    for split in SPLITS:
        labels = even_labels(np.random.default_rng([seed, first]), sizes.of(split), (0, 1))
        with (folder / f"{NAMES[split]}.jsonl").open("w", encoding="utf-8") as file:
            for number, (label, rng) in enumerate(zip(labels, generators(seed, split), strict=False), start=first):
                shout, pointed = (True, True) if label else choose(rng, [(True, False), (False, True), (False, False)])
                text = choose(rng, CAPTIONS)
                text = text.upper() if shout else text
                image = _picture(rng, split, choose(rng, BY_POINT[pointed]))
                _captioned(image, text, any_font(rng), bool(rng.random() < 0.7)).save(folder / f"img/{number:05d}.png")
                file.write(json.dumps({"id": number, "img": f"img/{number:05d}.png", "label": label, "text": text}))
                file.write("\n")
        first += sizes.of(split)


def _picture(rng: Rng, split: Split, shape: str) -> Image.Image:
    size = (SIDE, SIDE - BAND)
    page = background(rng, split, size, strength=rng.uniform(0.0, 0.4))
    x, y = (length / 2 + rng.uniform(-0.05, 0.05) * length for length in size)
    draw_shape(page, shape, choose(rng, list(COLOURS)), (x, y), size[1] * rng.uniform(0.34, 0.46))
    return page


def _captioned(picture: Image.Image, text: str, font: Path, ink_on_light: bool) -> Image.Image:
    """The caption on a strip above the picture."""
    strip, ink = ("white", "black") if ink_on_light else ("black", "white")
    meme = Image.new("RGB", (SIDE, SIDE), strip)
    meme.paste(picture, (0, BAND))
    write(ImageDraw.Draw(meme), text, (CELLS - len(text)) // 2, 1, font, ink)
    return meme
