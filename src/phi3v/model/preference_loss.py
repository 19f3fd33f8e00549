"""Losses of learning from preferences, from the log-probabilities of whole answers.

DPO (Rafailov et al. 2023, arXiv 2305.18290), IPO (Azar et al. 2023, arXiv 2310.12036), KTO (Ethayarajh et al. 2024,
arXiv 2402.01306), ORPO (Hong et al. 2024, arXiv 2403.07691), SimPO (Meng et al. 2024, arXiv 2405.14734), and MPO's
mixture of preference, quality and generation (Wang et al. 2024, arXiv 2411.10442). Where papers leave a choice, ours is
TRL's: IPO's scores are means over tokens, BCO's reward has no shift. The supervised part differs from TRL's: each
chosen answer has the mean over its own tokens, and no prompt is learned.

These are sums over a row, to be divided by the weight of the whole step, so any split of it gives the same gradients.

Shapes: ``A`` answers of a row, ``P`` pairs of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from phi3v.config import ObjectiveConfig

# What `answer_statistics` sums; the first four are what the others are divided by.
STATISTICS = (
    "pairs",
    "chosen",
    "rejected",
    "answers",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "tokens/chosen",
    "tokens/rejected",
    "kl",
)
_BELONGS = ("chosen", "rejected", "pairs", "pairs", "chosen", "rejected", "chosen", "rejected", "answers")


@dataclass(frozen=True)
class Answers:
    """The answers of a row.

    Attributes:
        log_probs: (A,) float32, of each answer: the sum over its tokens.
        lengths: (A,) float32, its tokens.
        reference: (A,) float32, ``log_probs`` of the reference model; None where the objective has none.
        signs: (A,) float32, 1 for chosen or good answers, -1 for rejected or bad ones, 0 for those that KTO's estimate
            alone uses.
        weights: (A,) float32, of each answer in KTO's loss and in the statistics.
        pairs: (P, 2) int64, the places of the chosen and the rejected answer of each pair.
        pair_weights: (P,) float32.
    """

    log_probs: torch.Tensor
    lengths: torch.Tensor
    reference: torch.Tensor | None
    signs: torch.Tensor
    weights: torch.Tensor
    pairs: torch.Tensor
    pair_weights: torch.Tensor

    @property
    def scores(self) -> torch.Tensor:
        """(A,) the log-ratio to the reference; without one, the log-probability."""
        return self.log_probs if self.reference is None else self.log_probs - self.reference


def preference_loss(objective: ObjectiveConfig, answers: Answers, drift: torch.Tensor | float = 0.0) -> torch.Tensor:
    """The weighted sum of the losses of a row's pairs, or of KTO's answers; a float32 scalar.

    Args:
        drift: KTO's estimate of the KL divergence to the reference, of the whole step: the mean by
            `drift_sums`, at least 0.
    """
    beta = objective.scale
    if objective.name == "kto":
        good, bad = answers.weights * (answers.signs > 0), answers.weights * (answers.signs < 0)
        score = beta * (answers.scores - drift)
        losses = objective.desirable_weight * good * torch.sigmoid(-score)
        return (losses + objective.undesirable_weight * bad * torch.sigmoid(score)).sum()
    chosen, rejected = answers.pairs.unbind(1)
    scores = answers.scores / answers.lengths if objective.divides_by_length else answers.scores
    preferred, other = scores[chosen], scores[rejected]
    losses = objective.preference_weight * _pair_loss(objective, preferred, other)
    if objective.quality_weight:
        rewards = beta * answers.scores
        quality = -functional.logsigmoid(rewards[chosen]) - functional.logsigmoid(-rewards[rejected])
        losses = losses + objective.quality_weight * quality
    if objective.supervised_weight:
        supervised = -(answers.log_probs / answers.lengths)[chosen]
        losses = losses + objective.supervised_weight * supervised
    return (losses * answers.pair_weights).sum()


def _pair_loss(objective: ObjectiveConfig, preferred: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(P,) the loss of each pair."""
    beta, margin = objective.scale, preferred - other
    if objective.name == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    if objective.name == "orpo":
        odds = margin - (_log1mexp(preferred) - _log1mexp(other))
        return -beta * functional.logsigmoid(odds)
    logits = beta * margin - (objective.gamma if objective.name == "simpo" else 0.0)
    smoothing = objective.label_smoothing
    return -(1 - smoothing) * functional.logsigmoid(logits) - smoothing * functional.logsigmoid(-logits)


def _log1mexp(log_probs: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0; a certain answer counts as one of 1 - 1e-7."""
    return torch.log(-torch.expm1(log_probs.clamp(max=-1e-7)))


def drift_sums(answers: Answers) -> torch.Tensor:
    """(2,) for KTO: the sum of the log-ratios of mismatched answers, and their number."""
    mismatched = answers.weights * (answers.signs == 0)
    return torch.stack([(mismatched * answers.scores).sum(), mismatched.sum()]).detach()


@torch.no_grad()
def answer_statistics(objective: ObjectiveConfig, answers: Answers) -> torch.Tensor:
    """What is shown of a row as sums over it, in the order of `STATISTICS`, float32.

    Rewards are ``beta`` times the log-ratio to the reference; without a reference, times the mean log-probability, as
    in TRL. ``kl`` is Schulman's k2, half the squared log-ratio: near the KL divergence to the reference as long as that
    is small and the answers are the model's own, a measure of drift in any case.
    """
    reference_free = answers.reference is None
    rewards = objective.scale * (answers.scores / answers.lengths if reference_free else answers.scores)
    good, bad = answers.weights * (answers.signs > 0), answers.weights * (answers.signs < 0)
    judged = good + bad
    chosen, rejected = rewards[answers.pairs].unbind(1)
    pairs = answers.pair_weights
    drift = torch.zeros_like(rewards) if reference_free else answers.scores**2 / 2
    return torch.stack(
        [
            pairs.sum(),
            good.sum(),
            bad.sum(),
            judged.sum(),
            (good * rewards).sum(),
            (bad * rewards).sum(),
            (pairs * (chosen - rejected)).sum(),
            (pairs * (chosen > rejected)).sum(),
            (good * answers.log_probs).sum(),
            (bad * answers.log_probs).sum(),
            (good * answers.lengths).sum(),
            (bad * answers.lengths).sum(),
            (judged * drift).sum(),
        ]
    )


def means(objective: ObjectiveConfig, sums: Mapping[str, float]) -> dict[str, float]:
    """What is shown, from the sums of `answer_statistics` over rows and ranks, where something was counted."""
    return {
        name: sums[name] / sums[unit]
        for name, unit in zip(STATISTICS[4:], _BELONGS, strict=True)
        if sums[unit] and (name != "kl" or objective.needs_reference)
    }
