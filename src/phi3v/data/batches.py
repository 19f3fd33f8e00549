"""The plan of batches: which records share a step, a rank and a row. `data/rows.py` makes the rows.

A **row** is what a device computes at a time: a padded micro-batch, or records side by side with no padding. In
``shared-image`` packing, records about the same images form a **group** in it: the images and the text before them
once (the prefix), then the rest of each record (its branch). `model/attention.py` draws what sees what. A record's loss
and gradients are those that it has alone.

The plan of an epoch follows from the lengths of the records and their order alone, so every rank makes the same one,
any step of it can be made again, and the records of a step are the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from phi3v.config import Packing
from phi3v.data.balance import abreast, assign_to_ranks, by_rank, even_rows, fill_rows
from phi3v.data.lengths import Ints, RecordLengths
from phi3v.data.order import Order, ShardOrder, Shuffled, earlier_draws
from phi3v.data.work import RecordWork
from phi3v.model.shape import Costs

Group = tuple[int, ...]  # the records of a group; of a padded batch each is its own
Row = tuple[Group, ...]
Step = list[list[Row]]  # the rows of each rank

BY_TOKENS = Costs()
UNEVEN = 1.05  # the most work of a rank over the mean, above which a group may be cut in two


class Chunks(NamedTuple):
    """The records of an epoch in order, and where chunks start among them: records of a page that come together."""

    records: Ints
    starts: Ints


class _Group(NamedTuple):
    """A group, its tokens and its work."""

    records: Group
    tokens: int
    work: float


@dataclass(eq=False)
class BatchPlan:
    """The rows of every rank in every step of an epoch.

    Ranks get equal work: operations of the decoder, of attention within records and groups, and of the vision part.

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
        costs: what ranks are balanced by (`ModelShape.training_costs`); by default tokens.
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
    costs: Costs = BY_TOKENS
    world_size: int = 1
    seed: int = 0
    order: Order | None = None

    def __post_init__(self) -> None:
        self._work = RecordWork(self.lengths, self.costs)
        self._order = self.order or Shuffled(len(self.lengths), self.seed)
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
        lengths, first = self.lengths, group[0]
        if len(group) == 1:
            return int(lengths.tokens[first])
        return int(lengths.prefix[first] + lengths.below[list(group)].sum())

    def work(self, row: Row) -> float:
        """Operations of a row; those of the vision part once for each page."""
        firsts = {int(self.lengths.page[group[0]]): group[0] for group in row}
        work = float(self._work.vision[list(firsts.values())].sum())
        if self.is_packed:
            return work + sum(map(self._work.group, row))
        records = np.array([index for group in row for index in group])
        return work + float(self._work.padded(records, np.zeros(1, dtype=np.int64))[0])

    def branch_pairs(self, row: Row) -> int:
        """Queries of branches times the keys of their group, in all groups of a row that share a prefix."""
        pairs = 0
        for group in row:
            if prefix := int((self.lengths.prefix if len(group) > 1 else self.lengths.own_prefix)[group[0]]):
                tokens = self.tokens(group)
                pairs += (tokens - prefix) * tokens
        return pairs

    def own_shards(self, rank: int, epoch: int) -> list[list[int]]:
        """Of records in shards, the shards of each window that are the rank's."""
        windows = self._order.windows(epoch) if isinstance(self._order, ShardOrder) else []
        return [window[rank :: self.world_size] for window in windows]

    def epoch_tokens(self) -> int:
        """Tokens of the first epoch, but for groups that the end of a step cuts; others differ a little."""
        return int(self._added_tokens(self.chunks(0)).sum())

    def steps(self, epoch: int, first: int = 0, *, equal: bool = False) -> Iterator[Step]:
        """The steps of an epoch in order, from the ``first``. A rank may have no row in one with few records.

        Args:
            equal: ranks meet in every row, so they have equally many, as far as their groups go, and the rows that
                they compute at the same time are alike.
        """
        chunks, homes = self.chunks(epoch), self._homes(epoch)
        starts = self._starts(chunks)[first:].tolist()
        for start, end in zip(starts, [*starts[1:], len(self)], strict=True):
            records = chunks.records[start:end]
            yield self._pack(records, equal, homes) if self.is_packed else self._pad(records, equal, homes)

    def _homes(self, epoch: int) -> Ints | None:
        """(records,) the rank that has its images at hand, and is to compute it where work allows that; -1: any."""
        slots = self._order.slots(epoch) if self.world_size > 1 and isinstance(self._order, ShardOrder) else np.empty(0)
        return np.where(slots < 0, -1, slots % self.world_size) if (slots >= 0).any() else None

    def chunks(self, epoch: int) -> Chunks:
        """All records in the order of the epoch; those of a page in chunks that come together."""
        records, count = self._order.of_epoch(epoch), len(self)
        if self.packing != "shared-image":
            return Chunks(records, np.arange(count))
        # What is drawn again comes again: in the same chunk it would be the same step with another weight.
        times = earlier_draws(records)
        keys = self._keys(records) * (int(times.max(initial=0)) + 1) + times
        by_page = np.argsort(keys, kind="stable")
        sorted_records = records[by_page]
        starts = np.flatnonzero(self._cut_evenly(sorted_records, keys[by_page]))
        sizes = np.diff(starts, append=count)
        # By the place of the record with the lowest index: so a page of many comes no earlier than others.
        lowest = np.repeat(np.minimum.reduceat(sorted_records, starts), sizes)
        places = np.minimum.reduceat(np.where(sorted_records == lowest, by_page, count), starts)
        order = np.argsort(places)
        sizes, moved = sizes[order], starts[order]
        starts = np.cumsum(sizes) - sizes
        return Chunks(sorted_records[np.repeat(moved - starts, sizes) + np.arange(count)], starts)

    def _keys(self, records: Ints) -> Ints:
        """Equal for records that may be in one group. A record that shares nothing is alone, also if drawn twice."""
        shares = self.lengths.prefix[records] > 0
        page = self.lengths.page[records]
        return np.where(shares, page, page.max(initial=0) + 1 + np.arange(len(records)))

    def _cut_evenly(self, records: Ints, keys: Ints) -> npt.NDArray[np.bool_]:
        """Where chunks start among records sorted by page: they fit into a row and have about equally many."""
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        sizes = np.diff(first, append=len(records))
        limits = -(-sizes // -(-sizes // self.shared_image_max))
        cuts = (np.arange(len(records)) - np.repeat(first, sizes)) % np.repeat(limits, sizes) == 0
        starts = np.flatnonzero(cuts)
        tokens = self.lengths.prefix[records[starts]] + np.add.reduceat(self.lengths.below[records], starts)
        too_long = (tokens > self.pack_tokens) & (np.diff(starts, append=len(records)) > 1)
        page_of = np.repeat(np.arange(len(first)), sizes)
        for page in np.unique(page_of[starts[too_long]]):
            start, end = first[page], first[page] + sizes[page]
            below = self.lengths.below[records[start:end]].tolist()
            fitting = self._cut(int(self.lengths.prefix[records[start]]), below, int(limits[page]))
            cuts[start:end] = False
            cuts[start + np.cumsum([0, *fitting[:-1]])] = True
        return cuts

    def _cut(self, prefix: int, below: Sequence[int], limit: int) -> list[int]:
        """Sizes of groups of at most ``limit`` records of a page that fit into a row."""
        sizes: list[int] = []
        tokens = 0
        for branch in below:
            if sizes and sizes[-1] < limit and tokens + branch <= self.pack_tokens:
                sizes[-1] += 1
                tokens += branch
            else:
                sizes.append(1)
                tokens = prefix + branch
        return sizes

    def _added_tokens(self, chunks: Chunks) -> Ints:
        """Tokens that each record adds, in the order of ``chunks``."""
        records, starts = chunks
        lengths = self.lengths
        added = lengths.below[records]
        first = records[starts]
        alone = np.diff(starts, append=len(records)) == 1
        added[starts] = np.where(alone, lengths.tokens[first], lengths.prefix[first] + lengths.below[first])
        return added

    def _starts(self, chunks: Chunks) -> Ints:
        """Where each step starts among the records in their order."""
        places = np.arange(self.num_steps)
        if self.batch_tokens is None:
            return places * self.batch_size
        reached = np.cumsum(self._added_tokens(chunks))
        wanted = reached[-1] / self.num_steps * places
        # At least one record a step, from the front and from the back.
        front = np.maximum.accumulate(np.searchsorted(reached, wanted, side="right") - places) + places
        return np.minimum(front, len(self) - places[::-1] - 1)

    def _pad(self, records: Ints, equal: bool, homes: Ints | None) -> Step:
        """Padded rows of a step: of records that are alike in length, so that little is padded."""
        records = records[np.argsort(-self.lengths.longest[records], kind="stable")]
        if homes is not None:
            records = records[np.argsort(homes[records], kind="stable")]
        starts = np.arange(0, len(records), self.micro_batch_size)
        work = (np.add.reduceat(self._work.vision[records], starts) + self._work.padded(records, starts)).tolist()
        groups: list[Group] = [(index,) for index in records.tolist()]
        rows = [tuple(groups[start : start + self.micro_batch_size]) for start in starts.tolist()]
        preferred = None if homes is None else homes[records[starts]].tolist()
        if equal or len(rows) <= self.world_size:
            ranks = abreast(work, self.world_size, preferred)
        else:
            ranks = by_rank(assign_to_ranks(work, self.world_size, preferred), self.world_size)
        return [[rows[place] for place in places] for places in ranks]

    def _pack(self, records: Ints, equal: bool, homes: Ints | None) -> Step:
        """The groups of a step to the ranks, then into rows."""
        groups = self._groups(records)
        while len(groups) < self.world_size and len((most := max(groups, key=lambda g: len(g.records))).records) > 1:
            groups.remove(most)
            groups += self._halves(most)
        assigned = self._assign(groups, homes)
        while (halved := self._halve_one(groups, assigned, homes)) is not None:
            groups, assigned = halved
        ranks = [[groups[place] for place in places] for places in by_rank(assigned, self.world_size)]
        filled = [fill_rows([group.tokens for group in own], self.pack_tokens) for own in ranks]
        if equal:
            rows = max(map(len, filled))
            for rank, own in enumerate(ranks):
                work, tokens = [group.work for group in own], [group.tokens for group in own]
                filled[rank] = even_rows(work, tokens, self.pack_tokens, rows) or filled[rank]
        return [
            [tuple(own[place].records for place in row) for row in rows]
            for own, rows in zip(ranks, filled, strict=True)
        ]

    def _assign(self, groups: Sequence[_Group], homes: Ints | None) -> list[int]:
        # A page of several sources is read where the first of them has it.
        preferred = None if homes is None else homes[[min(group.records) for group in groups]].tolist()
        return assign_to_ranks([group.work for group in groups], self.world_size, preferred)

    def _groups(self, records: Ints) -> list[_Group]:
        """The records of a step; those of a page together, as far as they fit into a row."""
        singles = zip(
            records.tolist(),
            self.lengths.tokens[records].tolist(),
            (self._work.vision[records] + self._work.single[records]).tolist(),
            strict=True,
        )
        alone = [_Group((index,), tokens, work) for index, tokens, work in singles]
        if self.packing == "samples":
            return alone
        pages: dict[int, list[int]] = {}
        for place, key in enumerate(self._keys(records).tolist()):
            pages.setdefault(key, []).append(place)
        prefix, below = self.lengths.prefix[records].tolist(), self.lengths.below[records].tolist()
        page_work = (self._work.vision[records] + self._work.prefix[records]).tolist()
        branch_work = self._work.branch[records].tolist()
        groups: list[_Group] = []
        for places in pages.values():
            end = 0
            first = places[0]
            for size in self._cut(prefix[first], [below[place] for place in places], len(places)):
                own, end = places[end : end + size], end + size
                if size == 1:
                    groups.append(alone[own[0]])
                else:
                    tokens = prefix[first] + sum(below[place] for place in own)
                    work = page_work[own[0]] + sum(branch_work[place] for place in own)
                    groups.append(_Group(tuple(alone[place].records[0] for place in own), tokens, work))
        return groups

    def _halves(self, group: _Group) -> list[_Group]:
        middle = len(group.records) // 2
        halves = group.records[:middle], group.records[middle:]
        vision = float(self._work.vision[group.records[0]])
        return [_Group(half, self.tokens(half), vision + self._work.group(half)) for half in halves]

    def _halve_one(
        self, groups: list[_Group], assigned: list[int], homes: Ints | None
    ) -> tuple[list[_Group], list[int]] | None:
        """With the largest group of the rank that has the most work cut in two, where that pays in spite of the prefix
        that is computed twice.
        """
        loads = np.bincount(assigned, [group.work for group in groups], self.world_size)
        most = float(loads.max())
        if most <= UNEVEN * loads.mean():
            return None
        worst = int(loads.argmax())
        own = [group for group, rank in zip(groups, assigned, strict=True) if rank == worst and len(group.records) > 1]
        if not own:
            return None
        largest = max(own, key=lambda group: group.work)
        halves = self._halves(largest)
        if loads.sum() - largest.work + sum(half.work for half in halves) > 0.99 * most * self.world_size:
            return None  # even shared out equally it is no less
        others = [group for group in groups if group is not largest] + halves
        again = self._assign(others, homes)
        return (others, again) if np.bincount(again, [g.work for g in others]).max() < 0.99 * most else None


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
    for step in plan.steps(epoch, first_step, equal=equal):
        own = step[rank]
        rows = [RowPlan(row, ends_step=False) for row in own]
        if missing := max(map(len, step)) - len(own) if equal else int(not own):
            smallest = min(own or [row for rows in step for row in rows], key=plan.work)
            rows[-1:-1] = [RowPlan(smallest, ends_step=False, fills=True)] * missing
        yield from rows[:-1]
        yield replace(rows[-1], ends_step=True)
