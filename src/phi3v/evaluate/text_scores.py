"""How good one answer is: pure functions of a prediction and its reference answers, each in 0..1.

Where a question has several references, the best of them counts. `docs/evaluation.md` sets the definitions side by
side.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """As the public recipe compares: without surrounding white space and full stops, in lower case."""
    return text.strip().strip(".").lower()


def is_correct(prediction: str, references: Sequence[str]) -> bool:
    """Whether ``prediction`` equals any reference after :func:`normalize_answer`."""
    return normalize_answer(prediction) in {normalize_answer(reference) for reference in references}


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """The recipe's accuracy: 1 if :func:`is_correct`."""
    return float(is_correct(prediction, references))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference is the very same text; only white space around it is set aside."""
    return float(prediction.strip() in {reference.strip() for reference in references})


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al., ICCV 2019, arXiv 1905.13648).

    ``1 - distance / length of the longer text``, and 0 where that is below 0.5. Texts are normalised as by the
    official script of the DocVQA challenge: lower case, no white space around, single spaces within. Like that script,
    and unlike the paper's formula and the public recipe, a similarity of exactly 0.5 counts. The official script
    divides by lengths from before the normalisation, so that superfluous white space would raise a score; not so here.
    """
    best = max(_similarity(prediction, reference) for reference in references)
    return best if best >= ANLS_THRESHOLD else 0.0


def _similarity(prediction: str, reference: str) -> float:
    one, two = (" ".join(text.lower().split()) for text in (prediction, reference))
    longer = max(len(one), len(two))
    return 1.0 if longer == 0 else 1.0 - Levenshtein.distance(one, two) / longer


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if a number is within 5 % of the reference, or a text equals it but for case (ChartQA, arXiv 2203.10244).

    As `relaxed_correctness` of Pix2Struct's ``metrics.py``: ``12%`` is read as 0.12, and a reference of 0, which has
    no relative error, is compared as text.
    """
    return float(any(_relaxed_match(prediction.strip(), reference.strip()) for reference in references))


def _relaxed_match(prediction: str, reference: str) -> bool:
    given, expected = _number(prediction), _number(reference)
    if given is not None and expected:
        return abs(given - expected) / abs(expected) <= RELAXED_TOLERANCE
    return prediction.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the bags of words, normalised as by SQuAD's ``evaluate-v2.0.py``.

    Lower case, no ASCII punctuation, no articles. Where a text has no word left, 1 if both have none.
    """
    return max(_f1(_words(prediction), _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    common = (Counter(prediction) & Counter(reference)).total()
    # 2 * precision * recall / (precision + recall), with the fractions cleared
    return 2 * common / (len(prediction) + len(reference))
