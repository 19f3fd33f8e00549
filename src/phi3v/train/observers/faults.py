"""What can go wrong in a step, so that all ranks come to the same end of it and the records of the step are named."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import distributed

from phi3v.data.table import RecordTable
from phi3v.errors import UserError
from phi3v.train.collectives import HostCollectives

logger = logging.getLogger("phi3v")

SHOWN_RECORDS = 20


class StepFaults:
    """Watches the steps of all ranks.

    Args:
        table: the records, for their names.
        max_nonfinite_steps: stop after so many in a row.
        can_drop: a step's gradients may be dropped before they reach the weights; otherwise the first such step is
            the last.
    """

    def __init__(
        self,
        collectives: HostCollectives,
        table: RecordTable,
        console: Console,
        *,
        max_nonfinite_steps: int,
        can_drop: bool,
        newest_checkpoint: Callable[[], str],
    ) -> None:
        self.collectives = collectives
        self.table = table
        self.console = console
        self.limit = max_nonfinite_steps if can_drop else 1
        self.newest_checkpoint = newest_checkpoint
        self.in_a_row = 0
        self.dropped = 0
        self._losses: list[tuple[Sequence[int], torch.Tensor]] = []

    def begin_step(self) -> None:
        self._losses = []

    def add(self, records: Sequence[int], loss: torch.Tensor) -> None:
        """A micro-batch of the step: its records and its share of the loss."""
        self._losses.append((records, loss))

    def must_drop(self, step: int, grad_norm: Any, *, is_scaled: bool) -> bool:
        """Whether this step may not change the weights; a collective, before the optimizer's step.

        Args:
            step: the number that it has.
            grad_norm: of the whole gradient.
            is_scaled: a loss scaler looks after gradients that overflow, so only the losses count.

        Raises:
            UserError: so many such steps came in a row.
        """
        norm = float(grad_norm) if grad_norm is not None and not is_scaled else 0.0
        finite = torch.stack([loss for _, loss in self._losses]).isfinite().tolist()
        bad = [records for (records, _), is_finite in zip(self._losses, finite, strict=True) if not is_finite]
        if not self.collectives.sum([bool(bad) or not math.isfinite(norm)])[0]:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        self.dropped += 1
        # The micro-batches whose loss shows it; if the loss was finite and its gradient not, all of the step.
        mine = bad or [records for records, _ in self._losses]
        gathered = self.collectives.all_gather((bool(bad), [index for records in mine for index in records]))
        guilty = any(is_bad for is_bad, _ in gathered)
        names = [self._name(index) for is_bad, records in gathered if is_bad or not guilty for index in records]
        what = "the loss" if guilty else "a gradient"
        listed = ", ".join(names[:SHOWN_RECORDS]) + (
            f" and {len(names) - SHOWN_RECORDS} more" if len(names) > SHOWN_RECORDS else ""
        )
        if self.in_a_row >= self.limit:
            times = f", {self.in_a_row} steps in a row" if self.in_a_row > 1 else ""
            raise UserError(
                f"{what} is not finite at step {step}{times}; records: {listed}",
                where=str(self.table.path),
                hint=f"{self.newest_checkpoint()}: look at these records, or lower training.learning_rate in a new run",
            )
        text = f"step {step}: {what} is not finite, so the step changes no weight; records: {listed}"
        logger.warning("%s", text)
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        return True

    def report_skipped(self, skipped: Sequence[tuple[int, str]]) -> list[tuple[str, str]]:
        """Records of all ranks that were left out, by name, said once; a collective."""
        everywhere = [entry for own in self.collectives.all_gather(list(skipped)) for entry in own]
        named = [(self._name(index), why) for index, why in dict(everywhere).items()]
        for name, why in named:
            text = f"left out {name}: {why}"
            logger.warning("%s", text)
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        return named

    def _name(self, index: int) -> str:
        record = self.table[index]
        return f"{record.id} (line {record.line})"


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error of a collective operation says that another process is gone or does not answer."""
    if isinstance(error, distributed.DistError):
        return True
    text = str(error).lower()
    words = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "timed out waiting")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a device or of the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
