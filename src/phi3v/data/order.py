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
