"""What a dataset asks of a model: tokens, crops and answers of every record, read without decoding a picture.

Sizes come from the files' headers, each file once; texts go through the real tokenizer where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phi3v.config import DataConfig
from phi3v.data.collate import encode_record
from phi3v.data.images import image_size
from phi3v.data.lengths import CHARACTERS_PER_TOKEN
from phi3v.data.schema import Record
from phi3v.data.table import RecordTable, open_table
from phi3v.errors import UserError
from phi3v.processing.conversation import IGNORE_INDEX
from phi3v.processing.hd_transform import CROP_SIZE, page_geometry
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.compute.activations import MicroBatch

CANDIDATE_CROPS = (1, 2, 4, 6, 8, 9, 12, 16)
LONG_CONTEXT = 4096  # longer samples use LongRoPE's long factors
HISTOGRAM_WIDTH = 512  # tokens
HEAD_TOKENS = 4  # before a picture at the beginning: BOS, <|user|> and the line's end
READERS = 8  # threads that read headers

# Where the data is not there yet: one page of the model's full size, and text as DocVQA's published mean leaves it.
ASSUMED_TEXT, ASSUMED_ANSWER, ASSUMED_PAGE = 60, 16, (1275, 1650)


@dataclass(frozen=True)
class CropChoice:
    """The dataset at one ``num_crops``.

    Attributes:
        tokens: (records,) of the whole sequence.
        crops: (records,) that run through the tower, global views included.
        image_tokens: (records,).
        blank: share of the pages' area that is white padding.
        padding_crops: crops a picture that the official processor adds and sends through the tower all the same.
        shrunk: share of pictures whose resolution is reduced.
    """

    num_crops: int
    tokens: npt.NDArray[np.int64]
    crops: npt.NDArray[np.int64]
    image_tokens: npt.NDArray[np.int64]
    blank: float
    padding_crops: float
    shrunk: float

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
            "mean_crops": round(float(self.crops.mean()), 2),
            "blank_share": round(self.blank, 3),
            "padding_crops": round(self.padding_crops, 2),
            "shrunk_share": round(self.shrunk, 3),
            "histogram": self.histogram(),
        }


@dataclass(frozen=True)
class Workload:
    """Lengths and sizes of a dataset.

    Attributes:
        text_tokens: (records,) tokens that are no picture.
        answer_tokens: (records,) that are learnt.
        owner: (pictures,) the record of each.
        sizes: (pictures, 2) width and height.
        groups: (records,) number of the set of pictures that a record is about.
        heads: (records,) of the text tokens those up to the last picture; -1 where the pictures are not all at the
            beginning, so that no other record can share them.
        basis: where the figures are from, in a sentence.
    """

    text_tokens: npt.NDArray[np.int64]
    answer_tokens: npt.NDArray[np.int64]
    owner: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    heads: npt.NDArray[np.int64]
    basis: str
    is_assumed: bool = False
    _choices: dict[int, CropChoice] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.text_tokens)

    @cached_property
    def _distinct(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        sizes, index = np.unique(self.sizes, axis=0, return_inverse=True)
        return sizes, index.reshape(-1)

    def at(self, num_crops: int) -> CropChoice:
        """Tokens and crops of every record at ``num_crops``."""
        if num_crops not in self._choices:
            self._choices[num_crops] = self._choose(num_crops)
        return self._choices[num_crops]

    def _choose(self, num_crops: int) -> CropChoice:
        sizes, index = self._distinct
        pages = [page_geometry(int(width), int(height), num_crops) for width, height in sizes]
        tokens = np.array([page.num_img_tokens for page in pages], dtype=np.int64)
        crops = np.array([page.rows * page.columns for page in pages], dtype=np.int64)
        area = np.array([page.resized[0] * page.resized[1] for page in pages], dtype=np.float64)
        shrunk = np.array(
            [page.resized[0] < size[0] for page, size in zip(pages, sizes, strict=True)], dtype=np.float64
        )
        records = len(self)
        image_tokens = np.bincount(self.owner, tokens[index], records).astype(np.int64)
        pictures = len(self.sizes)
        total_area = float((crops[index] * CROP_SIZE**2).sum()) if pictures else 1.0
        return CropChoice(
            num_crops=num_crops,
            tokens=self.text_tokens + image_tokens,
            # A page of one crop is its own global view.
            crops=np.bincount(self.owner, (crops + (crops > 1))[index], records).astype(np.int64),
            image_tokens=image_tokens,
            blank=1 - float(area[index].sum()) / total_area if pictures else 0.0,
            padding_crops=num_crops - float(crops[index].mean()) if pictures else 0.0,
            shrunk=float(shrunk[index].mean()) if pictures else 0.0,
        )

    def largest(self, num_crops: int, rows: int) -> MicroBatch:
        """The micro-batch of ``rows`` records that memory must hold: the longest ones, padded to the longest."""
        choice = self.at(num_crops)
        longest = np.argsort(choice.tokens)[::-1][: max(1, rows)]
        rows = max(1, rows)
        tokens = int(choice.tokens[longest[0]])
        repeat = rows / len(longest)
        return MicroBatch(
            rows=rows,
            tokens=rows * tokens,
            image_tokens=int(choice.image_tokens[longest].sum() * repeat),
            crops=int(choice.crops[longest].sum() * repeat),
            answer_tokens=int(np.sort(self.answer_tokens)[::-1][:rows].sum() * repeat),
            is_padded=rows > 1 and len(np.unique(choice.tokens[longest])) > 1,
        )

    @cached_property
    def shared_image_factor(self) -> float:
        """How many records share a set of pictures, on average (1: packing by picture gains nothing)."""
        with_pictures = np.unique(self.owner)
        if not len(with_pictures):
            return 1.0
        return len(with_pictures) / len(np.unique(self.groups[with_pictures]))

    def recommended_crops(self, advised: int) -> tuple[int, str]:
        """``num_crops`` for this data and the reason.

        Args:
            advised: the model's own value (16 for one picture, 4 for several).
        """
        if not len(self.owner):
            return advised, "there are no pictures"
        per_record = len(self.owner) / len(np.unique(self.owner))
        limit = 16 if per_record < 2 else max(4, min(16, advised))
        candidates = [crops for crops in CANDIDATE_CROPS if crops <= limit]
        for crops in candidates:
            if self.at(crops).shrunk <= 0.05:
                chosen, reason = crops, f"{crops} crops keep the resolution of at least 95 % of the pictures"
                break
        else:
            chosen = candidates[-1]
            reason = f"{self.at(chosen).shrunk:.0%} of the pictures have more detail than {chosen} crops hold"
        while self.at(chosen).share_long > 0.05 and chosen > 1:
            chosen = max(crops for crops in CANDIDATE_CROPS if crops < chosen)
            reason = f"more would put over 5 % of the records above {LONG_CONTEXT} tokens"
        return chosen, reason


def assumed_workload(records: int = 1) -> Workload:
    """One full page and a short question a record, where there is no data to read."""
    return Workload(
        text_tokens=np.full(records, ASSUMED_TEXT, dtype=np.int64),
        answer_tokens=np.full(records, ASSUMED_ANSWER, dtype=np.int64),
        owner=np.arange(records, dtype=np.int64),
        sizes=np.tile(np.array([ASSUMED_PAGE], dtype=np.int64), (records, 1)),
        groups=np.arange(records, dtype=np.int64),
        heads=np.full(records, HEAD_TOKENS, dtype=np.int64),
        basis="no data was read: one scanned page of 1275x1650 pixels and 60 text tokens a record are assumed",
        is_assumed=True,
    )


def read_workload(path: Path, data: DataConfig, processor: Phi3VProcessor | None, *, progress: bool) -> Workload:
    """Read a data file's lengths and sizes.

    Args:
        processor: with the model's tokenizer; without one texts count a token every four characters.

    Raises:
        UserError: the file has faults, or a picture cannot be read; names the line.
    """
    table = open_table(path, **data.reading, progress=progress)
    text, answers, heads, owner, groups = [], [], [], [], []
    names: list[str] = []
    known_groups: dict[tuple[object, ...], int] = {}
    first_use: dict[str, int] = {}
    for index, record in enumerate(table):
        count, learnt, head = _lengths(record, processor)
        text.append(count)
        answers.append(learnt)
        heads.append(head)
        owner += [index] * len(record.images)
        names += record.images
        groups.append(known_groups.setdefault(record.page or record.images, len(known_groups)))
        for name in record.images:
            first_use.setdefault(name, record.line)
    sizes = _sizes(table, first_use)
    tokens = "the model's tokenizer" if processor is not None else f"{CHARACTERS_PER_TOKEN} characters a token"
    return Workload(
        text_tokens=np.array(text, dtype=np.int64),
        answer_tokens=np.array(answers, dtype=np.int64),
        owner=np.array(owner, dtype=np.int64),
        sizes=np.array([sizes[name] for name in names], dtype=np.int64).reshape(-1, 2),
        groups=np.array(groups, dtype=np.int64),
        heads=np.array(heads, dtype=np.int64),
        basis=f"{len(text):,} records of {path}: {tokens}, the headers of {len(sizes):,} pictures",
    )


def _lengths(record: Record, processor: Phi3VProcessor | None) -> tuple[int, int, int]:
    """Text tokens of a record, those of its answers, and its head (see `Workload`)."""
    pictures = len(record.images)
    shares = record.page is not None
    if processor is None:
        system, first = len(record.system or "") / CHARACTERS_PER_TOKEN, record.turns[0]
        read = system + sum(len(turn.user) for turn in record.turns) / CHARACTERS_PER_TOKEN
        answers = [(turn.weight, len(turn.assistant) / CHARACTERS_PER_TOKEN) for turn in record.turns]
        learnt = int(sum(length for weight, length in answers if weight)) + 2 * record.num_questions + 1
        text = int(read + sum(length for _, length in answers)) + 8 * len(record.turns) + 3 * pictures + 2
        head = system + (first.image_offsets or [0])[-1] / CHARACTERS_PER_TOKEN
        return text, learnt, int(head) + HEAD_TOKENS + 3 * (pictures - 1) if shares else -1
    stream = encode_record(record, processor, [1] * pictures)
    learnt = sum(label != IGNORE_INDEX for label in stream.labels)
    head = max(place for place, token in enumerate(stream.input_ids) if token < 0) + 1 - pictures if shares else -1
    return len(stream.input_ids) - pictures, learnt, head


def _sizes(table: RecordTable, first_use: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Width and height of every picture, each file opened once."""

    def read(name: str) -> tuple[int, int]:
        try:
            return table.of_image(image_size, name)
        except UserError as error:
            where = f"{table.path}:{first_use[name]}"
            raise UserError(error.what, where=where, hint=error.hint) from None

    names: Sequence[str] = list(first_use)
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(read, names, chunksize=64), strict=True))
