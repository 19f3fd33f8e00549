"""Pairs of a better and a worse answer, chosen from answers that were scored against the references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from phi3v.data.schema import Turn
from phi3v.evaluate.metrics import METRICS
from phi3v.processing.special_text import find_special_text

Chosen = Literal["best", "reference"]


@dataclass(frozen=True)
class Drawn:
    """An answer that a model gave.

    Attributes:
        cut: it reached the limit before its end.
    """

    text: str
    cut: bool = False

    @property
    def is_usable(self) -> bool:
        """Whether it may stand in a data file: it has an end, a text, and none that would be read as special tokens."""
        return not self.cut and bool(self.text.strip()) and not find_special_text(self.text)


@dataclass(frozen=True)
class Pair:
    """A better and a worse answer to one question, with their scores."""

    chosen: str
    rejected: str
    scores: tuple[float, float]

    @property
    def margin(self) -> float:
        """By how much the better one is better."""
        return self.scores[0] - self.scores[1]


def choose_pair(
    turn: Turn, answers: Sequence[Drawn], metric: str, *, chosen: Chosen = "best", min_margin: float = 0.0
) -> Pair | None:
    """The answer of the highest score against that of the lowest; of equal ones, the one that was given most often.

    Args:
        turn: the question with its references.
        chosen: ``reference`` takes the turn's own answer for the better one.
        min_margin: by how much the scores must differ at least; they always must by more than 0.

    Returns:
        None if there is no such pair.
    """
    references = turn.answers or (turn.assistant,)
    score = METRICS[metric].of_answer
    counts = Counter(answer.text for answer in answers if answer.is_usable)
    scores = {text: score(text, references) for text in counts}
    if not scores:
        return None
    if chosen == "best":
        best = max(scores, key=lambda text: (scores[text], counts[text]))
    else:
        best = turn.answers[0] if turn.label is False else turn.assistant  # a bad answer has others to score by
    # A reference is no wrong answer, whatever the metric makes of it beside another one.
    right = {_plain(text) for text in (*references, best)}
    worse = [text for text in scores if _plain(text) not in right]
    if not worse:
        return None
    worst = min(worse, key=lambda text: (scores[text], -counts[text]))
    pair = Pair(best, worst, (score(best, references), scores[worst]))
    return pair if pair.margin > 0 and pair.margin > min_margin - 1e-9 else None  # 1 - 0.8 is less than 0.2


def _plain(text: str) -> str:
    return " ".join(text.split())


@dataclass
class PairCounts:
    """What became of the questions.

    Attributes:
        questions: how many were asked.
        pairs: how many gave a pair.
        right: no pair: all usable answers have the metric's full score.
        equal: no pair: all usable answers have the same lower score.
        close: no pair, or one of too small a margin.
        unusable: no answer can be used.
        answers, cut, empty_or_special: answers in all, and those that cannot be used.
        score, best: sums of the mean and of the highest score of each question's answers.
        margin: sum over pairs.
        lengths: sums of characters of chosen and of rejected answers.
    """

    questions: int = 0
    pairs: int = 0
    right: int = 0
    equal: int = 0
    close: int = 0
    unusable: int = 0
    answers: int = 0
    cut: int = 0
    empty_or_special: int = 0
    score: float = 0.0
    best: float = 0.0
    margin: float = 0.0
    lengths: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, turn: Turn, answers: Sequence[Drawn], metric: str, pair: Pair | None) -> None:
        """Count a question."""
        scores = [METRICS[metric].of_answer(answer.text, turn.answers or (turn.assistant,)) for answer in answers]
        usable = [score for score, answer in zip(scores, answers, strict=True) if answer.is_usable]
        self.questions += 1
        self.answers += len(answers)
        self.cut += sum(answer.cut for answer in answers)
        self.empty_or_special += sum(not answer.cut and not answer.is_usable for answer in answers)
        self.score += sum(scores) / len(scores)
        self.best += max(scores)
        if pair is not None:
            self.pairs += 1
            self.margin += pair.margin
            self.lengths[0] += len(pair.chosen)
            self.lengths[1] += len(pair.rejected)
        elif not usable:
            self.unusable += 1
        elif min(usable) < max(usable):
            self.close += 1
        elif max(usable) >= 1:
            self.right += 1
        else:
            self.equal += 1

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values; means where there is something to average."""
        pairs = max(self.pairs, 1)
        return {
            "questions": self.questions,
            "pairs": self.pairs,
            "without_a_pair": {
                "all_right": self.right,
                "all_equal": self.equal,
                "margin_too_small": self.close,
                "no_usable_answer": self.unusable,
            },
            "answers": self.answers,
            "cut": self.cut,
            "empty_or_special": self.empty_or_special,
            "mean_score": self.score / max(self.questions, 1),
            "mean_best_score": self.best / max(self.questions, 1),
            "mean_margin": self.margin / pairs,
            "mean_characters": {"chosen": self.lengths[0] / pairs, "rejected": self.lengths[1] / pairs},
        }

    def describe(self, metric: str) -> list[str]:
        """In words, a line each."""
        mean = self.to_json_dict()
        lines = [
            f"{metric} of {self.answers:,} answers to {self.questions:,} questions: mean {mean['mean_score']:.3f}, "
            f"best of each question {mean['mean_best_score']:.3f}",
            f"pairs: {self.pairs:,} of {self.questions:,} questions, margin {mean['mean_margin']:.3f} on average, "
            f"{mean['mean_characters']['chosen']:.0f} characters chosen, "
            f"{mean['mean_characters']['rejected']:.0f} rejected",
        ]
        without = {
            "all answers are right": self.right,
            "all answers score the same": self.equal,
            "the margin is too small": self.close,
            "no answer can be used": self.unusable,
        }
        if any(without.values()):
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in without.items() if count)
            lines.append(f"without a pair: {self.questions - self.pairs:,} ({reasons})")
        if self.cut + self.empty_or_special:
            left_out = f"{self.cut:,} cut at the limit, {self.empty_or_special:,} empty or with special tokens"
            lines.append(f"answers left out: {left_out}")
        return lines
