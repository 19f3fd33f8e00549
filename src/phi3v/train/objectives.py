"""What the loss of a row is, and what is shown beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
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

    Args:
        sources: names of the sources of a mixture, whose losses are told apart.

    Attributes:
        statistics: names of what is summed beside the loss.
    """

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self.sources = sources
        # The weighted loss of each source, then the weight of each.
        self.statistics = tuple(f"source/{name}/{what}" for what in ("loss", "weight") for name in sources)

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
        output = forward({**row, "loss_normalizer": normalizer, **TRAINING})
        return output.loss, output.group_sums.flatten() if self.sources else None

    def shown(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What to log, from the sums over rows and ranks: the mean loss of each source that was there."""
        keys = [f"source/{name}" for name in self.sources]
        return {f"{key}/loss": sums[f"{key}/loss"] / sums[f"{key}/weight"] for key in keys if sums[f"{key}/weight"]}

    def probe_loss(self, forward: Forward, row: Mapping[str, Any]) -> torch.Tensor:
        """The loss of a row before training, for the gradient check."""
        loss, _ = self.loss(forward, row, 1.0, at_start=True)
        return loss


class PreferenceObjective(Objective):
    """Learning from preferences; see ``model/preference_loss.py``."""

    def __init__(self, config: ObjectiveConfig, sources: Sequence[str] = ()) -> None:
        super().__init__(sources)
        self.statistics = (*STATISTICS, *self.statistics)
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
        statistics = answer_statistics(self.config, answers)
        if self.sources:
            statistics = torch.cat([statistics, self._of_sources(answers, row)])
        return loss, statistics

    def shown(self, sums: Mapping[str, float]) -> dict[str, float]:
        return means(self.config, sums) | super().shown(sums)

    @torch.no_grad()
    def _of_sources(self, answers: Answers, row: Mapping[str, Any]) -> torch.Tensor:
        """The sums of the losses of the sources, then those of their weights: those of a row that has nothing else."""
        losses, weights = [], []
        for own, own_pairs in zip(row["answer_groups"], row["pair_groups"], strict=True):
            part = replace(answers, weights=answers.weights * own, pair_weights=answers.pair_weights * own_pairs)
            losses.append(preference_loss(self.config, part, self.drift))
            judged = part.weights * (part.signs != 0)
            weights.append(part.pair_weights.sum() if self.config.takes_pairs else judged.sum())
        return torch.stack([*losses, *weights])

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


def make_objective(config: ObjectiveConfig, sources: Sequence[str] = ()) -> Objective:
    """The objective that is configured; ``sources`` as of `Objective`."""
    return PreferenceObjective(config, sources) if config.is_preference else Objective(sources)
