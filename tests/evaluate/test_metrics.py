"""Scores of many answers against cases worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phi3v.config import METRIC_NAMES
from phi3v.evaluate.metrics import METRICS, Answers, most_frequent_answer, score_answers


def answers(predictions: list[str], references: list[Any], questions: list[str] | None = None) -> Answers:
    lists = [[reference] if isinstance(reference, str) else reference for reference in references]
    return Answers(questions or [f"q{i}" for i in range(len(lists))], lists, predictions)


def ranked(probabilities: list[float], labels: list[int]) -> Answers:
    count = len(labels)
    words = ["no", "Yes."]
    references = [[words[label]] for label in labels]
    both = np.array([[p, 1 - p] for p in probabilities])
    return Answers(["q"] * count, references, [""] * count, ["yes", "no"], both)


def test_every_name_of_the_configuration_has_a_metric() -> None:
    assert tuple(METRICS) == METRIC_NAMES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", 2 / 4),
        ("anls", (1 + 1 + 4 / 5 + 0) / 4),
        ("exact_match", 1 / 4),
        ("relaxed_accuracy", 2 / 4),
        ("token_f1", 2 / 4),
    ],
)
def test_means_over_questions(name: str, expected: float) -> None:
    score = score_answers(name, answers(["a", "B", "gren", ""], ["a", ["x", "b"], "green", "c"]))
    assert score.value == pytest.approx(expected)
    assert score.n == 4
    assert score.low is not None
    assert score.high is not None
    assert 0 <= score.low <= expected <= score.high <= 1


def test_per_class_accuracy_and_the_confusion_matrix() -> None:
    #            right  right   b for a  no class  right  other reference
    predictions = ["A.", "a", "b", "elephant", "b", "also b"]
    references = ["a", "a", "a", "a", "b", ["b", "also b"]]
    score = score_answers("per_class_accuracy", answers(predictions, references))
    assert score.value == pytest.approx((2 / 4 + 2 / 2) / 2)
    assert score.n == 6
    assert score.details["classes"] == {"a": {"value": 0.5, "n": 4}, "b": {"value": 1.0, "n": 2}}
    assert score.details["confusion"] == {
        "rows": ["a", "b"],
        "columns": ["a", "b", "other"],
        "counts": [[2, 1, 1], [0, 2, 0]],
    }


def test_consistency_counts_statements() -> None:
    questions = ["s1", "s2", "s1", "s3", "s2", "s1"]
    predictions = ["true", "false", "True.", "true", "true", "false"]
    references = ["True", "False", "True", "True", "True", "False"]
    score = score_answers("consistency", answers(predictions, references, questions))
    assert (score.value, score.n) == (1.0, 3)
    predictions[5] = ""  # one wrong answer of three spoils s1
    score = score_answers("consistency", answers(predictions, references, questions))
    assert score.value == pytest.approx(2 / 3)
    assert score.details["questions"] == 6
    assert score_answers("accuracy", answers(predictions, references, questions)).value == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("probabilities", "labels", "expected"),
    [
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),  # the example of scikit-learn's documentation
        ([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0], 1.0),
        ([0.1, 0.9], [1, 0], 0.0),
        ([0.5, 0.5, 0.5], [1, 0, 0], 0.5),  # all tied
        ([0.2, 0.5, 0.5, 0.9], [0, 0, 1, 1], 3.5 / 4),  # one of four pairs tied
    ],
)
def test_auroc(probabilities: list[float], labels: list[int], expected: float) -> None:
    score = score_answers("auroc", ranked(probabilities, labels))
    assert score.value == pytest.approx(expected, abs=1e-9)
    assert score.details == {"positive": "yes", "n_positive": sum(labels)}
    assert score.low is not None
    assert score.high is not None
    assert 0 <= score.low <= score.high <= 1


@pytest.mark.parametrize(("label", "words"), [(1, "only positives"), (0, "no positive")])
def test_auroc_of_one_class_says_why_there_is_none(label: int, words: str) -> None:
    score = score_answers("auroc", ranked([0.2, 0.7], [label, label]))
    assert score.value is score.low is score.high is None
    assert words in str(score)
    assert words in score.to_json_dict()["note"]


def test_auroc_without_probabilities_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs the probabilities"):
        score_answers("auroc", answers(["yes"], ["yes"]))


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_scores_are_the_same_at_every_call(name: str) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=40)
    given = ranked(rng.random(40).tolist(), labels.tolist())
    assert score_answers(name, given) == score_answers(name, given)


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"])])
def test_nothing_to_score_is_an_error(predictions: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match="cannot score"):
        answers(predictions, references)


def test_beside_each_score_stands_that_of_the_most_frequent_answer() -> None:
    references = [*["no"] * 18, "No.", "yes"]
    given = answers(["yes"] * 20, references)
    score = score_answers("accuracy", given)
    assert (score.value, score.most_frequent) == (pytest.approx(1 / 20), pytest.approx(19 / 20))
    assert score.summary()["most_frequent"] == score.most_frequent
    for name in ("anls", "exact_match", "token_f1", "per_class_accuracy", "consistency"):
        constant = score_answers(name, answers(["no"] * 20, references))
        assert score_answers(name, given).most_frequent == constant.value == constant.most_frequent
    assert score_answers("auroc", ranked([0.9, 0.2, 0.4], [1, 0, 0])).most_frequent == pytest.approx(0.5)


def test_the_most_frequent_answer_is_one_that_most_questions_have() -> None:
    # Written in three ways; "red" is there more often, but in fewer questions.
    references = [["Blue", "red", "red."], ["blue", "red", "red"], ["blue"]]
    assert most_frequent_answer(references) == "blue"
