"""Packing: which records share a step, a rank and a row, and how a row is built.

A **row** is what a device computes at a time: records side by side, none padded. In ``shared-image`` packing, records
about the same pictures form a **group** in it: the pictures and the text before them once (the prefix), then the rest
of each record (its branch). `model/attention.py` draws what sees what. A record's loss and gradients are those that it
has alone.

The plan of an epoch follows from the lengths of the records, the seed and the epoch alone, so every rank makes the
same one and any step of it can be made again.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from phi3v.config import Packing
from phi3v.data.batches import BatchPlan, Group, Row, RowPlan, Step, finish_row, without_weight
from phi3v.data.collate import (
    Counts,
    LossWeighting,
    OnBadSample,
    Sample,
    encode_record,
    first_readable,
    make_sample,
    stack_pictures,
)
from phi3v.data.features import FeatureStore
from phi3v.data.pages import PageReader
from phi3v.data.progress import LateProgress
from phi3v.data.table import RecordTable
from phi3v.errors import UserError
from phi3v.processing.conversation import IGNORE_INDEX
from phi3v.processing.processor import Phi3VProcessor

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RecordLengths:
    """What a plan needs to know of ``n`` records.

    Attributes:
        tokens: (n,) of the whole record.
        head: (n,) tokens up to the last picture, which records of the same page have in common; 0: shares nothing.
        page: (n,) equal for records that may share their head.
    """

    tokens: Ints
    head: Ints
    page: Ints


def measure_records(
    table: RecordTable, processor: Phi3VProcessor, long_context_start: int, *, progress: bool = False
) -> RecordLengths:
    """Lengths and pages of all records, from the texts and the headers of the picture files.

    Args:
        long_context_start: longer samples use other rotary factors (LongRoPE), so records on both sides of it cannot
            share a head, even of the same page.

    Raises:
        UserError: the header of a picture cannot be read.
    """
    count_tokens = processor.image_processor.calc_num_image_tokens_from_image_size
    of_pictures: dict[tuple[str, ...], list[int]] = {}
    pages: dict[Any, int] = {}
    tokens, heads, page_of = (np.zeros(len(table), dtype=np.int64) for _ in range(3))
    with LateProgress("measuring records", len(table), enabled=progress) as bar:
        for index, record in enumerate(table):
            images = record.images
            if images not in of_pictures:
                of_pictures[images] = [count_tokens(width, height) for width, height in table.image_sizes(record)]
            # One token a picture here, and its own number added: the runs of a page would cost the most.
            ids = encode_record(record, processor, [1] * len(images)).input_ids
            more = sum(of_pictures[images]) - len(images)
            tokens[index] = len(ids) + more
            key: Any = index
            if record.page is not None:
                heads[index] = max(place for place, token in enumerate(ids) if token < 0) + 1 + more
                key = (record.page, bool(tokens[index] > long_context_start))
            page_of[index] = pages.setdefault(key, len(pages))
            bar.advance(1)
    return RecordLengths(tokens, heads, page_of)


class PackingPlan(BatchPlan):
    """Packed rows of every rank in every step of an epoch.

    Args:
        lengths: of the records.
        packing: ``samples``: every record by itself; ``shared-image``: records of a page in groups.
        batch_size: records of a step, over all ranks. The last step of an epoch has what is left.
        batch_tokens: in place of ``batch_size``, about so many tokens a step.
        pack_tokens: tokens of a row at most, unless one record has more.
        shared_image_max: records of a group at most, when the pages are dealt. Two groups of a page that chance brings
            into one step become one.
        world_size: ranks.
        seed: of the order, which is that of padded batches: records come in the places that they have there, and
            records of a page where one of them does.
    """

    def __init__(
        self,
        lengths: RecordLengths,
        packing: Packing,
        *,
        batch_size: int,
        batch_tokens: int | None = None,
        pack_tokens: int,
        shared_image_max: int,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        count = len(lengths.tokens)
        super().__init__(count, batch_size=batch_size, world_size=world_size, seed=seed)
        self.lengths = lengths
        # Plain numbers: one at a time they are looked up far faster than out of an array.
        self._tokens, self._head, self._page = (
            values.tolist() for values in (lengths.tokens, lengths.head, lengths.page)
        )
        self.shares = packing == "shared-image"
        self.pack_tokens = pack_tokens
        self.shared_image_max = shared_image_max
        self.by_tokens = batch_tokens is not None
        if batch_tokens is not None:
            self.num_steps = min(max(1, round(self.epoch_tokens() / batch_tokens)), count)

    def tokens(self, group: Group) -> int:
        """Tokens that a group has in a row."""
        head: int = self._head[group[0]]
        return head + sum(self._tokens[index] - head for index in group)

    def size(self, row: Row) -> int:
        return sum(map(self.tokens, row))

    def branch_pairs(self, row: Row) -> int:
        """Queries of branches times the keys of their group, in all groups of a row that share a prefix."""
        pairs = 0
        for group in row:
            if len(group) > 1 and (head := self._head[group[0]]):
                tokens = self.tokens(group)
                pairs += (tokens - head) * tokens
        return pairs

    def epoch_tokens(self) -> int:
        """Tokens of the first epoch, but for groups that the end of a step cuts; others differ a little."""
        return int(self._costs(self._chunks(0)).sum())

    def steps(self, epoch: int, first: int = 0) -> Iterator[Step]:
        """The steps of an epoch in order, from the ``first``. A rank may have no row in one with few records."""
        chunks = self._chunks(epoch)
        order = np.concatenate([np.array(chunk) for chunk in chunks])
        chunk_of = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])
        for start, end in islice(zip(*self._bounds(chunks), strict=True), first, None):
            pieces = groupby(range(start, end), key=lambda place: chunk_of[place])
            yield self._deal([tuple(int(order[place]) for place in places) for _, places in pieces])

    def _chunks(self, epoch: int) -> list[Group]:
        """All records in the order of the epoch; those of a page in chunks that come together."""
        order = self.order(epoch)
        if not self.shares:
            return [(index,) for index in order]
        pages: dict[int, list[int]] = {}
        for index in order:
            pages.setdefault(self._page[index], []).append(index)
        chunks = [chunk for records in pages.values() for chunk in self._cut(records, even=True)]
        # By the place of the record with the lowest index: so a page of many comes no earlier than others.
        place = {index: at for at, index in enumerate(order)}
        return sorted(chunks, key=lambda chunk: place[min(chunk)])

    def _cut(self, records: Sequence[int], *, even: bool = False) -> list[Group]:
        """Records of one page in groups that fit into a row and, with ``even``, have about equally many."""
        limit = len(records)
        if even:
            limit = math.ceil(len(records) / math.ceil(len(records) / self.shared_image_max))
        groups: list[list[int]] = []
        tokens = 0
        for index in records:
            branch = self._tokens[index] - self._head[index]
            if groups and len(groups[-1]) < limit and tokens + branch <= self.pack_tokens:
                groups[-1].append(index)
                tokens += branch
            else:
                groups.append([index])
                tokens = self._tokens[index]
        return [tuple(group) for group in groups]

    def _costs(self, chunks: Sequence[Group]) -> Ints:
        """Tokens that each record adds, in the order of ``chunks``."""
        order = np.concatenate([np.array(chunk) for chunk in chunks])
        first = np.zeros(len(order), dtype=bool)
        first[np.cumsum([0] + [len(chunk) for chunk in chunks[:-1]])] = True
        return np.asarray(self.lengths.tokens[order] - np.where(first, 0, self.lengths.head[order]))

    def _bounds(self, chunks: Sequence[Group]) -> tuple[list[int], list[int]]:
        """Where each step starts and ends among the records in their order."""
        count = self.num_records
        if not self.by_tokens:
            starts = [step * self.batch_size for step in range(self.num_steps)]
        else:
            reached = np.cumsum(self._costs(chunks))
            wanted = reached[-1] / self.num_steps * np.arange(self.num_steps)
            places = np.arange(self.num_steps)
            # At least one record a step, from the front and from the back.
            front = np.maximum.accumulate(np.searchsorted(reached, wanted, side="right") - places) + places
            starts = np.minimum(front, count - places[::-1] - 1).tolist()
        return starts, [*starts[1:], count]

    def _deal(self, groups: list[Group]) -> Step:
        """The groups of a step to the ranks, the largest first to the rank with the fewest tokens, then into rows."""
        if self.shares:
            pages: dict[int, list[int]] = {}
            for group in groups:
                pages.setdefault(self._page[group[0]], []).extend(group)
            groups = [group for records in pages.values() for group in self._cut(records)]
        while len(groups) < self.world_size and len(largest := max(groups, key=len)) > 1:
            groups.remove(largest)
            groups += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        sized = sorted(((self.tokens(group), group) for group in groups), key=lambda item: (-item[0], item[1]))
        shares: list[list[tuple[int, Group]]] = [[] for _ in range(self.world_size)]
        loads = [(0, rank) for rank in range(self.world_size)]
        for tokens, group in sized:
            load, rank = heapq.heappop(loads)
            shares[rank].append((tokens, group))
            heapq.heappush(loads, (load + tokens, rank))
        return [self._fill(share) for share in shares]

    def _fill(self, share: Sequence[tuple[int, Group]]) -> list[Row]:
        """Groups into rows by best fit, the largest first: each goes where it leaves the least room."""
        rows: list[list[Group]] = []
        room: list[int] = []
        for tokens, group in share:
            fits = [place for place, left in enumerate(room) if left >= tokens]
            if fits:
                place = min(fits, key=lambda place: room[place])
                rows[place].append(group)
                room[place] -= tokens
            else:
                rows.append([group])
                room.append(self.pack_tokens - tokens)
        return [tuple(row) for row in rows]


class PackedDataset(Dataset[dict[str, Any]]):
    """Packed rows, made as a plan asks for them; the pictures of a group are decoded once.

    Args:
        features: of their pictures, where a frozen vision part has made them already.
        on_bad: a group whose pictures cannot be read: raise that, or leave it out. A row that has no other is made of
            a record that can be read, and weighs nothing.
    """

    def __init__(
        self,
        table: RecordTable,
        processor: Phi3VProcessor,
        loss_weighting: LossWeighting = "sample",
        *,
        features: FeatureStore | None = None,
        on_bad: OnBadSample = "stop",
    ) -> None:
        self.table = table
        self.processor = processor
        self.reader = PageReader(table, processor.image_processor, features)
        self.loss_weighting = loss_weighting
        self.on_bad = on_bad

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, plan: RowPlan) -> dict[str, Any]:
        groups: list[list[Sample]] = []
        skipped: list[tuple[int, str]] = []
        for group in plan.row:
            try:
                groups.append(self._samples(group))
            except UserError as error:
                if self.on_bad == "stop":
                    raise
                skipped += [(index, str(error).splitlines()[0]) for index in group]
                wrong = error
        if groups:
            row = pack_row(groups, self.loss_weighting)
        else:
            after = plan.row[-1][-1]
            other = first_readable(self.reader, self.table, self.processor, after=after, error=wrong)
            row = without_weight(pack_row([[other]], self.loss_weighting))
        row["counts"] = row["counts"]._replace(skipped=tuple(skipped))
        return finish_row(row, plan)

    def _samples(self, group: Group) -> list[Sample]:
        first = replace(make_sample(self.reader, self.table[group[0]], self.processor), index=group[0])
        counts = [self.processor.image_processor.num_tokens_of_page(page.size) for page in first.pages]
        samples = [first]
        for index in group[1:]:
            record = self.table[index]
            stream = encode_record(record, self.processor, counts)
            sample = replace(first, input_ids=stream.input_ids, labels=stream.labels, index=index)
            samples.append(replace(sample, num_questions=record.num_questions))
        return samples


def shared_tokens(samples: Sequence[Sample]) -> int:
    """Tokens at the beginning that all samples have in common, short of the last one before an answer.

    That one's output is learnt from, once for each sample, so it belongs to the branches.
    """
    if len(samples) == 1:
        return 0
    limits = [
        next((place for place, label in enumerate(sample.labels) if label != IGNORE_INDEX), len(sample.labels)) - 1
        for sample in samples
    ]
    shared = min(limits)
    first = samples[0].input_ids
    for sample in samples[1:]:
        pairs = enumerate(zip(first[:shared], sample.input_ids[:shared], strict=True))
        shared = next((place for place, (a, b) in pairs if a != b), shared)
    return shared


def pack_row(groups: Sequence[Sequence[Sample]], loss_weighting: LossWeighting = "sample") -> dict[str, Any]:
    """One row out of groups of samples; the pictures of a group are those of its first sample.

    Returns:
        ``input_ids``, ``labels`` int64 and ``loss_weights`` float32 (1, T); ``layout``, the prefix and the branches of
        each group in tokens (see ``model/attention.py``); with pictures what `stack_pictures` gives, a page of several
        groups once; and ``counts`` as of `Collator`.
    """
    layout: list[tuple[int, ...]] = []
    ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    for samples in groups:
        prefix = shared_tokens(samples)
        layout.append((prefix, *(len(sample.input_ids) - prefix for sample in samples)))
        ids += samples[0].input_ids[:prefix]
        labels += [IGNORE_INDEX] * prefix
        weights += [0.0] * prefix
        for sample in samples:
            branch = sample.labels[prefix:]
            learnt = sum(label != IGNORE_INDEX for label in branch)
            weight = 1.0 / max(1, learnt) if loss_weighting == "sample" else 1.0
            ids += sample.input_ids[prefix:]
            labels += branch
            weights += [weight if label != IGNORE_INDEX else 0.0 for label in branch]
    loss_weights = torch.tensor([weights])
    every = [sample for samples in groups for sample in samples]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "loss_weights": loss_weights,
        "layout": tuple(layout),
        "counts": Counts(
            float(loss_weights.sum()),
            len(every),
            sum(sample.num_questions for sample in every),
            len(ids),
            tuple(sample.index for sample in every),
        ),
        **stack_pictures([samples[0] for samples in groups]),
    }
