"""Each loss is its paper's formula, written out here pair by pair; the head's chunks give whole log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from phi3v.config import ObjectiveConfig
from phi3v.errors import UserError
from phi3v.model import loss as loss_file
from phi3v.model.loss import answer_log_probs
from phi3v.model.preference_loss import (
    STATISTICS,
    Answers,
    answer_statistics,
    drift_sums,
    means,
    preference_loss,
)

# Two pairs, the second with two rejected answers of half the weight each; the last answer is a mismatched one.
LOG_PROBS = [-4.0, -7.5, -2.0, -9.0, -3.5, -6.0]
REFERENCE = [-5.0, -7.0, -2.5, -8.0, -4.5, -7.0]
LENGTHS = [3.0, 5.0, 2.0, 4.0, 4.0, 3.0]
PAIRS = [(0, 1, 1.0), (2, 3, 0.5), (2, 4, 0.5)]  # chosen, rejected, weight


def answers(log_probs: torch.Tensor, *, reference: bool = True) -> Answers:
    of = log_probs.dtype
    return Answers(
        log_probs,
        torch.tensor(LENGTHS, dtype=of),
        torch.tensor(REFERENCE, dtype=of) if reference else None,
        torch.tensor([1, -1, 1, -1, -1, 0], dtype=of),
        torch.tensor([1, 1, 1, 0.5, 0.5, 1], dtype=of),
        torch.tensor([pair[:2] for pair in PAIRS]),
        torch.tensor([pair[2] for pair in PAIRS], dtype=of),
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ratio(index: int) -> float:
    return LOG_PROBS[index] - REFERENCE[index]


def mean(index: int) -> float:
    return LOG_PROBS[index] / LENGTHS[index]


def log_odds(index: int) -> float:
    return math.log(math.exp(mean(index)) / (1 - math.exp(mean(index))))


Formula = Callable[[int, int], float]
FORMULAS: list[tuple[dict[str, Any], Formula]] = [
    ({"name": "dpo"}, lambda c, r: -math.log(sigmoid(0.1 * (ratio(c) - ratio(r))))),
    (
        {"name": "dpo", "beta": 0.5, "label_smoothing": 0.2},
        lambda c, r: (
            -0.8 * math.log(sigmoid(0.5 * (ratio(c) - ratio(r))))
            - 0.2 * math.log(sigmoid(-0.5 * (ratio(c) - ratio(r))))
        ),
    ),
    (
        {"name": "dpo", "length_normalised": True},
        lambda c, r: -math.log(sigmoid(0.1 * (ratio(c) / LENGTHS[c] - ratio(r) / LENGTHS[r]))),
    ),
    (
        {"name": "dpo", "preference_weight": 0.8, "quality_weight": 0.2, "sft_weight": 1.0},  # MPO
        lambda c, r: (
            -0.8 * math.log(sigmoid(0.1 * (ratio(c) - ratio(r))))
            - 0.2 * (math.log(sigmoid(0.1 * ratio(c))) + math.log(sigmoid(-0.1 * ratio(r))))
            - mean(c)
        ),
    ),
    ({"name": "ipo", "beta": 0.2}, lambda c, r: (ratio(c) / LENGTHS[c] - ratio(r) / LENGTHS[r] - 1 / 0.4) ** 2),
    ({"name": "ipo", "length_normalised": False}, lambda c, r: (ratio(c) - ratio(r) - 5) ** 2),
    ({"name": "orpo"}, lambda c, r: -mean(c) - 0.1 * math.log(sigmoid(log_odds(c) - log_odds(r)))),
    ({"name": "simpo"}, lambda c, r: -math.log(sigmoid(2 * (mean(c) - mean(r)) - 1))),
    (
        {"name": "simpo", "beta": 2.5, "gamma": 0.5, "sft_weight": 0.3},
        lambda c, r: -math.log(sigmoid(2.5 * (mean(c) - mean(r)) - 0.5)) - 0.3 * mean(c),
    ),
]


@pytest.mark.parametrize(("keys", "formula"), FORMULAS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_losses_of_pairs(keys: dict[str, Any], formula: Formula) -> None:
    objective = ObjectiveConfig(**keys)
    log_probs = torch.tensor(LOG_PROBS, dtype=torch.float64, requires_grad=True)
    loss = preference_loss(objective, answers(log_probs, reference=objective.needs_reference))
    assert loss.item() == pytest.approx(sum(weight * formula(c, r) for c, r, weight in PAIRS), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda probed: preference_loss(objective, answers(probed, reference=objective.needs_reference)), log_probs
    )


def test_kto() -> None:
    """Good and bad answers against the drift of the mismatched ones, each with its weight."""
    objective = ObjectiveConfig(name="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    log_probs = torch.tensor(LOG_PROBS, dtype=torch.float64, requires_grad=True)
    given = answers(log_probs)
    total, count = drift_sums(given).tolist()
    assert (total, count) == (ratio(5), 1)
    drift = max(0.0, total / count)
    expected = sum(1.5 * (1 - sigmoid(0.3 * (ratio(index) - drift))) for index in (0, 2))
    expected += sum(
        weight * 0.5 * (1 - sigmoid(0.3 * (drift - ratio(index)))) for index, weight in ((1, 1), (3, 0.5), (4, 0.5))
    )
    loss = preference_loss(objective, given, drift)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert gradient[5] == 0
    assert gradient[:5].all()


def test_a_certain_answer_has_a_finite_loss() -> None:
    """Where a model gives an answer all probability, float32 leaves nothing for the odds."""
    log_probs = torch.zeros(6, requires_grad=True)
    loss = preference_loss(ObjectiveConfig(name="orpo"), answers(log_probs, reference=False))
    loss.backward()
    assert loss.isfinite()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


def test_statistics() -> None:
    objective = ObjectiveConfig(name="dpo")
    given = answers(torch.tensor(LOG_PROBS))
    shown = means(objective, dict(zip(STATISTICS, answer_statistics(objective, given).tolist(), strict=True)))
    ratios = [ratio(index) for index in range(6)]
    assert shown == pytest.approx(
        {
            "rewards/chosen": 0.1 * (ratios[0] + ratios[2]) / 2,
            "rewards/rejected": 0.1 * (ratios[1] + (ratios[3] + ratios[4]) / 2) / 2,
            "rewards/margins": 0.1 * ((ratios[0] - ratios[1]) + (2 * ratios[2] - ratios[3] - ratios[4]) / 2) / 2,
            "rewards/accuracies": (1 + 0.5) / 2,  # the last rejected answer has gained more
            "logps/chosen": (LOG_PROBS[0] + LOG_PROBS[2]) / 2,
            "logps/rejected": (LOG_PROBS[1] + (LOG_PROBS[3] + LOG_PROBS[4]) / 2) / 2,
            "tokens/chosen": 2.5,
            "tokens/rejected": 4.5,
            "kl": sum(ratios[k] ** 2 / 2 * (0.5 if k > 2 else 1) for k in range(5)) / 4,
        },
        rel=1e-6,  # float32
    )
    free = ObjectiveConfig(name="simpo")
    given = answers(torch.tensor(LOG_PROBS), reference=False)
    shown = means(free, dict(zip(STATISTICS, answer_statistics(free, given).tolist(), strict=True)))
    assert shown["rewards/chosen"] == pytest.approx(2 * (mean(0) + mean(2)) / 2)
    assert "kl" not in shown


def test_log_probabilities_of_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By chunks that cut answers in two, with gradients of all that goes in."""
    torch.manual_seed(0)
    states = torch.randn(2, 9, 8, requires_grad=True)
    head = nn.Linear(8, 11, bias=False)
    labels = torch.full((2, 9), -100)
    for row, start, end in ((0, 3, 7), (1, 2, 4), (1, 6, 9)):
        labels[row, start:end] = torch.randint(11, (end - start,))
    expected = torch.stack(
        [
            head(states[row, start - 1 : end - 1]).log_softmax(-1).gather(1, labels[row, start:end, None]).sum()
            for row, start, end in ((0, 3, 7), (1, 2, 4), (1, 6, 9))
        ]
    )
    weights = torch.tensor([0.3, -1.0, 2.0])
    plain = torch.autograd.grad(expected @ weights, [states, head.weight])
    monkeypatch.setattr(loss_file, "LOGITS_PER_CHUNK", 3 * 11)
    got = answer_log_probs(states, head, labels, [4, 2, 3])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(got @ weights, [states, head.weight]), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32, summed in another order
    with pytest.raises(ValueError, match="9 targets"):
        answer_log_probs(states, head, labels, [4, 2])


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"name": "kto", "label_smoothing": 0.1}, "objective.label_smoothing"),
        ({"name": "simpo", "length_normalised": False}, "objective.length_normalised"),
        ({"name": "sft", "beta": 0.1}, "objective.beta"),
        ({"name": "dpo", "beta": 0.0}, "objective.beta"),
        ({"name": "dpo", "label_smoothing": 0.6}, "objective.label_smoothing"),
        ({"name": "orpo", "quality_weight": 0.2}, "objective.quality_weight"),
    ],
)
def test_keys_that_an_objective_does_not_take(keys: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError) as error:
        ObjectiveConfig(**keys)
    assert error.value.where == where
