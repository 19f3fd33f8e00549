"""How sure a score is: the percentile bootstrap (Efron 1979).

Shapes: ``R`` resamples, ``n`` units that are drawn with replacement (questions, or groups of them).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
# How often each unit was drawn, (R, n), to the score of each resample, (R,); NaN where it has none.
Statistic = Callable[[Floats], Floats]

RESAMPLES = 1000
CONFIDENCE = 0.95
_CHUNK = 2**22  # drawn units in memory at a time


def bootstrap_interval(statistic: Statistic, units: int) -> tuple[float, float]:
    """The interval that holds the middle 95 % of the scores of 1,000 resamples; the same numbers at every call.

    Args:
        statistic: takes all resamples of a chunk at once, as weights, so that nothing loops over them.
        units: ``n``, at least 1.
    """
    generator = np.random.default_rng(0)
    rows = max(1, min(RESAMPLES, _CHUNK // units))
    scores = np.concatenate(
        [statistic(_weights(generator, min(rows, RESAMPLES - start), units)) for start in range(0, RESAMPLES, rows)]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(scores, [tail, 1 - tail])
    return float(low), float(high)


def _weights(generator: np.random.Generator, rows: int, units: int) -> Floats:
    """How often each unit is drawn: (rows, units), every row sums to ``units``."""
    drawn = generator.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units).astype(np.float64)


def weighted_mean(values: Floats) -> Statistic:
    """The mean of ``values`` (n,) over the drawn units."""
    # Summed by numpy itself: a BLAS product may add in another order with another number of threads.
    return lambda weights: (weights * values).sum(axis=1) / weights.sum(axis=1)


def weighted_macro_mean(values: Floats, classes: npt.NDArray[np.int64]) -> Statistic:
    """The mean over classes of the mean of ``values`` (n,) in each; classes that were not drawn are left out.

    Args:
        classes: (n,) class of each unit, every number from 0 on at least once.
    """
    order = np.argsort(classes, kind="stable")
    starts = np.searchsorted(classes[order], np.arange(classes.max() + 1))

    def statistic(weights: Floats) -> Floats:
        drawn = np.add.reduceat(weights[:, order], starts, axis=1)  # [R, classes]
        sums = np.add.reduceat((weights * values)[:, order], starts, axis=1)  # [R, classes]
        means: Floats = np.divide(sums, drawn, out=np.full_like(sums, np.nan), where=drawn > 0)
        return np.asarray(np.nanmean(means, axis=1))

    return statistic


def weighted_auroc(scores: Floats, positive: npt.NDArray[np.bool_]) -> Statistic:
    """The chance that a drawn positive has a higher score than a drawn negative, ties counted half.

    That is the area under the ROC curve (Hanley and McNeil 1982); NaN where all drawn are of one class.
    """
    levels, level = np.unique(scores, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.searchsorted(level[order], np.arange(len(levels)))

    def statistic(weights: Floats) -> Floats:
        positives = np.add.reduceat((weights * positive)[:, order], starts, axis=1)  # [R, levels]
        negatives = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
        below = negatives.cumsum(axis=1) - negatives / 2
        pairs = positives.sum(axis=1) * negatives.sum(axis=1)
        wins = (positives * below).sum(axis=1)
        return np.divide(wins, pairs, out=np.full_like(wins, np.nan), where=pairs > 0)

    return statistic
