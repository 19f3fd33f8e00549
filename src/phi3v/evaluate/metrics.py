"""Scores of a model's answers, each with its interval: pure functions, chosen by name.

The names are those of ``config.METRIC_NAMES``; how single answers are compared is in `text_scores.py`, how sure a
score is in `bootstrap.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from phi3v.evaluate import text_scores
from phi3v.evaluate.bootstrap import (
    Floats,
    Statistic,
    bootstrap_interval,
    weighted_auroc,
    weighted_macro_mean,
    weighted_mean,
)
from phi3v.evaluate.text_scores import is_correct, normalize_answer

OTHER = "other"  # the column of predictions that are no class


@dataclass(frozen=True)
class Answers:
    """What a model answered. All lists are equally long, one entry a question.

    Attributes:
        words: candidate answers, the positive one first; only for metrics that need probabilities.
        probabilities: (questions, words), each row sums to 1.
    """

    questions: Sequence[str]
    references: Sequence[Sequence[str]]
    predictions: Sequence[str]
    words: Sequence[str] = ()
    probabilities: Floats | None = None

    def __post_init__(self) -> None:
        counts = {len(self.questions), len(self.references), len(self.predictions)}
        if len(counts) > 1 or not self.questions:
            raise ValueError(
                f"cannot score {len(self.predictions)} predictions of {len(self.questions)} questions against "
                f"{len(self.references)} references"
            )


@dataclass(frozen=True)
class Score:
    """A score with its bootstrap 95 % interval.

    Attributes:
        value: in 0..1, or None where the data has no such score; `note` says why.
        low, high: the interval.
        most_frequent: what the most frequent reference answer would score, given to every question.
        n: how many units were averaged: questions, or groups of questions for consistency.
        details: more results, such as a confusion matrix, as plain values.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    note: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    most_frequent: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return f"none ({self.note})"
        return f"{100 * self.value:.2f} % [{100 * (self.low or 0):.2f}, {100 * (self.high or 0):.2f}]"

    def summary(self) -> dict[str, Any]:
        """Value, interval, n and what the most frequent answer scores, as plain values."""
        interval = {"value": self.value, "low": self.low, "high": self.high, "n": self.n}
        return interval | {"most_frequent": self.most_frequent}

    def to_json_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return self.summary() | ({"note": self.note} if self.note else {}) | self.details


@dataclass(frozen=True)
class Metric:
    """How a score is computed.

    Attributes:
        compute: all answers to a score.
        of_answer: one prediction and its references to that question's own score.
    """

    compute: Callable[[str, Answers], Score]
    of_answer: Callable[[str, Sequence[str]], float] = text_scores.accuracy
    needs_probabilities: bool = False


def score_answers(name: str, answers: Answers) -> Score:
    """The score of the metric called ``name``, a key of `METRICS`, with what the most frequent answer would score."""
    compute = METRICS[name].compute
    constant = [most_frequent_answer(answers.references)] * len(answers.predictions)
    probabilities = answers.probabilities
    if probabilities is not None:
        probabilities = np.full_like(probabilities, 1 / probabilities.shape[1])
    baseline = compute(name, replace(answers, predictions=constant, probabilities=probabilities))
    return replace(compute(name, answers), most_frequent=baseline.value)


def most_frequent_answer(references: Sequence[Sequence[str]]) -> str:
    """The reference answer of the most questions, as it is mostly written; of equals the first."""
    counts = Counter(text for of_question in references for text in dict.fromkeys(map(normalize_answer, of_question)))
    most = counts.most_common(1)[0][0]
    written = Counter(text for of_question in references for text in of_question if normalize_answer(text) == most)
    return written.most_common(1)[0][0]


def _score(name: str, statistic: Statistic, units: int, *, details: dict[str, Any] | None = None) -> Score:
    value = float(statistic(np.ones((1, units)))[0])
    low, high = bootstrap_interval(statistic, units)
    return Score(name, value, low, high, units, details=details or {})


def _per_answer(name: str, answers: Answers) -> Floats:
    pairs = zip(answers.predictions, answers.references, strict=True)
    return np.array([METRICS[name].of_answer(prediction, references) for prediction, references in pairs])


