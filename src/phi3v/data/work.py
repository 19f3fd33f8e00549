"""What records cost to train on, by what they are in a row with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from phi3v.data.lengths import Ints, RecordLengths
from phi3v.model.shape import Costs

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RecordWork:
    """The work of records and rows, in the unit of ``costs``: operations, or tokens."""

    lengths: RecordLengths
    costs: Costs

    @cached_property
    def vision(self) -> Floats:
        """(n,) of the vision part for each record's images. Of a row it is computed once for each page."""
        return self.costs.crop * self.lengths.crops + self.costs.image_token * self.lengths.image_tokens

    @cached_property
    def single(self) -> Floats:
        """(n,) of each record by itself in a packed row, beside the vision part."""
        lengths, shared = self.lengths, self.lengths.own_prefix
        own = lengths.tokens - shared
        # The answers of a record as if they were equally long.
        pairs = shared**2 + 2 * shared * own + own**2 / lengths.answers
        return self.costs.token * lengths.tokens + self.costs.pair * pairs + self.costs.target * lengths.targets

    @cached_property
    def prefix(self) -> Floats:
        """(n,) of a prefix that several records share, beside the vision part."""
        return self.costs.token * self.lengths.prefix + self.costs.pair * self.lengths.prefix**2

    @cached_property
    def branch(self) -> Floats:
        """(n,) that each record adds to a group."""
        below, prefix = self.lengths.below, self.lengths.prefix
        pairs = 2 * prefix * below + below**2 / self.lengths.answers
        return self.costs.token * below + self.costs.pair * pairs + self.costs.target * self.lengths.targets

    def group(self, records: tuple[int, ...]) -> float:
        """Of a group of a packed row, beside the vision part."""
        if len(records) == 1:
            return float(self.single[records[0]])
        return float(self.prefix[records[0]] + self.branch[list(records)].sum())

    def padded(self, records: Ints, starts: Ints) -> Floats:
        """Of padded rows that start at ``starts`` among ``records``, beside the vision part."""
        lengths, costs = self.lengths, self.costs
        width = np.maximum.reduceat(lengths.longest[records], starts)
        samples, targets = (np.add.reduceat(each[records], starts) for each in (lengths.answers, lengths.targets))
        work: Floats = samples * (costs.token * width + costs.pair * width**2) + costs.target * targets
        return work
