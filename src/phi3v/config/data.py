"""``data``: the data files, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phi3v.config.bounds import require_bounds
from phi3v.errors import UserError

Packing = Literal["none", "samples", "shared-image"]
SHUFFLE_WINDOW = 32
CACHE_LIMIT = 100.0
# Pillow's own warning threshold: a quarter of a GiB at 3 bytes per pixel.
DEFAULT_MAX_PIXELS = 89_478_485


@dataclass(frozen=True)
class DataSource:
    """One of several data files; takes one of ``weight``, ``epochs`` and ``max_records`` at most.

    Attributes:
        path: of the file.
        name: in logs and reports; default: the file's name without its ending.
        weight: its share of an epoch's records, in proportion to the weights of the others.
        epochs: how often an epoch takes each record; default: once.
        max_records: how many records an epoch takes, others each time.
    """

    path: str
    name: str = ""
    weight: float | None = None
    epochs: float | None = None
    max_records: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or Path(self.path).stem)


Sources = str | list[DataSource] | None
AMOUNTS = ("weight", "epochs", "max_records")
SOURCES_HINT = "'[{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]'"
# What all trackers take in the name of a metric.
_SOURCE_NAME = re.compile(r"[A-Za-z0-9_.-]+( [A-Za-z0-9_.-]+)*")


def _list_sources(value: Sources) -> list[DataSource]:
    return [DataSource(value)] if isinstance(value, str) else list(value or ())


def _check_sources(sources: Sequence[DataSource], where: str, amounts: Sequence[str]) -> None:
    """Refuse sources that contradict themselves or each other."""
    if not sources:
        raise UserError("lists no source", where=where, hint=f"give a file, or a list such as {SOURCES_HINT}")
    named: dict[str, int] = {}
    for index, source in enumerate(sources):
        here = f"{where}[{index}]"
        require_bounds(source, here, above_0="weight epochs", at_least_1="max_records")
        given = [name for name in AMOUNTS if getattr(source, name) is not None]
        for name in given:
            if name not in amounts:
                hint = f"leave it out; an evaluation source takes {', '.join(amounts)}"
                raise UserError("an evaluation asks every question once", where=f"{here}.{name}", hint=hint)
        if len(given) > 1:
            what = f"{' and '.join(given)} each say how much of a source an epoch takes"
            raise UserError(what, where=here, hint="give one of them")
        if not _SOURCE_NAME.fullmatch(source.name):
            what = f"{source.name!r} has characters that trackers do not take in a name"
            raise UserError(what, where=f"{here}.name", hint="give it one of letters, digits and . _ -")
        if source.name in named:
            what = f"{source.name!r} is the name of {where}[{named[source.name]}] too"
            raise UserError(what, where=f"{here}.name", hint="give each source a name of its own, e.g. name: receipts")
        named[source.name] = index
    weighted = [index for index, source in enumerate(sources) if source.weight is not None]
    if len(weighted) == 1:
        raise UserError(
            "it is the only source with a weight, and a weight says how much of it there is beside the others",
            where=f"{where}[{weighted[0]}].weight",
            hint="give the others weights too, or use epochs or max_records",
        )


@dataclass
class DataConfig:
    """The data files, and how they are read."""

    train: Sources = None
    """JSONL file to train on; its images are in the folder images/ next to it. Or a folder or URL of shards
    (`phi3v data shard`). Or several as a list, each with one of weight, epochs, max_records, and a name:
    '[{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]'."""
    eval: Sources = None
    """JSONL file to evaluate on before and after training; none: no evaluation. Or several as a list, each with
    max_records and a name, which get a score each."""
    mixture_ends: Literal["first", "all"] = "first"
    """Where sources have weights, an epoch ends when the first of them has been seen whole, or when all have, for which
    the smaller ones repeat."""
    image_check: Literal["decode", "header", "off"] = "decode"
    """How images are checked before the model loads: decoded in full (finds truncated files), header only, or not."""
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    """Larger images are refused without decoding them."""
    exif_orientation: bool = True
    """Rotate images by their EXIF orientation, as viewers do; false: use the pixels as stored."""
    special_text: Literal["refuse", "escape"] = "refuse"
    """Text such as <|end|> in the data: refuse it with its line, or break it up with a space."""
    num_workers: int | None = None
    """Processes that read images; default: with a GPU the number of cores minus one, at most 8; otherwise none."""
    packing: Packing = "none"
    """none: padded batches; samples: whole records packed into rows without padding; shared-image: also, records with
    the same images share them, computed once. Neither changes a record's loss or gradient."""
    pack_tokens: int = 8192
    """Maximum tokens of a packed row, which a device computes at once; a longer record gets a row of its own."""
    shared_image_max: int = 8
    """shared-image: maximum number of records with the same images in one step; the others go into other steps."""
    shuffle_window: int = SHUFFLE_WINDOW
    """Of shards (`phi3v data shard`): number of shards whose records are shuffled together; at least the number of
    ranks, each of which then reads shards of its own."""
    cache_limit: float = CACHE_LIMIT
    """GB of local disk (in $PHI3V_CACHE) for shards that are fetched from a URL."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """An image that cannot be read during training: stop, or leave out its record, count it and list it."""

    def __post_init__(self) -> None:
        counts = "max_image_pixels pack_tokens shared_image_max shuffle_window"
        require_bounds(self, "data", at_least_1=counts, at_least_0="num_workers cache_limit")
        if isinstance(self.train, list):
            _check_sources(self.train, "data.train", AMOUNTS)
        if isinstance(self.eval, list):
            _check_sources(self.eval, "data.eval", ("max_records",))
        if self.mixture_ends != "first" and not any(source.weight for source in self.train_sources):
            raise UserError(
                "no source has a weight, so an epoch ends when it has taken what each source says",
                where="data.mixture_ends",
                hint="give the sources of data.train weights, or leave it out",
            )

    @property
    def paths(self) -> list[tuple[str, str]]:
        """The key and the path of every data file, those to train on first."""
        found = []
        for key, data in (("data.train", self.train), ("data.eval", self.eval)):
            if isinstance(data, str):
                found.append((key, data))
            elif data is not None:
                found += [(f"{key}[{index}]", source.path) for index, source in enumerate(data)]
        return found

    @property
    def train_sources(self) -> list[DataSource]:
        """The files to train on; none if there is none."""
        return _list_sources(self.train)

    @property
    def eval_sources(self) -> list[DataSource]:
        """The files to evaluate on; none if there is none."""
        return _list_sources(self.eval)

    @property
    def reading(self) -> dict[str, Any]:
        """How to read a data file: the keyword arguments that all readers share."""
        return {
            "special_text": self.special_text,
            "max_pixels": self.max_image_pixels,
            "exif_orientation": self.exif_orientation,
            "cache_limit": self.cache_limit,
            "shuffle_window": self.shuffle_window,
        }
