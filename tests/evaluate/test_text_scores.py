"""Single answers against cases worked out by hand."""

from __future__ import annotations

import pytest

from phi3v.evaluate.text_scores import (
    anls,
    exact_match,
    is_correct,
    normalize_answer,
    relaxed_accuracy,
    token_f1,
)


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


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Denver Broncos", ["denver broncos"], 1.0),
        ("hallo", ["hello"], 0.8),  # one of five letters
        ("ab", ["ax"], 0.5),  # exactly the threshold counts, as in the official script
        ("abc", ["axy"], 0.0),  # 1/3 is below it
        ("12/15/89", ["12/15/88", "15 December 1988"], 7 / 8),
        ("hallo", ["nothing alike", "hello"], 0.8),
        ("", ["a"], 0.0),
        ("a", ["abcd"], 0.0),
        ("  New \t York\n", ["new york"], 1.0),
        ("New  Yrok", ["new york"], 1 - 2 / 8),  # a swap is two edits; lengths are those after the normalisation
        ("Straße", ["STRASSE"], 1 - 2 / 7),  # lower case is not case folding
        ("über", ["uber"], 0.75),
        ("日本語", ["日本"], 2 / 3),
        ("👍🏽", ["👍🏽"], 1.0),
        ("12.", ["12"], 2 / 3),  # a full stop counts, other than in the recipe's accuracy
    ],
)
def test_anls(prediction: str, references: list[str], expected: float) -> None:
    assert anls(prediction, references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [("Paris ", ["Paris"], 1.0), ("paris", ["Paris"], 0.0), ("Paris.", ["Paris"], 0.0), ("b", ["a", "b"], 1.0)],
)
def test_exact_match(prediction: str, references: list[str], expected: float) -> None:
    assert exact_match(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("105", ["100"], 1.0),
        ("95", ["100"], 1.0),
        ("105.1", ["100"], 0.0),
        ("-105", ["-100"], 1.0),
        ("5%", ["0.05"], 1.0),
        ("100", ["3", "98"], 1.0),
        ("0", ["0"], 1.0),
        ("0.0", ["0"], 0.0),  # zero has no relative error, and the texts differ
        ("1,000", ["1000"], 0.0),  # as in Pix2Struct: no thousands separators
        ("1,000", ["1,000"], 1.0),
        ("Germany", ["germany"], 1.0),
        ("German", ["Germany"], 0.0),
        ("nan", ["nan"], 1.0),
        ("inf", ["1"], 0.0),
        ("", ["1"], 0.0),
        ("2021", ["1991"], 1.0),  # years too are numbers
    ],
)
def test_relaxed_accuracy(prediction: str, references: list[str], expected: float) -> None:
    assert relaxed_accuracy(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The red, circle!", ["a Red circle"], 1.0),
        ("red circle", ["red square"], 0.5),
        ("red red circle", ["red circle"], 0.8),  # precision 2/3, recall 1
        ("red", ["blue", "red square"], 2 / 3),
        ("", ["red"], 0.0),
        ("the", ["a"], 1.0),  # both have no word left
        ("the", ["red"], 0.0),
        ("café ouvert", ["Café"], 2 / 3),
        ("theatre", ["atre"], 0.0),  # articles are whole words
    ],
)
def test_token_f1(prediction: str, references: list[str], expected: float) -> None:
    assert token_f1(prediction, references) == pytest.approx(expected)
