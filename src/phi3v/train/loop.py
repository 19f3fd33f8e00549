"""The training loop.

A step: take this rank's rows, count the weight over all ranks, forward and backward row by row, clip, step, log.
Nothing in it waits for the device but what is logged.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import set_seed

from phi3v.data.readers import Readers
from phi3v.data.rows import read_steps
from phi3v.errors import UserError
from phi3v.train.checkpoints.formats import load_checkpoint
from phi3v.train.checkpoints.random_state import set_random_state
from phi3v.train.checkpoints.resume import ResumePoint
from phi3v.train.checkpoints.writer import Checkpointer
from phi3v.train.observers.faults import StepFaults, poison
from phi3v.train.prepare import PreparedRun
from phi3v.train.schedule import total_steps
from phi3v.train.state import Observer, TrainState

Row = dict[str, Any]  # a padded micro-batch or a packed row, as its dataset makes it


class TrainingLoop:
    """Divides the weighted loss by the weight of the whole optimizer step.

    A step's weight is summed over its rows and over all ranks before the first of them runs, so every split of the same
    samples gives the same gradients (see ``model/loss.py``).

    Args:
        readers: make the rows of `RowPlan` s, ahead of time.
        faults: watches the steps.
        observers: told of every step, in their order.
        checkpoints: one of them; saves what was trained where a record cannot be read.

    Attributes:
        state: how far the run is.
    """

    def __init__(
        self,
        run: PreparedRun,
        readers: Readers,
        faults: StepFaults,
        *,
        observers: Sequence[Observer] = (),
        checkpoints: Checkpointer | None = None,
    ) -> None:
        self.config = run.config
        self.engine = run.engine
        self.plan = run.plan
        self.table = run.train_table
        self.runtime = run.runtime
        self.collectives = run.collectives
        self.readers = readers
        self.faults = faults
        self.observers = observers
        self.checkpoints = checkpoints
        max_steps = total_steps(run.config.training, run.plan.num_steps)
        self.objective = run.objective
        loss, statistics = (
            torch.zeros(size, device=run.runtime.device) for size in ((), len(run.objective.statistics))
        )
        self.state = TrainState(
            run.plan.num_steps, max_steps, loss=loss, statistics=statistics, sources=run.train_table.names
        )

    def run(self, point: ResumePoint | None = None) -> TrainState:
        """Train to the end, or until an observer stops it.

        Args:
            point: a checkpoint to go on from.

        Raises:
            UserError: a record cannot be read, or too many steps are not finite. All ranks raise it, after what was
                trained so far has been saved.
        """
        state, engine = self.state, self.engine
        set_seed(self.config.training.seed)
        engine.prepare(state.max_steps)
        if point is not None:
            self._resume(point)
        engine.model.train()
        for observer in self.observers:
            observer.on_begin(state)
            if point is not None:
                observer.on_resume(point.state)
        steps = self._steps()
        while not state.is_last:
            rows, weight = self._take(steps)
            norm = self._compute(rows, weight)
            rates = self._learning_rates()
            engine.step(norm)
            state.step += 1
            if state.step == 1 or state.step % self.config.training.logging_steps == 0:
                self._log(norm, rates)
            for observer in self.observers:
                observer.on_step(state)
        self.faults.settle()
        if state.step > state.logged_to:
            state.take_loss(self.collectives)
        return state

    def _steps(self) -> Iterator[list[Row]]:
        """This rank's rows of every step from here on, epoch after epoch."""
        epoch, first_step = divmod(self.state.step, self.plan.num_steps)
        while True:
            self.table.assign_shards(self.plan.own_shards(self.runtime.rank, epoch))
            yield from read_steps(
                self.plan,
                self.runtime.rank,
                self.readers,
                epoch,
                first_step=first_step,
                equal=self.engine.meets_in_every_row,
                pin_memory=self.runtime.device.type == "cuda",
            )
            epoch, first_step = epoch + 1, 0

    def _take(self, steps: Iterator[list[Row]]) -> tuple[list[Row], float]:
        """The next step's rows, and its weight: the sum of the loss weights of all ranks' rows.

        It is counted on the hosts, so that no step waits for a device.
        """
        rows, wrong = [], None
        try:
            rows = next(steps)
        except UserError as error:
            wrong = str(error)
        counts = self.count(rows)
        skipped = [entry for row in rows for entry in row["counts"].skipped]
        *totals, num_skipped, num_wrong = self.collectives.sum([*counts, len(skipped), wrong is not None])
        if num_wrong:
            if self.checkpoints is not None:
                self.checkpoints.save(self.state)
                self.checkpoints.wait()
            raise UserError(next(text for text in self.collectives.all_gather(wrong) if text is not None))
        self.state.counts = [before + now for before, now in zip(self.state.counts, totals, strict=True)]
        if num_skipped:
            self.state.skipped += self.faults.report_skipped(skipped)
        return rows, totals[0] or 1.0  # of a step in which no record could be read every loss is 0

    def count(self, rows: Sequence[Row]) -> list[float]:
        """Of this rank's rows what `TrainState.counts` has."""
        own: list[float] = [sum(row["counts"][index] for row in rows) for index in range(4)]
        of_rows = [row["counts"].of_sources for row in rows if row["counts"].of_sources]  # not of those that fill
        return own + [sum(counts[index] for counts in of_rows) for index in range(2 * len(self.state.sources))]

    def _compute(self, rows: Sequence[Row], weight: float) -> torch.Tensor:
        """The gradients of a step; gives their norm."""
        losses = []
        forward = functools.partial(self.engine.forward, last=False)
        self.objective.begin_step(forward, map(self._inputs, rows), self.collectives)
        for row in rows:
            last = row is rows[-1]
            inputs = self._inputs(row)
            # Engines average gradients over the ranks, so each rank's share is multiplied by their number.
            loss = self.compute_loss(inputs, weight / self.runtime.world_size, last=last)
            losses.append(loss.detach())
            self.engine.backward(poison(loss), last=last)
        norm = self.engine.grad_norm()
        self.state.loss += torch.stack(losses).sum()
        self.faults.add(self.state.step + 1, [row["counts"].records for row in rows], losses, norm)
        return norm

    def _inputs(self, row: Row) -> Row:
        """A row on the device, without what stays on the host."""
        device = self.runtime.device
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in row.items()
            if name != "counts"
        }

    def compute_loss(self, inputs: Row, normalizer: float, *, last: bool) -> torch.Tensor:
        """A row's share of the step's loss.

        Args:
            normalizer: what the weighted sum is divided by.
            last: of this rank's rows of the step.
        """
        forward = functools.partial(self.engine.forward, last=last)
        loss, statistics = self.objective.loss(forward, inputs, normalizer)
        if statistics is not None:
            self.state.statistics += statistics
        return loss

    def _learning_rates(self) -> dict[str, float]:
        """Of the step that comes: the first group's and, where parts have their own, those of all."""
        groups = self.engine.optimizer.param_groups
        rates = {f"learning_rate_{group['name']}": group["lr"] for group in groups if "name" in group}
        return {"learning_rate": groups[0]["lr"], **rates}

    def _log(self, norm: torch.Tensor, rates: dict[str, float]) -> None:
        sums = dict(zip(self.objective.statistics, self.state.take_statistics(self.collectives), strict=True))
        values = {"loss": self.state.take_loss(self.collectives), **self.objective.shown(sums)}
        values |= {"grad_norm": norm.item(), **rates, **self.state.seen_of_sources}
        for observer in self.observers:
            observer.on_log(self.state, values)

    def _resume(self, point: ResumePoint) -> None:
        """Go on as if the run had never stopped."""
        state, rank, ranks = self.state, self.runtime.rank, self.runtime.world_size
        if point.state["steps_per_epoch"] != state.steps_per_epoch:
            raise UserError(
                f"an epoch had {point.state['steps_per_epoch']} steps when it was saved and has "
                f"{state.steps_per_epoch} now",
                where=str(point.folder),
                hint="go on with the number of ranks that it was saved with",
            )
        state.load_json(point.state, rank, ranks)
        state.should_stop = point.stopped_early
        load_checkpoint(self.engine, point, rank, self.collectives)
        if len(point.randoms) == ranks:
            set_random_state(point.randoms[rank])
