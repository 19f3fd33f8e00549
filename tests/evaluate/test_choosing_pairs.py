"""Pairs chosen from scored answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from phi3v.data.schema import Turn
from phi3v.evaluate.pairs import Drawn, Pair, PairCounts, choose_pair

TURN = Turn("What is the total?", "12.50")


def drawn(*texts: str) -> list[Drawn]:
    return [Drawn(text) for text in texts]


@pytest.mark.parametrize(
    ("answers", "options", "expected"),
    [
        (["12.50", "12.51", "99"], {}, Pair("12.50", "99", (1.0, 0.0))),
        # Of equally bad answers the one that the model gives most, of equally good ones too.
        (["7", "8", "8", "12.50"], {}, Pair("12.50", "8", (1.0, 0.0))),
        (["7", "8", "8", "12.51", "12.59", "12.59"], {}, Pair("12.59", "8", (0.8, 0.0))),
        (["12.50", "12.51"], {"min_margin": 0.5}, None),
        (["12.50", "12.51"], {"min_margin": 0.2}, Pair("12.50", "12.51", (1.0, 0.8))),
        (["12.50", "12.50"], {}, None),
        (["7", "8"], {}, None),
        (["7", "8"], {"chosen": "reference"}, Pair("12.50", "7", (1.0, 0.0))),
        (["12.50", " 12.50 "], {"chosen": "reference"}, None),
        ([" ", "<|end|>", "12.50"], {}, None),
        (["12.50", "<s>7", "6"], {}, Pair("12.50", "6", (1.0, 0.0))),
        ([], {"chosen": "reference"}, None),
    ],
)
def test_the_best_stands_against_the_worst(answers: list[str], options: dict[str, Any], expected: Pair | None) -> None:
    pair = choose_pair(TURN, drawn(*answers), "anls", **options)
    if expected is None or pair is None:
        assert pair is expected
        return
    assert (pair.chosen, pair.rejected) == (expected.chosen, expected.rejected)
    assert pair.scores == pytest.approx(expected.scores)
    assert pair.margin == pytest.approx(expected.scores[0] - expected.scores[1])


def test_an_answer_that_was_cut_is_on_neither_side() -> None:
    answers = [Drawn("12.50"), Drawn("the total, which", cut=True), Drawn("7 or 8")]
    pair = choose_pair(TURN, answers, "anls")
    assert pair is not None
    assert (pair.chosen, pair.rejected) == ("12.50", "7 or 8")
    assert choose_pair(TURN, answers[1:2], "anls", chosen="reference") is None


def test_the_reference_is_no_answer_that_is_labelled_bad() -> None:
    pair = choose_pair(replace(TURN, label=False, answers=("7",)), drawn("8"), "anls", chosen="reference")
    assert pair is not None
    assert (pair.chosen, pair.rejected) == ("7", "8")


def test_no_reference_is_rejected() -> None:
    turn = Turn("Which?", "a dog", answers=("a dog", "it is a very small dog"))
    answers = drawn("a dog", "it is a very  small dog")
    assert choose_pair(turn, answers, "token_f1") is None
    pair = choose_pair(turn, [*answers, Drawn("a cat")], "token_f1")
    assert pair is not None
    assert (pair.chosen, pair.rejected) == ("a dog", "a cat")


def test_every_question_is_counted_once() -> None:
    counts = PairCounts()
    for answers in (["12.50", "7"], ["12.50", "12.50"], ["7", "8"], ["12.50", "12.51"], [" ", "<|end|>"]):
        pair = choose_pair(TURN, drawn(*answers), "anls", min_margin=0.5)
        counts.add(TURN, drawn(*answers), "anls", pair)
    told = counts.to_json_dict()
    assert (told["questions"], told["pairs"], told["answers"]) == (5, 1, 10)
    assert set(told["without_a_pair"].values()) == {1}
    assert (told["cut"], told["empty_or_special"]) == (0, 2)
    assert told["mean_score"] == pytest.approx((0.5 + 1 + 0 + 0.9 + 0) / 5)
    assert told["mean_characters"] == {"chosen": 5, "rejected": 1}
    assert "without a pair: 4 (all answers are right 1, all answers score the same 1" in "\n".join(
        counts.describe("anls")
    )
