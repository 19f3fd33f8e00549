"""In which order an epoch takes the records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, zip_longest
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from phi3v.config import DataSource


class Order(Protocol):
    """The records of each epoch, one after the other. What it gives follows from the epoch alone."""

    def __len__(self) -> int:
        """Records of an epoch, equally many in every one; one that is drawn twice counts twice."""

    def of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """(len,) the indices of the records."""


@runtime_checkable
class ShardOrder(Order, Protocol):
    """An order of records that are in shards, of which ranks take those of a window in turn."""

    def windows(self, epoch: int) -> list[list[int]]:
        """The shards that are read at the same time, one such window after the other."""

    def slots(self, epoch: int) -> npt.NDArray[np.int64]:
        """(records,) the place of each record's shard in its window; -1 where it matters not which rank reads it."""


@dataclass(frozen=True)
class Shuffled:
    """Each of ``records`` once, in the order of torch's seeded sampler."""

    records: int
    seed: int

    def __len__(self) -> int:
        return self.records

    def of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order: npt.NDArray[np.int64] = torch.randperm(self.records, generator=generator).numpy()
        return order


@dataclass(frozen=True)
class ShardWindows:
    """The records of shards, which stand one shard after the other: a window of shards at a time.

    The shards are permuted, and cut into windows. Within a window each shard's records are shuffled and spread evenly
    over it, so that any stretch of it draws about equally from all of its shards.

    Attributes:
        shards: records of each shard.
        window: shards that are read at the same time. Ranks do not enter, so records come in the same order on any
            number of them.
        fetched: whether a rank fetches its shards whole; otherwise it matters not which rank reads a record.
    """

    shards: tuple[int, ...]
    window: int
    seed: int
    fetched: bool = True

    def __len__(self) -> int:
        return sum(self.shards)

    def windows(self, epoch: int) -> list[list[int]]:
        shards = self._shuffled(epoch)
        return [shards[start : start + self.window] for start in range(0, len(shards), self.window)]

    def of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        starts = np.cumsum((0, *self.shards))
        order = []
        for window in self.windows(epoch):
            places, records = [], []
            for shard in window:
                count = self.shards[shard]
                random = np.random.default_rng([self.seed, epoch, shard])
                places.append((np.arange(count) + random.random(count)) / max(1, count))
                records.append(starts[shard] + random.permutation(count))
            order.append(np.concatenate(records)[np.argsort(np.concatenate(places), kind="stable")])
        return np.concatenate(order) if order else np.empty(0, dtype=np.int64)

    def slots(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.repeat(_slots(self.windows(epoch) if self.fetched else [], len(self.shards)), self.shards)

    def _shuffled(self, epoch: int) -> list[int]:
        # Shards without records are nobody's.
        order = Shuffled(len(self.shards), self.seed).of_epoch(epoch).tolist()
        return [shard for shard in order if self.shards[shard]]


@dataclass(frozen=True)
class Mixed:
    """So many records of each of several sources, which stand one after the other, shuffled together.

    A source of ``n`` records of which an epoch takes ``k`` gives each of them ``k // n`` times, and the rest of ``k``
    once more: the next ones of a fixed shuffled round, so that over the epochs all come equally often. Records of a
    source that is in shards come in the order of its windows, between those of the others.

    Shards that are fetched are numbered through, source after source. What is one rank's own in the first pass over a
    source stays so in the others, so that no other rank fetches it.

    Attributes:
        sizes: records of each source.
        counts: how many an epoch takes of each.
        windows_of: the order of each source that is in shards.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    seed: int
    windows_of: tuple[ShardWindows | None, ...] = ()

    def __len__(self) -> int:
        return sum(self.counts)

    def of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        starts = np.cumsum([0, *self.sizes])
        drawn = np.concatenate([start + self._of_source(place, epoch) for place, start in enumerate(starts[:-1])])
        taken: npt.NDArray[np.int64] = drawn[Shuffled(len(drawn), self.seed).of_epoch(epoch)]
        for place, windows in enumerate(self.windows_of):
            if windows is not None:
                start = starts[place]
                own = (taken >= start) & (taken < starts[place + 1])
                taken[own] = start + self._in_windows(windows, taken[own] - start, epoch)
        return taken

    def windows(self, epoch: int) -> list[list[int]]:
        """The first windows of all sources together, then their second ones."""
        of_sources = [
            [[first + shard for shard in window] for window in shards.windows(epoch * self._passes(place))]
            for place, (shards, first) in enumerate(self._numbered())
            if shards is not None and shards.fetched
        ]
        return [list(chain.from_iterable(windows)) for windows in zip_longest(*of_sources, fillvalue=())]

    def slots(self, epoch: int) -> npt.NDArray[np.int64]:
        numbered = self._numbered()
        slots = _slots(self.windows(epoch), sum(len(shards.shards) for shards, _ in numbered if shards is not None))
        of_sources = [
            np.full(size, -1) if shards is None else np.repeat(slots[first : first + len(shards.shards)], shards.shards)
            for size, (shards, first) in zip(self.sizes, numbered, strict=True)
        ]
        return np.concatenate(of_sources)

    def _numbered(self) -> list[tuple[ShardWindows | None, int]]:
        """Of each source its shards, and the number of the first of them."""
        of_sources = self.windows_of or (None,) * len(self.sizes)
        counts = [0 if shards is None else len(shards.shards) for shards in of_sources]
        return list(zip(of_sources, accumulate(counts, initial=0), strict=False))

    def _passes(self, place: int) -> int:
        """How often an epoch goes over a source, the last time perhaps over a part of it."""
        return -(-self.counts[place] // self.sizes[place])

    def _of_source(self, place: int, epoch: int) -> npt.NDArray[np.int64]:
        size = self.sizes[place]
        whole, rest = divmod(self.counts[place], size)
        taken = [np.arange(size)] * whole
        if rest:
            around = np.random.default_rng([self.seed, place]).permutation(size)
            taken.append(around[(epoch * rest + np.arange(rest)) % size])
        return np.concatenate(taken)

    @staticmethod
    def _in_windows(windows: ShardWindows, records: npt.NDArray[np.int64], epoch: int) -> npt.NDArray[np.int64]:
        """Draws of a source in the order of its windows, one pass after the other."""
        times = earlier_draws(records)
        passes = int(times.max(initial=-1)) + 1
        ordered = []
        for time in range(passes):
            order = windows.of_epoch(epoch * passes + time)
            ordered.append(order[np.isin(order, records[times == time])])
        return np.concatenate(ordered) if ordered else records


def _slots(windows: Iterable[Sequence[int]], shards: int) -> npt.NDArray[np.int64]:
    """(shards,) the place of each in its window, -1 where it is in none."""
    slots = np.full(shards, -1)
    for window in windows:
        slots[list(window)] = np.arange(len(window))
    return slots


def earlier_draws(order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(n,) how often each index stands in ``order`` before that place."""
    by_index = np.argsort(order, kind="stable")
    _, first, counts = np.unique(order[by_index], return_index=True, return_counts=True)
    times = np.empty_like(order)
    times[by_index] = np.arange(len(order)) - np.repeat(first, counts)
    return times


def epoch_counts(sources: Sequence[DataSource], sizes: Sequence[int], ends: Literal["first", "all"]) -> list[int]:
    """How many records of each source an epoch takes; at least one.

    Args:
        sizes: records of each source.
        ends: of sources with weights, whether an epoch takes each record of the one that runs out first, or of the one
            that runs out last, exactly once.
    """
    pairs = list(zip(sources, sizes, strict=True))
    whole = [size / source.weight for source, size in pairs if source.weight is not None]
    records_per_weight = (min if ends == "first" else max)(whole, default=0.0)

    def count(source: DataSource, size: int) -> int:
        if source.weight is not None:
            return round(source.weight * records_per_weight)
        if source.epochs is not None:
            return round(source.epochs * size)
        return min(size, source.max_records or size)

    return [max(1, count(source, size)) for source, size in pairs]


def share_out(limit: int, counts: Sequence[int]) -> list[int]:
    """``limit`` in proportion to ``counts``, whose sum is no less; where it suffices for that, 1 at least of each."""
    total = sum(counts)
    least = int(limit >= len(counts))
    shares = [max(least, limit * count // total) for count in counts]

    def excess(place: int) -> float:
        return shares[place] - limit * counts[place] / total

    while (surplus := sum(shares) - limit) != 0:
        if surplus > 0:
            shares[max((place for place, share in enumerate(shares) if share > least), key=excess)] -= 1
        else:
            shares[min(range(len(shares)), key=excess)] += 1
    return shares