def _mean(name: str, answers: Answers) -> Score:
    """The mean of the questions' scores."""
    return _score(name, weighted_mean(_per_answer(name, answers)), len(answers.questions))


def confusion_matrix(
    references: Sequence[Sequence[str]], predictions: Sequence[str], correct: Sequence[bool]
) -> dict[str, Any]:
    """How often each class was answered by each.

    A question's class is its first reference. A prediction that matches another reference of its question counts as
    right.

    Args:
        references, predictions, correct: one entry a question.

    Returns:
        ``rows``, the classes; ``columns``, the classes and `OTHER`; ``counts``, a list of columns for each row.
    """
    truth = [normalize_answer(of_question[0]) for of_question in references]
    labels = sorted(set(truth))
    number = {label: index for index, label in enumerate(labels)}
    rows = np.array([number[label] for label in truth], dtype=np.int64)
    given = [number.get(normalize_answer(prediction), len(labels)) for prediction in predictions]
    columns = np.where(np.array(correct), rows, np.array(given, dtype=np.int64))
    counts = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    np.add.at(counts, (rows, columns), 1)
    return {"rows": labels, "columns": [*labels, OTHER], "counts": counts.tolist()}


def _per_class_accuracy(name: str, answers: Answers) -> Score:
    """The mean over classes of the accuracy in each, with the `confusion_matrix`."""
    correct = _per_answer(name, answers)
    confusion = confusion_matrix(answers.references, answers.predictions, (correct > 0).tolist())
    number = {label: index for index, label in enumerate(confusion["rows"])}
    truth = [number[normalize_answer(references[0])] for references in answers.references]
    sizes = [sum(counts) for counts in confusion["counts"]]
    details = {
        "classes": {
            label: {"value": confusion["counts"][index][index] / sizes[index], "n": sizes[index]}
            for label, index in number.items()
        },
        "confusion": confusion,
    }
    rows = np.array(truth, dtype=np.int64)
    return _score(name, weighted_macro_mean(correct, rows), len(rows), details=details)


def _consistency(name: str, answers: Answers) -> Score:
    """The share of statements whose every question is answered rightly (NLVR2, arXiv 1811.00491).

    Questions with the same text ask about the same statement; whole statements are resampled.
    """
    correct = _per_answer(name, answers)
    statements: dict[str, float] = {}
    for question, right in zip(answers.questions, correct, strict=True):
        statements[question] = min(statements.get(question, 1.0), float(right))
    values = np.array(list(statements.values()))
    return _score(name, weighted_mean(values), len(values), details={"questions": len(answers.questions)})


def is_positive(references: Sequence[Sequence[str]], words: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether the first of ``words`` is a reference of each question: (questions,)."""
    return np.array([is_correct(words[0], of_question) for of_question in references])


def _auroc(name: str, answers: Answers) -> Score:
    """The area under the ROC curve of the first answer word's probability; ties count half."""
    if answers.probabilities is None:
        raise ValueError("AUROC needs the probabilities of the answer words")
    positive = is_positive(answers.references, answers.words)
    details = {"positive": answers.words[0], "n_positive": int(positive.sum())}
    if positive.all() or not positive.any():
        only = "only positives" if positive.all() else "no positive"
        note = f"{only} ({answers.words[0]!r}) among {len(positive)} questions: there is nothing to rank"
        return Score(name, None, None, None, len(positive), note, details)
    return _score(name, weighted_auroc(answers.probabilities[:, 0], positive), len(positive), details=details)


METRICS: dict[str, Metric] = {
    "accuracy": Metric(_mean),
    "anls": Metric(_mean, text_scores.anls),
    "exact_match": Metric(_mean, text_scores.exact_match),
    "relaxed_accuracy": Metric(_mean, text_scores.relaxed_accuracy),
    "token_f1": Metric(_mean, text_scores.token_f1),
    "per_class_accuracy": Metric(_per_class_accuracy),
    "auroc": Metric(_auroc, needs_probabilities=True),
    "consistency": Metric(_consistency),
}
