"""What a dataset asks of a model: tokens, crops and answers of every record, counted by `data/lengths.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from phi3v.config import DataConfig, ObjectiveConfig
from phi3v.data.lengths import CHARACTERS_PER_TOKEN, LONG_CONTEXT, RecordLengths, TableLengths
from phi3v.data.mixture import measure, open_sources, take_lengths
from phi3v.data.order import Mixed, Order
from phi3v.data.preferences import lengths_at
from phi3v.data.table import RecordTable
from phi3v.processing.hd_transform import CROP_SIZE, page_geometry
from phi3v.processing.processor import Phi3VProcessor

CANDIDATE_CROPS = (1, 2, 4, 6, 8, 9, 12, 16)
HISTOGRAM_WIDTH = 512  # tokens
PREFIX_TOKENS = 4  # before an image at the beginning: BOS, <|user|> and the line's end

# Where the data is not there yet: one page of the model's full size, and text as DocVQA's published mean leaves it.
ASSUMED_TEXT, ASSUMED_ANSWER, ASSUMED_PAGE = 60, 16, (1275, 1650)


@dataclass(frozen=True)
class CropChoice:
    """The dataset at one ``num_crops``.

    Attributes:
        blank: share of the pages' area that is white padding.
        padding_crops: crops an image that the official processor adds and sends through the tower all the same.
        shrunk: share of images whose resolution is reduced.
    """

    num_crops: int
    lengths: RecordLengths
    blank: float
    padding_crops: float
    shrunk: float

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """(records,) of the whole sequence; of preferences, of the longest of its sequences."""
        return self.lengths.longest

    @property
    def share_long(self) -> float:
        """Share of records above 4096 tokens."""
        return float((self.tokens > LONG_CONTEXT).mean())

    def histogram(self) -> dict[str, int]:
        """Records by tokens, in steps of 512."""
        bins = self.tokens // HISTOGRAM_WIDTH
        return {
            f"{k * HISTOGRAM_WIDTH}–{(k + 1) * HISTOGRAM_WIDTH - 1}": int((bins == k).sum())
            for k in range(int(bins.min()), int(bins.max()) + 1)
        }

    def summary(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "num_crops": self.num_crops,
            "mean_tokens": round(float(self.tokens.mean()), 1),
            "p95_tokens": int(np.percentile(self.tokens, 95)),
            "max_tokens": int(self.tokens.max()),
            "share_over_4096": round(self.share_long, 4),
            "mean_crops": round(float(self.lengths.crops.mean()), 2),
            "blank_share": round(self.blank, 3),
            "padding_crops": round(self.padding_crops, 2),
            "shrunk_share": round(self.shrunk, 3),
            "histogram": self.histogram(),
        }


@dataclass(frozen=True)
class Workload:
    """Lengths and sizes of a dataset.

    Attributes:
        basis: where the figures are from, in a sentence.
        objective: what is learned: one answer of each record, or all.
    """

    lengths: TableLengths
    basis: str
    is_assumed: bool = False
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    _choices: dict[int, CropChoice] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, num_crops: int) -> CropChoice:
        """Tokens and crops of every record at ``num_crops``."""
        if num_crops not in self._choices:
            self._choices[num_crops] = self._choose(num_crops)
        return self._choices[num_crops]

    def _choose(self, num_crops: int) -> CropChoice:
        lengths = lengths_at(self.lengths, self.objective, num_crops)
        if not len(self.lengths.sizes):
            return CropChoice(num_crops, lengths, 0.0, 0.0, 0.0)
        sizes, place = self.lengths.distinct_sizes
        pages = [page_geometry(int(width), int(height), num_crops) for width, height in sizes]
        crops = np.array([page.rows * page.columns for page in pages])[place]
        area = np.array([page.resized[0] * page.resized[1] for page in pages], dtype=np.float64)[place]
        shrunk = [page.resized[0] < size[0] for page, size in zip(pages, sizes, strict=True)]
        return CropChoice(
            num_crops,
            lengths,
            blank=1 - float(area.sum()) / float((crops * CROP_SIZE**2).sum()),
            padding_crops=num_crops - float(crops.mean()),
            shrunk=float(np.array(shrunk, dtype=np.float64)[place].mean()),
        )

    @cached_property
    def shared_image_factor(self) -> float:
        """How many records share a set of images, on average (1: packing by image gains nothing)."""
        with_images = np.unique(self.lengths.image_record)
        if not len(with_images):
            return 1.0
        last_turn = np.cumsum(self.lengths.turns)[with_images] - 1
        return len(with_images) / len(np.unique(self.lengths.pages[last_turn]))

    def recommended_crops(self, advised: int) -> tuple[int, str]:
        """``num_crops`` for this data and the reason.

        Args:
            advised: the model's own value (16 for one image, 4 for several).
        """
        if not len(self.lengths.sizes):
            return advised, "there are no images"
        per_record = len(self.lengths.sizes) / len(np.unique(self.lengths.image_record))
        limit = 16 if per_record < 2 else max(4, min(16, advised))
        candidates = [crops for crops in CANDIDATE_CROPS if crops <= limit]
        for crops in candidates:
            if self.at(crops).shrunk <= 0.05:
                chosen, reason = crops, f"{crops} crops keep the resolution of at least 95 % of the images"
                break
        else:
            chosen = candidates[-1]
            reason = f"{self.at(chosen).shrunk:.0%} of the images have more detail than {chosen} crops hold"
        while self.at(chosen).share_long > 0.05 and chosen > 1:
            chosen = max(crops for crops in CANDIDATE_CROPS if crops < chosen)
            reason = f"more would put over 5 % of the records above {LONG_CONTEXT} tokens"
        return chosen, reason


def assumed_workload(records: int = 1, objective: ObjectiveConfig | None = None) -> Workload:
    """One full page and a short question a record, where there is no data to read."""
    each = np.ones(records, dtype=np.int64)
    lengths = TableLengths(
        text=ASSUMED_TEXT * each,
        targets=ASSUMED_ANSWER * each,
        turns=each,
        prompts=(ASSUMED_TEXT - ASSUMED_ANSWER) * each,
        prefixes=PREFIX_TOKENS * each,
        pages=np.arange(records),
        images=each,
        answers=np.full(2 * records, ASSUMED_ANSWER),
        alternatives=2 * each,  # a pair, for objectives that take them
        sizes=np.tile(np.array([ASSUMED_PAGE], dtype=np.int64), (records, 1)),
    )
    basis = "no data was read: one scanned page of 1275x1650 pixels and 60 text tokens a record are assumed"
    return Workload(lengths, basis, is_assumed=True, objective=objective or ObjectiveConfig())


def read_workload(
    data: DataConfig,
    processor: Phi3VProcessor | None,
    objective: ObjectiveConfig | None = None,
    *,
    order_of: Callable[[RecordTable], Order | None] = lambda table: None,
    progress: bool,
) -> Workload:
    """Read the lengths and sizes of the data to train on.

    Args:
        processor: with the model's tokenizer; without one texts count a token every four characters.
        order_of: of a mixture, what an epoch takes of it: the workload is that of an epoch.

    Raises:
        UserError: a file has faults, or an image cannot be read; names the line.
    """
    table = open_sources(data.train, compare_images=data.packing == "shared-image", **data.reading, progress=progress)
    lengths, order = measure(table, processor, progress=progress), order_of(table)
    tokens = "the model's tokenizer" if processor is not None else f"{CHARACTERS_PER_TOKEN} characters a token"
    images = len(table.distinct_images()[0])
    what = f"{len(table):,} records of {table.shown}"
    if isinstance(order, Mixed):
        lengths = take_lengths(lengths, order.of_epoch(0))
        what = f"{len(lengths):,} records that an epoch takes of the {what}"
    basis = f"{what}: {tokens}, the headers of {images:,} images"
    return Workload(lengths, basis, objective=objective or ObjectiveConfig())
