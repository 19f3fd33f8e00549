"""Scores against cases worked out by hand."""

from __future__ import annotations

import pytest

from phi3v.evaluate.metrics import accuracy, is_correct, normalize_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Yes. ", "yes"),
        ("TRUE", "true"),
        ("..a.b..", "a.b"),
        ("3.5", "3.5"),
        ("", ""),
        ("Baby Crawling", "baby crawling"),
    ],
)
def test_answers_are_compared_as_the_recipe_does(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_any_reference_counts() -> None:
    assert is_correct("No.", ["yes", "no"])
    assert not is_correct("not", ["yes", "no"])


def test_accuracy() -> None:
    assert accuracy(["a", "B.", "c"], [["a"], ["b"], ["d", "e"]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], [["a"], ["b"]])])
def test_nothing_to_score_is_an_error(predictions: list[str], references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="cannot score"):
        accuracy(predictions, references)
