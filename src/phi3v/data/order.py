"""In which order an epoch takes the records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


class Order(Protocol):
    """The records of each epoch, one after the other. What it gives follows from the epoch alone."""

    def __len__(self) -> int:
        """Records of an epoch, equally many in every one; one that is drawn twice counts twice."""

    def of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """(len,) the indices of the records."""


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
    """

    shards: tuple[int, ...]
    window: int
    seed: int

    def __len__(self) -> int:
        return sum(self.shards)

    def windows(self, epoch: int) -> list[list[int]]:
        """The shards of each window, in order."""
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
        """(len,) of each record the place of its shard in its window: ranks take these in turn."""
        slots = np.zeros(len(self.shards), dtype=np.int64)
        for window in self.windows(epoch):
            slots[window] = np.arange(len(window))
        return np.repeat(slots, self.shards)

    def _shuffled(self, epoch: int) -> list[int]:
        # Shards without records are nobody's.
        order = Shuffled(len(self.shards), self.seed).of_epoch(epoch).tolist()
        return [shard for shard in order if self.shards[shard]]
