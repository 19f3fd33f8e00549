"""Small stand-ins of the four datasets, each in its dataset's own schema, and what a small model needs to learn them.

The real datasets cannot come with the project. These are made from what installed packages ship (fonts, photographs,
films) and go through the product's own converters and recipes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks import docvqa, hateful_memes, nlvr2, ucf101
from tasks.parts import Sizes

METHODS = ("full", "frozen_vision", "lora", "qlora")


@dataclass(frozen=True)
class Task:
    """A stand-in, and how it is learnt: what differs from the recipe ``NAME_METHOD``.

    Attributes:
        source: its name in ``phi3v data convert``.
        make: writes the original distribution of so many items into a folder, from a seed.
        train, test: the files of the converted data to learn from and to measure on.
        steps: optimizer steps, of `BATCH_SIZE` records each.
        convert_options: further options of ``phi3v data convert``.
    """

    source: str
    make: Callable[[Path, Sizes, int], None]
    sizes: Sizes
    train: str
    test: str
    steps: int
    original: str = "."
    convert_options: tuple[str, ...] = ()


TASKS: dict[str, Task] = {
    "docvqa": Task("docvqa", docvqa.make, Sizes(600, 0, 90), "train.jsonl", "val.jsonl", steps=400),
    "hateful_memes": Task(
        "hateful-memes", hateful_memes.make, Sizes(1000, 80, 300), "train.jsonl", "test_seen.jsonl", steps=220
    ),
    "nlvr2": Task("nlvr2", nlvr2.make, Sizes(160, 10, 75), "train.jsonl", "test1.jsonl", steps=120),
    "ucf101": Task(
        "ucf101",
        ucf101.make,
        Sizes(300, 30, 120),
        "ucf101_train.jsonl",
        "ucf101_test.jsonl",
        steps=80,
        original=ucf101.ARCHIVE,
        # Every picture is 313 tokens of the tiny model, whatever its size: 4 frames a clip keep a run short.
        convert_options=("--frames", "4"),
    ),
}
