"""The plan of batches: which records every rank computes in every step.

A **row** is what a device computes at a time: a padded micro-batch, or records side by side (see `packing.py`). The
plan of an epoch follows from the data, the seed and the epoch alone, so every rank makes the same one, any step of it
can be made again, and the records of a step are the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from phi3v.data.collate import Counts
from phi3v.data.readers import Readers

Group = tuple[int, ...]  # the records of a group; of a padded batch each is its own
Row = tuple[Group, ...]
Step = list[list[Row]]  # the rows of each rank


class BatchPlan:
    """Padded micro-batches: records in the order of accelerate's seeded sampler, dealt to the ranks in turn.

    Args:
        num_records: in the data.
        batch_size: records of a step, over all ranks. The last step of an epoch has what is left.
        micro_batch_size: records of a row.
        world_size: ranks.
        seed: of the order.
    """

    def __init__(
        self, num_records: int, *, batch_size: int, micro_batch_size: int = 1, world_size: int = 1, seed: int = 0
    ) -> None:
        self.num_records = num_records
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.world_size = world_size
        self.seed = seed
        self.num_steps = -(-num_records // batch_size)

    def steps(self, epoch: int, first: int = 0) -> Iterator[Step]:
        """The steps of an epoch in order, from the ``first``. A rank may have no row in one with few records."""
        order = self.order(epoch)
        for step in range(first, self.num_steps):
            records = order[step * self.batch_size : (step + 1) * self.batch_size]
            size = self.micro_batch_size
            rows: list[Row] = [
                tuple((index,) for index in records[start : start + size]) for start in range(0, len(records), size)
            ]
            yield [rows[rank :: self.world_size] for rank in range(self.world_size)]

    def order(self, epoch: int) -> list[int]:
        """All records in the order of an epoch."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order: list[int] = torch.randperm(self.num_records, generator=generator).tolist()
        return order

    def size(self, row: Row) -> int:
        """What a row costs, to compare it with others."""
        return sum(map(len, row))


@dataclass(frozen=True)
class RowPlan:
    """A row to make, whether it is its rank's last of a step, and whether nothing is to be learnt from it."""

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
        smallest = min(own or [row for rows in step for row in rows], key=plan.size)
        missing = max(map(len, step)) - len(own) if equal else int(not own)
        rows = [RowPlan(row, ends_step=False) for row in own]
        rows[-1:-1] = [RowPlan(smallest, ends_step=False, fills=True)] * missing
        yield from rows[:-1]
        yield replace(rows[-1], ends_step=True)


class PaddedDataset(Dataset[dict[str, Any]]):
    """Padded micro-batches, made as a plan asks for them.

    Args:
        samples: by their records' indices.
        collate: makes a batch of them.
    """

    def __init__(self, samples: Dataset[Any], collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.samples = samples
        self.collate = collate

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, plan: RowPlan) -> dict[str, Any]:
        batch = self.collate([self.samples[index] for (index,) in plan.row])
        return finish_row(batch, plan)


def finish_row(row: dict[str, Any], plan: RowPlan) -> dict[str, Any]:
    """What a row is to the step that it belongs to."""
    if plan.fills:
        row = without_weight(row) | {"counts": Counts(0.0, 0, 0, 0)}
    return row | {"ends_step": plan.ends_step}


def without_weight(row: dict[str, Any]) -> dict[str, Any]:
    """A row that is computed as the others are and changes nothing, for ranks that must run one."""
    counts = Counts(0.0, 0, 0, 0, row["counts"].records)
    return row | {"loss_weights": torch.zeros_like(row["loss_weights"]), "counts": counts}


def read_steps(
    plan: BatchPlan,
    rank: int,
    readers: Readers,
    epoch: int,
    *,
    first_step: int = 0,
    equal: bool = False,
    pin_memory: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """The steps of an epoch, each as the list of a rank's rows; nothing is read of those before ``first_step``.

    Args:
        readers: fetch the row of a `RowPlan`.
        equal: as of `rows_of_rank`.
        pin_memory: put tensors where a GPU copies from without waiting.
    """
    rows: list[dict[str, Any]] = []
    for row in readers.read(rows_of_rank(plan, rank, epoch, first_step=first_step, equal=equal)):
        ends_step = row.pop("ends_step")
        rows.append(_pinned(row) if pin_memory else row)
        if ends_step:
            yield rows
            rows = []


def _pinned(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in row.items()}
