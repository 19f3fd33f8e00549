"""What the loss of a row is, and what is shown beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from phi3v.config import ObjectiveConfig
from phi3v.data.preferences import ANSWER_FIELDS
from phi3v.model.preference_loss import (
    STATISTICS,
    Answers,
    answer_statistics,
    drift_sums,
    means,
    preference_loss,
)
from phi3v.train.collectives import HostCollectives

Forward = Callable[[Mapping[str, Any]], Any]  # a row's inputs to the model's output
TRAINING = {"logits_to_keep": None, "use_cache": False}


class Objective:
    """Supervised learning: the model's own loss.

    Attributes:
        statistics: names of what is summed beside the loss.
    """

    statistics: tuple[str, ...] = ()

    def begin_step(self, forward: Forward, rows: Iterable[Mapping[str, Any]], collectives: HostCollectives) -> None:
        """Before the rows of a step are computed; a collective, as every method of an objective that asks for one.

        Args:
            rows: this rank's, on its device.
        """

    def loss(
        self, forward: Forward, row: Mapping[str, Any], normalizer: float, *, at_start: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A row's share of the step's loss, and its sums of `statistics`.

        Args:
            normalizer: what the weighted sum is divided by.
            at_start: the model is its own reference, as before the first step.
        """
        return forward({**row, "loss_normalizer": normalizer, **TRAINING}).loss, None

    def shown(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What to log, from the sums over rows and ranks."""
        return {}

    def probe_loss(self, forward: Forward, row: Mapping[str, Any]) -> torch.Tensor:
        """The loss of a row before training, for the gradient check."""
        loss, _ = self.loss(forward, row, 1.0, at_start=True)
        return loss


class PreferenceObjective(Objective):
    """Learning from preferences; see ``model/preference_loss.py``."""

    statistics = STATISTICS

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.drift = 0.0  # of KTO, of the step that is computed

    def begin_step(self, forward: Forward, rows: Iterable[Mapping[str, Any]], collectives: HostCollectives) -> None:
        if self.config.name != "kto":
            return
        # Every answer's gradient depends on the estimate of the whole step, for which the device is waited for.
        with torch.no_grad():
            sums = torch.stack([drift_sums(self.answers(forward, row)) for row in rows]).sum(0).tolist()
        total, count = collectives.sum(sums)
        self.drift = max(0.0, total / count) if count else 0.0

    def loss(
        self, forward: Forward, row: Mapping[str, Any], normalizer: float, *, at_start: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        answers = self.answers(forward, row, at_start=at_start)
        loss = preference_loss(self.config, answers, self.drift) / normalizer
        return loss, answer_statistics(self.config, answers)

    def shown(self, sums: Mapping[str, float]) -> dict[str, float]:
        return means(self.config, sums)

    def answers(self, forward: Forward, row: Mapping[str, Any], *, at_start: bool = False) -> Answers:
        """The answers of a row with the model's log-probabilities."""
        output = forward({name: value for name, value in row.items() if name not in ANSWER_FIELDS} | TRAINING)
        log_probs = output.answer_log_probs
        reference = None
        if self.config.needs_reference:
            reference = log_probs.detach() if at_start else row["reference"]
        return Answers(
            log_probs,
            row["answer_lengths"],
            reference,
            row["answer_signs"],
            row["answer_weights"],
            row["pairs"],
            row["pair_weights"],
        )


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that is configured."""
    return PreferenceObjective(config) if config.is_preference else Objective()
