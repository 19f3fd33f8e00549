"""What can go wrong in a step, so that all ranks come to the same end of it and the records of the step are named."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from phi3v.errors import UserError
from phi3v.train.checkpoint_folder import newest_checkpoint
from phi3v.train.prepare import PreparedRun

logger = logging.getLogger("phi3v")

SHOWN_RECORDS = 20


class Readback:
    """Numbers of a step, on their way from the device to the host; nothing waits for them until they are asked for."""

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        # In lean mode the norm is that of no gradients, which torch has on the CPU.
        stacked = torch.stack([value.detach().to(values[0].device, torch.float32) for value in values])
        # To pinned memory, as torch has it for such a copy. Needs a card: pinning and events are the driver's.
        self._host = stacked.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if stacked.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def values(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers


@dataclass(frozen=True)
class _Step:
    number: int
    rows: list[Sequence[int]]  # the records of each
    numbers: Readback  # the rows' losses, then the norm of the gradient


class StepFaults:
    """Looks whether each step was finite, one step late so that no step waits for the device.

    An engine lets a step whose gradient is not finite change nothing, and a loss that is not finite makes the gradient
    so (`poison`), on all ranks; here it is said, with the records' names, and counted.
    """

    def __init__(self, run: PreparedRun) -> None:
        self.run = run
        can_drop = run.engine.can_drop_step and not run.config.training.lean
        self.limit = run.config.training.max_nonfinite_steps if can_drop else 1
        self.is_scaled = run.runtime.precision == "fp16"  # gradients may overflow, so only the losses count
        self.in_a_row = 0
        self.dropped = 0
        self._pending: list[_Step] = []

    def add(
        self, number: int, rows: Sequence[Sequence[int]], losses: Sequence[torch.Tensor], norm: torch.Tensor
    ) -> None:
        """A step that was computed: the records of its rows, their losses and the norm of its gradient."""
        self.settle()
        self._pending.append(_Step(number, list(rows), Readback([*losses, norm])))

    def settle(self) -> None:
        """Judge the steps that were added; a collective where one was not finite, and in fp16.

        Raises:
            UserError: so many such steps came in a row.
        """
        pending, self._pending = self._pending, []
        for step in pending:
            self._judge(step)

    def _judge(self, step: _Step) -> None:
        *losses, norm = step.numbers.values()
        bad = [records for records, loss in zip(step.rows, losses, strict=True) if not math.isfinite(loss)]
        # The norm is that of all ranks, so they agree on it.
        not_finite = self.run.collectives.sum([bool(bad)])[0] if self.is_scaled else not math.isfinite(norm)
        if not not_finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.dropped += 1
        # The rows whose loss shows it; if the loss was finite and its gradient not, all of the step.
        gathered = self.run.collectives.all_gather(
            (bool(bad), [index for records in bad or step.rows for index in records])
        )
        has_bad_loss = any(is_bad for is_bad, _ in gathered)
        names = [self._name(index) for is_bad, records in gathered if is_bad or not has_bad_loss for index in records]
        what = "the loss" if has_bad_loss else "a gradient"
        listed = ", ".join(names[:SHOWN_RECORDS]) + (
            f" and {len(names) - SHOWN_RECORDS} more" if len(names) > SHOWN_RECORDS else ""
        )
        if self.in_a_row >= self.limit:
            times = f", {self.in_a_row} steps in a row" if self.in_a_row > 1 else ""
            raise UserError(
                f"{what} is not finite at step {step.number}{times}; records: {listed}",
                where=self.run.train_table.shown,
                hint=f"{newest_checkpoint(self.run.folder)}: look at these records, or lower training.learning_rate in "
                "a new run",
            )
        text = f"step {step.number}: {what} is not finite, so the step changes no weight; records: {listed}"
        logger.warning("%s", text)
        self.run.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def report_skipped(self, skipped: Sequence[tuple[int, str]]) -> list[tuple[str, str]]:
        """Records of all ranks that were left out, by name, said once; a collective."""
        everywhere = [entry for own in self.run.collectives.all_gather(list(skipped)) for entry in own]
        named = [(self._name(index), why) for index, why in dict(everywhere).items()]
        for name, why in named:
            text = f"left out {name}: {why}"
            logger.warning("%s", text)
            self.run.console.print(text, highlight=False, markup=False, soft_wrap=True)
        return named

    def _name(self, index: int) -> str:
        record = self.run.train_table[index]
        return f"{record.id} ({self.run.train_table.line_of(record)})"


def poison(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself if it is finite, else one whose gradients are NaN, for all ranks to see."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error of a collective operation says that another process is gone or does not answer."""
    if isinstance(error, distributed.DistError):
        return True
    text = str(error).lower()
    words = (
        *("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "timed out waiting"),
        "caused pair closure",  # what gloo says after a timeout
    )
    return isinstance(error, RuntimeError) and any(word in text for word in words)
