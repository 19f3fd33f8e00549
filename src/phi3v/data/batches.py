"""The plan of batches: which records share a step, a rank and a row. `data/rows.py` makes the rows.

A **row** is what a device computes at a time: a padded micro-batch, or records side by side with no padding. In
``shared-image`` packing, records about the same images form a **group** in it: the images and the text before them
once (the prefix), then the rest of each record (its branch). `model/attention.py` draws what sees what. A record's loss
and gradients are those that it has alone.

The plan of an epoch follows from the lengths of the records and their order alone, so every rank makes the same one,
any step of it can be made again, and the records of a step are the same on any number of ranks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import chain, groupby, islice

import numpy as np
import numpy.typing as npt

from phi3v.config import Packing
from phi3v.data.lengths import RecordLengths
from phi3v.data.order import Order, Shuffled

Group = tuple[int, ...]  # the records of a group; of a padded batch each is its own
Row = tuple[Group, ...]
Step = list[list[Row]]  # the rows of each rank


def assign_to_ranks(work: Sequence[float], ranks: int, most: int | None = None) -> list[int]:
    """The rank of each item: the largest first, each to the rank that has the least work so far.

    Args:
        most: items of a rank at most.
    """
    assigned, counts = [0] * len(work), [0] * ranks
    loads = [(0.0, rank) for rank in range(ranks)]
    for item in sorted(range(len(work)), key=lambda item: -work[item]):
        load, rank = heapq.heappop(loads)
        assigned[item] = rank
        counts[rank] += 1
        if counts[rank] != most:
            heapq.heappush(loads, (load + work[item], rank))
    return assigned


@dataclass(eq=False)
class BatchPlan:
    """The rows of every rank in every step of an epoch.

    Rows are given to ranks by their work: tokens, and crops of the vision tower at ``crop_cost``.

    Args:
        lengths: of the records.
        packing: ``none``: padded rows; ``samples``: every record by itself; ``shared-image``: records of a page in
            groups, where one of them comes in the order.
        batch_size: records of a step, over all ranks. The last step of an epoch has what is left.
        micro_batch_size: records of a padded row.
        batch_tokens: in place of ``batch_size``, about so many tokens a step.
        pack_tokens: tokens of a packed row at most, unless one record has more.
        shared_image_max: records of a group at most, when the pages are cut. Two groups of a page that chance brings
            into one step become one.
        crop_cost: what a crop costs, in tokens (`ModelShape.crop_cost`).
        world_size: ranks.
        order: of the records in each epoch; by default all of them, shuffled by ``seed``.
    """

    lengths: RecordLengths
    packing: Packing = "none"
    _: KW_ONLY
    batch_size: int
    micro_batch_size: int = 1
    batch_tokens: int | None = None
    pack_tokens: int = 0
    shared_image_max: int = 1
    crop_cost: float = 0.0
    world_size: int = 1
    seed: int = 0
    order: Order | None = None

    def __post_init__(self) -> None:
        # Plain numbers: one at a time they are looked up far faster than out of an array.
        lengths = self.lengths
        self._order = self.order or Shuffled(len(lengths), self.seed)
        self._tokens: list[int] = lengths.tokens.tolist()
        self._prefix: list[int] = lengths.prefix.tolist()
        self._own_prefix: list[int] = lengths.own_prefix.tolist()
        self._below: list[int] = lengths.below.tolist()
        self._answers: list[int] = lengths.answers.tolist()
        self._longest: list[int] = lengths.longest.tolist()
        self._page: list[int] = lengths.page.tolist()
        self._crops: list[int] = lengths.crops.tolist()
        self.num_steps = -(-len(self) // self.batch_size)
        if self.batch_tokens is not None:
            self.num_steps = min(max(1, round(self.epoch_tokens() / self.batch_tokens)), len(self))

    def __len__(self) -> int:
        """Records of an epoch."""
        return len(self._order)

    @property
    def is_packed(self) -> bool:
        return self.packing != "none"

    def tokens(self, group: Group) -> int:
        """Tokens that a group has in a row."""
        if len(group) == 1:
            return self._tokens[group[0]]
        return self._prefix[group[0]] + sum(self._below[index] for index in group)

    def work(self, row: Row) -> float:
        """What a row costs, in tokens."""
        crops = self.crop_cost * sum(self._crops[group[0]] for group in row)
        if self.is_packed:
            return crops + sum(self.tokens(group) for group in row)
        records = [index for group in row for index in group]
        samples = sum(self._answers[index] for index in records)
        return crops + samples * max(self._longest[index] for index in records)

    def branch_pairs(self, row: Row) -> int:
        """Queries of branches times the keys of their group, in all groups of a row that share a prefix."""
        pairs = 0
        for group in row:
            if prefix := (self._prefix if len(group) > 1 else self._own_prefix)[group[0]]:
                tokens = self.tokens(group)
                pairs += (tokens - prefix) * tokens
        return pairs

    def epoch_tokens(self) -> int:
        """Tokens of the first epoch, but for groups that the end of a step cuts; others differ a little."""
        return int(self._added_tokens(self._chunks(0)).sum())

    def steps(self, epoch: int, first: int = 0) -> Iterator[Step]:
        """The steps of an epoch in order, from the ``first``. A rank may have no row in one with few records."""
        chunks = self._chunks(epoch)
        order = list(chain.from_iterable(chunks))
        chunk_of = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])
        for start, end in islice(zip(*self._bounds(chunks), strict=True), first, None):
            pieces = groupby(range(start, end), key=lambda place: chunk_of[place])
            groups = [tuple(order[place] for place in places) for _, places in pieces]
            yield self._pack(groups) if self.is_packed else self._pad(groups)

    def _chunks(self, epoch: int) -> list[Group]:
        """All records in the order of the epoch; those of a page in chunks that come together."""
        order = self._order.of_epoch(epoch).tolist()
        if self.packing != "shared-image":
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
            branch = self._below[index]
            if groups and len(groups[-1]) < limit and tokens + branch <= self.pack_tokens:
                groups[-1].append(index)
                tokens += branch
            else:
                groups.append([index])
                tokens = self._prefix[index] + branch
        return [tuple(group) for group in groups]

    def _added_tokens(self, chunks: Sequence[Group]) -> npt.NDArray[np.int64]:
        """Tokens that each record adds, in the order of ``chunks``."""
        order, sizes = list(chain.from_iterable(chunks)), np.array([len(chunk) for chunk in chunks])
        lengths, starts = self.lengths, np.cumsum(sizes) - sizes
        added = lengths.below[order]
        first = np.array(order)[starts]
        added[starts] = np.where(sizes == 1, lengths.tokens[first], lengths.prefix[first] + lengths.below[first])
        return added

    def _bounds(self, chunks: Sequence[Group]) -> tuple[list[int], list[int]]:
        """Where each step starts and ends among the records in their order."""
        if self.batch_tokens is None:
            starts = [step * self.batch_size for step in range(self.num_steps)]
        else:
            reached = np.cumsum(self._added_tokens(chunks))
            wanted = reached[-1] / self.num_steps * np.arange(self.num_steps)
            places = np.arange(self.num_steps)
            # At least one record a step, from the front and from the back.
            front = np.maximum.accumulate(np.searchsorted(reached, wanted, side="right") - places) + places
            starts = np.minimum(front, len(self) - places[::-1] - 1).tolist()
        return starts, [*starts[1:], len(self)]

    def _pad(self, groups: list[Group]) -> Step:
        """Padded rows of a step, as evenly many on each rank as can be."""
        size = self.micro_batch_size
        rows: list[Row] = [tuple(groups[start : start + size]) for start in range(0, len(groups), size)]
        return self._assign(rows, math.ceil(len(rows) / self.world_size))

    def _pack(self, groups: list[Group]) -> Step:
        """The groups of a step to the ranks, then into rows."""
        if self.packing == "shared-image":
            pages: dict[int, list[int]] = {}
            for group in groups:
                pages.setdefault(self._page[group[0]], []).extend(group)
            groups = [group for records in pages.values() for group in self._cut(records)]
        while len(groups) < self.world_size and len(largest := max(groups, key=len)) > 1:
            groups.remove(largest)
            groups += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        return [self._fill([group for (group,) in rows]) for rows in self._assign([(group,) for group in groups])]

    def _assign(self, rows: Sequence[Row], most: int | None = None) -> Step:
        ranks = assign_to_ranks([self.work(row) for row in rows], self.world_size, most)
        return [[row for row, at in zip(rows, ranks, strict=True) if at == rank] for rank in range(self.world_size)]

    def _fill(self, groups: Sequence[Group]) -> list[Row]:
        """Groups into rows by best fit, the largest first: each goes where it leaves the least room."""
        rows: list[list[Group]] = []
        room: list[int] = []
        for tokens, group in sorted(((self.tokens(group), group) for group in groups), key=lambda sized: -sized[0]):
            fits = [place for place, left in enumerate(room) if left >= tokens]
            if fits:
                place = min(fits, key=lambda place: room[place])
                rows[place].append(group)
                room[place] -= tokens
            else:
                rows.append([group])
                room.append(self.pack_tokens - tokens)
        return [tuple(row) for row in rows]


@dataclass(frozen=True)
class RowPlan:
    """A row to make, whether it is its rank's last of a step, and whether it only fills: then it weighs nothing."""

    row: Row
    ends_step: bool
    fills: bool = False


def rows_of_rank(
    plan: BatchPlan, rank: int, epoch: int, *, first_step: int = 0, equal: bool = False
) -> Iterator[RowPlan]:
    """The rows of one rank, step by step.

    A rank that has none in a step runs the smallest of the others, to no effect, as all ranks meet in every step.

    Args:
        equal: all ranks have equally many rows a step. Those with fewer run their smallest again, to no effect.
    """
    for step in plan.steps(epoch, first_step):
        own = step[rank]
        smallest = min(own or [row for rows in step for row in rows], key=plan.work)
        missing = max(map(len, step)) - len(own) if equal else int(not own)
        rows = [RowPlan(row, ends_step=False) for row in own]
        rows[-1:-1] = [RowPlan(smallest, ends_step=False, fills=True)] * missing
        yield from rows[:-1]
        yield replace(rows[-1], ends_step=True)
