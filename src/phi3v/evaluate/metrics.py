"""Scores of generated answers: pure functions of texts."""

from __future__ import annotations

from collections.abc import Sequence


def normalize_answer(text: str) -> str:
    """As the public recipe compares: without surrounding white space and full stops, in lower case."""
    return text.strip().strip(".").lower()


def is_correct(prediction: str, references: Sequence[str]) -> bool:
    """Whether ``prediction`` equals any reference after :func:`normalize_answer`."""
    return normalize_answer(prediction) in {normalize_answer(reference) for reference in references}


def accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of correct predictions, in 0..1.

    Raises:
        ValueError: nothing to score, or the lists are of different length.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"cannot score {len(predictions)} predictions against {len(references)} references")
    correct = sum(is_correct(p, r) for p, r in zip(predictions, references, strict=True))
    return correct / len(predictions)
