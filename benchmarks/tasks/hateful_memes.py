"""A stand-in of Hateful Memes in form only: nothing in it is hateful, and nothing is meant to be.

The real set asks whether a captioned picture is a hateful meme, and is built so that neither picture nor caption
decides it: the same caption is benign over one picture and not over another. Here a caption names a shape or a colour,
and the label is 1 if it does not fit what is shown. Memes come in fours (two pictures, each under the two
captions), so every caption and every picture has as many of either label. Written as the dataset is distributed:
``{train,dev_seen,test_seen}.jsonl`` and ``img/ID.png``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from drawing import CELL, CELLS, choose, write
from tasks.parts import (
    COLOURS,
    SHAPES,
    SPLITS,
    Rng,
    Sizes,
    Split,
    any_font,
    background,
    draw_shape,
    generators,
)

SIDE = CELL * CELLS
BAND = 3 * CELL  # the caption's strip above the picture
CAPTIONS = ("my {}", "{} day", "so {}", "see {}")
WORDS = {"shape": ("circle", "square", "triangle", "star"), "colour": ("red", "green", "blue", "yellow")}
NAMES = {"train": "train", "val": "dev_seen", "test": "test_seen"}
MEMES_A_GROUP = 4


def make(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write the stand-in into ``folder``; ``sizes`` counts groups of four memes."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    first = 1000
    for split in SPLITS:
        memes = []
        for group, rng in zip(range(sizes.of(split)), generators(seed, split), strict=False):
            memes += _group(folder, split, first + MEMES_A_GROUP * group, rng)
        first += len(memes)
        order = np.random.default_rng([seed, first]).permutation(len(memes))
        with (folder / f"{NAMES[split]}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(memes[index]) + "\n" for index in order)


def _group(folder: Path, split: Split, first: int, rng: Rng) -> list[dict[str, object]]:
    """Two pictures, each under the caption that names it and under the other one's."""
    words = WORDS[choose(rng, list(WORDS))]
    form = choose(rng, CAPTIONS)
    shown = [words[index] for index in rng.permutation(len(words))[:2]]
    font, ink_on_light = any_font(rng), bool(rng.random() < 0.7)
    memes = []
    for picture, word in enumerate(shown):
        image = _picture(rng, split, word)
        for said in shown:
            number = first + 2 * picture + shown.index(said)
            text = form.format(said)
            _captioned(image, text, font, ink_on_light).save(folder / "img" / f"{number:05d}.png")
            memes.append({"id": number, "img": f"img/{number:05d}.png", "label": int(said != word), "text": text})
    return memes


def _picture(rng: Rng, split: Split, word: str) -> Image.Image:
    size = (SIDE, SIDE - BAND)
    page = background(rng, split, size, strength=rng.uniform(0.0, 0.4))
    x, y = (length / 2 + rng.uniform(-0.05, 0.05) * length for length in size)
    shape = word if word in SHAPES else choose(rng, SHAPES)
    colour = word if word in COLOURS else choose(rng, list(COLOURS))
    draw_shape(page, shape, colour, (x, y), size[1] * rng.uniform(0.34, 0.46))
    return page


def _captioned(picture: Image.Image, text: str, font: Path, ink_on_light: bool) -> Image.Image:
    """The caption on a strip above the picture."""
    strip, ink = ("white", "black") if ink_on_light else ("black", "white")
    meme = Image.new("RGB", (SIDE, SIDE), strip)
    meme.paste(picture, (0, BAND))
    write(ImageDraw.Draw(meme), text, (CELLS - len(text)) // 2, 1, font, ink)
    return meme
