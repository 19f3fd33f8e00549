"""How long an answer may become: as long as the reference answers ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from phi3v.data.collate import QuestionDataset
from phi3v.findings import Finding
from phi3v.processing.conversation import END
from phi3v.processing.processor import Phi3VProcessor

SHORTEST, LONGEST = 64, 2048  # of limits that come from the references
MARGIN = 1.25


@dataclass(frozen=True)
class AnswerLimit:
    """The tokens that an answer may have, and where that comes from.

    Attributes:
        tokens: of an answer at most, its end included.
        is_given: configured, and not taken from the references.
        longest: tokens of the longest reference answer; 0 if none comes near the limit.
        too_long: questions that no reference answer of theirs fits, so that a right answer would be cut.
        first: id of the first of these.
        questions: how many there are in all.
    """

    tokens: int
    is_given: bool
    longest: int
    too_long: int
    first: str
    questions: int

    @property
    def finding(self) -> Finding | None:
        """What to say where right answers would be cut."""
        if not self.too_long:
            return None
        return Finding(
            "answers",
            "warn",
            f"{self.too_long:,} of {self.questions:,} questions have reference answers of more than {self.tokens:,} "
            f"tokens, where answers are cut (first {self.first!r}; the longest has {self.longest:,})",
            f"set evaluation.max_new_tokens to {math.ceil(MARGIN * self.longest)}, or leave those questions out",
        )

    def __str__(self) -> str:
        if self.is_given:
            reason = "as configured"
        elif self.tokens == SHORTEST:
            reason = "no reference answer is nearly as long"
        else:
            reason = f"the longest reference answer has {self.longest:,}"
        return f"at most {self.tokens:,} tokens ({reason})"


def answer_limit(questions: QuestionDataset, wanted: int | None) -> AnswerLimit:
    """The limit for these questions.

    Args:
        wanted: tokens, as configured; by default a quarter more than the longest reference answer has, within
            `SHORTEST` and `LONGEST`.
    """
    floor = wanted if wanted is not None else int(SHORTEST / MARGIN)
    long: list[tuple[str, int, int]] = []  # id, tokens of the shortest and of the longest reference
    for question in questions.questions():
        sizes = [_tokens(questions.processor, text, floor) for text in question.references]
        if max(sizes) > floor:
            long.append((question.id, min(sizes), max(sizes)))
    longest = max((most for _, _, most in long), default=0)
    tokens = wanted or min(LONGEST, max(SHORTEST, math.ceil(MARGIN * longest)))
    too_long = [name for name, least, _ in long if least > tokens]
    return AnswerLimit(
        tokens, wanted is not None, longest, len(too_long), too_long[0] if too_long else "", len(questions)
    )


def _tokens(processor: Phi3VProcessor, answer: str, floor: int) -> int:
    """Tokens of an answer and its end; 0 where they are at most ``floor`` for certain: a token has a byte at least."""
    if len(answer.encode()) + 2 <= floor:
        return 0
    return len(processor.tokenize_text(answer + END))
