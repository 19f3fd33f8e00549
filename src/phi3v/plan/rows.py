"""What packing makes of a dataset: the rows that training would lay, by the code that lays them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import islice

import numpy as np

from phi3v.config import RunConfig
from phi3v.data.batches import BatchPlan, Row
from phi3v.data.lengths import RecordLengths
from phi3v.data.work import RecordWork
from phi3v.model.shape import Costs
from phi3v.plan.inputs import TrainSetup
from phi3v.plan.throughput import SampleWork
from phi3v.plan.workload import Workload
from phi3v.train.compute.activations import MicroBatch

STEPS = 200  # of the first epoch that are looked at


@dataclass(frozen=True)
class PackedRows:
    """Rows of the first steps of an epoch.

    Attributes:
        largest: the most of everything that a row has, the longest record included.
        work: of the mean record, its share of a shared page included.
        row_count: rows of a rank in a step, on average.
        most_rows: in any step.
        filled: share of the rows' room that holds tokens.
        steps: of an epoch.
    """

    largest: MicroBatch
    work: SampleWork
    row_count: float
    most_rows: int
    filled: float
    steps: int


def pack_workload(workload: Workload, setup: TrainSetup, config: RunConfig, costs: Costs) -> PackedRows:
    """The rows of a dataset as ``setup`` packs it."""
    lengths = workload.at(setup.num_crops).lengths
    if workload.is_assumed:
        lengths = lengths.repeated(-(-config.training.batch_size // len(workload)))
    plan = BatchPlan(
        lengths,
        setup.packing,
        batch_size=config.training.batch_size,
        batch_tokens=config.training.batch_tokens,
        pack_tokens=setup.pack_tokens,
        shared_image_max=config.data.shared_image_max,
        costs=costs,
        world_size=setup.gpus,
        seed=config.training.seed,
    )
    ranks = [rank for step in islice(plan.steps(0), STEPS) for rank in step]
    rows = [row for rank in ranks for row in rank]
    measured = _Measures(lengths)
    # (rows, 6): tokens, image tokens, crops, answer tokens, pairs that attention needs, pairs under a mask
    figures = np.array([(*measured.of(row), plan.branch_pairs(row)) for row in rows], dtype=np.int64)
    records = sum(len(group) for row in rows for group in row)
    most, total = figures.max(axis=0), figures.sum(axis=0) / records
    return PackedRows(
        largest=MicroBatch(
            rows=1,
            tokens=max(int(most[0]), int(lengths.tokens.max())),
            image_tokens=max(int(most[1]), int(lengths.image_tokens.max())),
            crops=max(int(most[2]), int(lengths.crops.max())),
            answer_tokens=int(most[3]),
            branch_pairs=int(most[5]),
        ),
        work=SampleWork(
            tokens=float(total[0]),
            tokens_squared=float(total[4]),
            image_tokens=float(total[1]),
            crops=float(total[2]),
            answer_tokens=float(total[3]),
        ),
        row_count=len(rows) / len(ranks),
        most_rows=max(len(rank) for rank in ranks),
        filled=float((figures[:, 0] / np.maximum(figures[:, 0], setup.pack_tokens)).mean()),
        steps=plan.num_steps,
    )


class _Measures:
    """Counts of single rows."""

    def __init__(self, lengths: RecordLengths) -> None:
        self.lists: dict[str, list[int]] = {
            field.name: getattr(lengths, field.name).tolist() for field in fields(lengths)
        }
        self.pairs = RecordWork(lengths, Costs(token=0.0, pair=1.0))

    def of(self, row: Row) -> tuple[int, int, int, int, int]:
        of, crops = self.lists, dict[int, int]()
        tokens = images = targets = 0
        for group in row:
            first = group[0]
            prefix = of["prefix" if len(group) > 1 else "own_prefix"][first]
            records = [of["below"][index] for index in group] if len(group) > 1 else [of["tokens"][first] - prefix]
            tokens += prefix + sum(records)
            images += of["image_tokens"][first]
            crops[of["page"][first]] = of["crops"][first]  # a page of several groups is computed once
            targets += sum(of["targets"][index] for index in group)
        needed = round(sum(map(self.pairs.group, row)))
        return tokens, images, sum(crops.values()), targets, needed
