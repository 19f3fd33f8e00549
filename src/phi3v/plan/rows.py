"""What packing makes of a dataset: the rows that training would lay, by the code that lays them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from phi3v.config import RunConfig
from phi3v.data.batches import Row
from phi3v.data.packing import PackingPlan, RecordLengths
from phi3v.plan.inputs import TrainSetup
from phi3v.plan.throughput import SampleWork
from phi3v.plan.workload import LONG_CONTEXT, CropChoice, Workload
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


def pack_workload(workload: Workload, setup: TrainSetup, config: RunConfig) -> PackedRows:
    """The rows of a dataset as ``setup`` packs it."""
    repeats = -(-config.training.batch_size // len(workload)) if workload.is_assumed else 1
    choice = workload.at(setup.num_crops)
    lengths = record_lengths(workload, choice, repeats)
    plan = PackingPlan(
        lengths,
        setup.packing,
        batch_size=config.training.batch_size,
        batch_tokens=config.training.batch_tokens,
        pack_tokens=setup.pack_tokens,
        shared_image_max=config.data.shared_image_max,
        world_size=setup.gpus,
        seed=config.training.seed,
    )
    ranks = [rank for step in islice(plan.steps(0), STEPS) for rank in step]
    rows = [row for rank in ranks for row in rank]
    measured = _Measures(lengths, workload, choice)
    # (rows, 6): tokens, image tokens, crops, answer tokens, pairs that attention needs, pairs under a mask
    figures = np.array([(*measured.of(row), plan.branch_pairs(row)) for row in rows], dtype=np.int64)
    records = sum(len(group) for row in rows for group in row)
    most, total = figures.max(axis=0), figures.sum(axis=0) / records
    return PackedRows(
        largest=MicroBatch(
            rows=1,
            tokens=max(int(most[0]), int(choice.tokens.max())),
            image_tokens=max(int(most[1]), int(choice.image_tokens.max())),
            crops=max(int(most[2]), int(choice.crops.max())),
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


def record_lengths(workload: Workload, choice: CropChoice, repeats: int = 1) -> RecordLengths:
    """The records as packing sees them; with ``repeats`` as if there were so many times as many, of other pictures."""
    shares = workload.heads >= 0
    pages = 2 * workload.groups + (choice.tokens > LONG_CONTEXT)
    alone = 2 * (int(workload.groups.max()) + 1) + np.arange(len(workload))
    page = np.where(shares, pages, alone)
    more = np.repeat(np.arange(repeats), len(workload)) * (int(page.max()) + 1)
    return RecordLengths(
        tokens=np.tile(choice.tokens, repeats),
        head=np.tile(np.where(shares, workload.heads + choice.image_tokens, 0), repeats),
        page=np.tile(page, repeats) + more,
    )


class _Measures:
    """Counts of single rows."""

    def __init__(self, lengths: RecordLengths, workload: Workload, choice: CropChoice) -> None:
        self.tokens, self.head, self.page = (v.tolist() for v in (lengths.tokens, lengths.head, lengths.page))
        self.crops, self.image_tokens = choice.crops.tolist(), choice.image_tokens.tolist()
        self.answers = workload.answer_tokens.tolist()
        self.records = len(workload)

    def of(self, row: Row) -> tuple[int, int, int, int, int]:
        crops: dict[int, int] = {}
        tokens = images = answers = needed = 0
        for group in row:
            first = group[0] % self.records
            prefix = self.head[group[0]] if len(group) > 1 else 0
            branches = [self.tokens[index] - prefix for index in group]
            tokens += prefix + sum(branches)
            images += self.image_tokens[first]
            crops[self.page[group[0]]] = self.crops[first]  # a page of several groups is computed once
            answers += sum(self.answers[index % self.records] for index in group)
            needed += prefix**2 + sum(2 * branch * prefix + branch**2 for branch in branches)
        return tokens, images, sum(crops.values()), answers, needed
