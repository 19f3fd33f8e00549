"""Intervals: what they must be where that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from phi3v.evaluate.bootstrap import bootstrap_interval, weighted_auroc, weighted_macro_mean, weighted_mean


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = (np.arange(2000) % 10 < 7).astype(float)  # 70 % of 2,000
    low, high = bootstrap_interval(weighted_mean(values), len(values))
    half = 1.96 * math.sqrt(0.7 * 0.3 / 2000)
    # 1,000 resamples place the ends within about a tenth of the half width.
    assert low == pytest.approx(0.7 - half, abs=0.1 * half)
    assert high == pytest.approx(0.7 + half, abs=0.1 * half)


def test_it_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(weighted_mean((rng.random(100) < 0.6).astype(float)), 100)
        covered += low <= 0.6 <= high
    # The binomial's own spread over 200 trials is 1.5 %; the percentile bootstrap runs a little short at n = 100.
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_one_unit_has_no_spread(value: float) -> None:
    assert bootstrap_interval(weighted_mean(np.array([value])), 1) == (value, value)


def test_the_chunks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3v.evaluate import bootstrap

    statistic = weighted_mean(np.linspace(0, 1, 50))
    whole = bootstrap_interval(statistic, 50)
    monkeypatch.setattr(bootstrap, "_CHUNK", 333)
    assert bootstrap_interval(statistic, 50) == whole


def repeated(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.repeat(values, weights.astype(int))


def test_weights_count_as_repetitions() -> None:
    """Each statistic of weights is the plain one of a sample in which units are repeated as often."""
    from torch import from_numpy
    from torchmetrics.functional.classification import binary_auroc

    rng = np.random.default_rng(3)
    scores = rng.integers(6, size=30) / 5.0  # many ties
    positive = rng.random(30) < 0.4
    classes = rng.integers(4, size=30)
    weights = rng.integers(4, size=(5, 30)).astype(float)
    means = weighted_mean(scores)(weights)
    aurocs = weighted_auroc(scores, positive)(weights)
    macros = weighted_macro_mean(scores, classes)(weights)
    for row, drawn in enumerate(weights):
        of, labels = repeated(scores, drawn), repeated(positive, drawn)
        assert means[row] == pytest.approx(of.mean())
        library = binary_auroc(from_numpy(of), from_numpy(labels).long())
        assert aurocs[row] == pytest.approx(float(library), abs=1e-6)
        by_class = [of[repeated(classes, drawn) == c].mean() for c in range(4) if drawn[classes == c].any()]
        assert macros[row] == pytest.approx(np.mean(by_class))


def test_resamples_without_a_class_are_left_out() -> None:
    low, high = bootstrap_interval(weighted_auroc(np.array([0.9, 0.1]), np.array([True, False])), 2)
    assert (low, high) == (1.0, 1.0)  # half of the resamples draw only one of the two
