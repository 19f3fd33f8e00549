"""What an optimizer step computed, counted from its batches; the floating-point operations are `plan.throughput`'s."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch

from phi3v.model.attention import Layout
from phi3v.plan.throughput import SampleWork
from phi3v.processing.conversation import IGNORE_INDEX
from phi3v.processing.hd_transform import CROP_SIZE, num_distinct_crops, num_img_tokens
from phi3v.train.collectives import HostCollectives
from phi3v.train.loop import Row, TrainingLoop
from phi3v.train.state import Observer, TrainState


@dataclass(frozen=True)
class StepWork:
    """Sums over the batches of a step.

    Attributes:
        samples, questions: records, and turns of them.
        tokens: without padding; a shared prefix counts once.
        tokens_squared: twice the pairs of query and key.
        pages: images that went through the tower; a page that records of a batch share counts once.
        crops, image_tokens: of these pages, without padded crops.
        answer_tokens: supervised tokens.
    """

    samples: float = 0.0
    questions: float = 0.0
    tokens: float = 0.0
    tokens_squared: float = 0.0
    pages: float = 0.0
    crops: float = 0.0
    image_tokens: float = 0.0
    answer_tokens: float = 0.0

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def divided(self, count: float) -> StepWork:
        return StepWork(*(value / count for value in astuple(self)))

    @classmethod
    def of(cls, batch: dict[str, Any]) -> StepWork:
        """Of one batch, or one packed row, as the collator made it."""
        squares = pairs_of(batch["layout"]) if "layout" in batch else sum(n**2 for n in batch["lengths"])
        sizes = batch.get("image_sizes", ())  # a batch of texts has none
        grids = [(int(height) // CROP_SIZE, int(width) // CROP_SIZE) for height, width in sizes]
        samples, questions, tokens = (batch["counts"][index] for index in (1, 2, 3))
        return cls(
            samples=samples,
            questions=questions,
            tokens=tokens,
            tokens_squared=squares,
            pages=len(grids),
            crops=sum(num_distinct_crops(*grid) for grid in grids),
            image_tokens=sum(num_img_tokens(*grid) for grid in grids),
            answer_tokens=int((batch["labels"] != IGNORE_INDEX).sum()),
        )

    def sample_work(self) -> SampleWork:
        """The whole step in the form whose operations the planner counts."""
        return SampleWork(self.tokens, self.tokens_squared, self.image_tokens, self.crops, self.answer_tokens)


def pairs_of(layout: Layout) -> int:
    """Twice the pairs of query and key in a packed row: p² of a prefix, b(b + 2p) of each of its branches."""
    return sum(prefix**2 + sum(b * (b + 2 * prefix) for b in branches) for prefix, *branches in layout)


class CountingLoop(TrainingLoop):
    """The training loop, keeping what each step of this rank computes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.work: list[StepWork] = []

    def count(self, rows: Sequence[Row]) -> list[float]:
        self.work.append(sum(map(StepWork.of, rows), StepWork()))
        return super().count(rows)

    def mean_step(self, steps: list[StepWork]) -> StepWork:
        """The mean step over all ranks together."""
        return StepWork(*self.collectives.sum(astuple(sum(steps, StepWork()).divided(len(steps)))))


def timed_by() -> str:
    """How this machine is timed; other programs change wall time far more than CPU time."""
    return "wall time" if torch.cuda.is_available() else "CPU time of one thread"


def clock_seconds() -> float:
    """Now, as `timed_by` says."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@contextmanager
def one_thread(only: bool = True) -> Iterator[None]:
    """Compute on one thread, if ``only``: for a machine that is timed by its CPU time."""
    threads = torch.get_num_threads()
    if only:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Clock(Observer):
    """The seconds of ``steps`` steps after the first, from the end of the one before, so that reading counts.

    Stops training when they add up to ``limit``.
    """

    def __init__(self, limit: float, collectives: HostCollectives, *, steps: int) -> None:
        self.limit = limit
        self.collectives = collectives
        self.steps = steps
        self.seconds: list[float] = []
        self.last: float | None = None

    def on_step(self, state: TrainState) -> None:
        if len(self.seconds) == self.steps:
            return  # what comes is not timed, and is not made to wait
        now = clock_seconds()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now
        if self.collectives.sum([sum(self.seconds) > self.limit])[0]:  # all ranks stop together
            state.should_stop = True
