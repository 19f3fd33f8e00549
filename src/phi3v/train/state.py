"""How far a run is, and what is told of it after every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from phi3v.train.collectives import HostCollectives


@dataclass
class TrainState:
    """How far a run is.

    Attributes:
        steps_per_epoch, max_steps: of the run as it is planned.
        step: optimizer steps taken.
        counts: weight, samples, questions and tokens of all ranks so far; then, of a mixture, the samples of each
            source and the tokens of each.
        sources: their names.
        skipped: records that were left out, and why.
        should_stop: after this step.
        loss: this rank's part of the losses of the steps that are not logged yet; on the device.
        logged_to: the step that was logged last.
        logged: the sum of all finite losses that were logged, and of how many steps.
        statistics: this rank's sums of what the objective counts beside the loss, as ``loss``.
    """

    steps_per_epoch: int
    max_steps: int
    step: int = 0
    counts: list[float] = field(default_factory=lambda: [0.0] * 4)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    should_stop: bool = False
    loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    logged_to: int = 0
    logged: tuple[float, int] = (0.0, 0)
    statistics: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.counts += [0.0] * (2 * len(self.sources))

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    @property
    def is_last(self) -> bool:
        """Whether no step follows."""
        return self.should_stop or self.step >= self.max_steps

    @property
    def seen(self) -> dict[str, int]:
        """Samples, questions and tokens that all ranks have taken since the start."""
        return dict(zip(("samples", "questions", "tokens"), map(int, self.counts[1:4]), strict=True))

    @property
    def seen_of_sources(self) -> dict[str, int]:
        """Samples and tokens of each source, likewise."""
        names = [f"source/{name}/{what}" for what in ("samples", "tokens") for name in self.sources]
        return dict(zip(names, map(int, self.counts[4:]), strict=True))

    def take_loss(self, collectives: HostCollectives) -> float:
        """The mean loss of the steps since it was last taken; a collective, which waits for the device."""
        total = collectives.sum([self.loss.item()])[0] / collectives.world_size
        self.loss = torch.zeros_like(self.loss)
        steps, self.logged_to = self.step - self.logged_to, self.step
        if math.isfinite(total):
            self.logged = (self.logged[0] + total, self.logged[1] + steps)
        return total / steps

    def take_statistics(self, collectives: HostCollectives) -> list[float]:
        """The sums over all ranks since they were last taken; as `take_loss`."""
        if not len(self.statistics):
            return []
        sums = collectives.sum(self.statistics.tolist())
        self.statistics = torch.zeros_like(self.statistics)
        return sums

    @property
    def mean_loss(self) -> float:
        """Over all steps, but for logging steps with one that was not finite."""
        return self.logged[0] / max(self.logged[1], 1)

    def to_json(self, collectives: HostCollectives) -> dict[str, Any]:
        """For ``state.json``; a collective."""
        losses, statistics = zip(*collectives.all_gather((self.loss.item(), self.statistics.tolist())), strict=True)
        return {
            "step": self.step,
            "epoch": self.epoch,
            "max_steps": self.max_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "world_size": collectives.world_size,
            "counts": self.counts,
            "skipped": self.skipped,
            "loop": {
                "losses": list(losses),
                "logged": list(self.logged),
                "logged_to": self.logged_to,
                "statistics": list(statistics),
            },
        }

    def load_json(self, saved: dict[str, Any], rank: int, world_size: int) -> None:
        """What `to_json` gave; on another number of ranks each gets the mean loss, which is what is logged."""
        loop = saved["loop"]
        losses = loop["losses"]
        self.step, self.counts = saved["step"], list(saved["counts"])
        self.skipped = [tuple(entry) for entry in saved["skipped"]]
        self.loss += losses[rank] if len(losses) == world_size else sum(losses) / len(losses)
        if statistics := loop.get("statistics"):  # none in checkpoints of older versions
            sums = torch.tensor(statistics, dtype=torch.float64)
            same = len(sums) == world_size
            self.statistics += (sums[rank] if same else sums.sum(0) / world_size).to(self.statistics)
        self.logged, self.logged_to = (loop["logged"][0], loop["logged"][1]), loop["logged_to"]


class Observer:
    """Told what happens while it trains. All ranks call it alike."""

    def on_begin(self, state: TrainState) -> None:
        """Before the first step, of a resumed run too."""

    def on_resume(self, saved: dict[str, Any]) -> None:
        """After `on_begin`, in a resumed run: what the checkpoint's ``state.json`` holds."""

    def on_log(self, state: TrainState, values: dict[str, float]) -> None:
        """Every ``training.logging_steps`` steps: loss, gradient norm, learning rates."""

    def on_step(self, state: TrainState) -> None:
        """After every optimizer step, in the order of the observers; after `on_log`."""
