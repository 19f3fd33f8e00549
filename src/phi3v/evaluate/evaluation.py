"""Evaluating a model on a data file: answers, scores, and the files that hold them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phi3v.config import EvaluationConfig
from phi3v.data.collate import Question, QuestionDataset
from phi3v.data.jsonl import replacing, write_jsonl
from phi3v.errors import UserError
from phi3v.evaluate.answer_limit import answer_limit
from phi3v.evaluate.generate import Generated, generate_answers
from phi3v.evaluate.metrics import METRICS, Answers, Score, most_frequent_answer, score_answers
from phi3v.evaluate.text_scores import is_correct, normalize_answer
from phi3v.processing.processor import Phi3VProcessor


@dataclass(frozen=True)
class EvaluationResult:
    """Scores, the task's own first, and the answers behind them.

    Attributes:
        max_new_tokens: where answers were cut.
        sources: the source of each question, where they are of several.
        scores_of: the scores of each source.
    """

    scores: list[Score]
    seconds: float
    questions: list[Question]
    generated: list[Generated]
    answer_words: list[str]
    max_new_tokens: int
    sources: list[str] = field(default_factory=list)
    scores_of: dict[str, list[Score]] = field(default_factory=dict)

    @property
    def primary(self) -> Score:
        """The task's own score."""
        return self.scores[0]

    @property
    def num_cut(self) -> int:
        """Answers that were cut at ``max_new_tokens``."""
        return sum(answer.cut for answer in self.generated)

    @property
    def most_frequent_answer(self) -> str:
        """The reference answer whose score stands beside each score."""
        return most_frequent_answer([question.references for question in self.questions])

    def __str__(self) -> str:
        cut = f", {self.num_cut} of {len(self.generated)} answers cut" if self.num_cut else ""
        each = ", ".join(f"{name} {scores[0]}" for name, scores in self.scores_of.items())
        return ", ".join(f"{score.name} {score}" for score in self.scores) + f" ({each})" * bool(each) + cut

    def write(self, folder: Path, suffix: str = "") -> None:
        """Write ``eval{suffix}.json`` and ``predictions{suffix}.jsonl``.

        Raises:
            UserError: they cannot be written.
        """
        text = json.dumps(self.to_json_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / f"eval{suffix}.json") as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
            write_jsonl(folder / f"predictions{suffix}.jsonl", self.predictions(), overwrite=True)
        except OSError as error:
            raise UserError(
                f"the evaluation cannot be written: {error.strerror or error}",
                where=str(folder),
                hint="its scores are printed above",
            ) from error

    def summary(self) -> dict[str, Any]:
        """All scores, without the answers."""
        return {
            "metric": self.primary.name,
            "score": self.primary.value,
            "num_questions": len(self.questions),
            "seconds": round(self.seconds, 2),
            "max_new_tokens": self.max_new_tokens,
            "num_cut": self.num_cut,
            "most_frequent_answer": self.most_frequent_answer,
            "scores": {score.name: score.to_json_dict() for score in self.scores},
        } | ({"sources": self.source_summaries()} if self.sources else {})

    def source_summaries(self) -> dict[str, dict[str, Any]]:
        """For each source its number of questions, its most frequent answer and its scores."""
        references: dict[str, list[tuple[str, ...]]] = {}
        for name, question in zip(self.sources, self.questions, strict=True):
            references.setdefault(name, []).append(question.references)
        return {
            name: {
                "num_questions": len(references[name]),
                "most_frequent_answer": most_frequent_answer(references[name]),
                "scores": {score.name: score.to_json_dict() for score in scores},
            }
            for name, scores in self.scores_of.items()
        }

    def to_json_dict(self) -> dict[str, Any]:
        """As the public recipe's files: answers, generated texts, score; and all scores, and what they belong to."""
        return (
            self.summary()
            | {
                "ids": [question.id for question in self.questions],
                "questions": [question.text for question in self.questions],
                "answers": [list(question.references) for question in self.questions],
                "generated_texts": [answer.text for answer in self.generated],
                "correct": [line["correct"] for line in self.predictions()],
            }
            | ({"question_sources": self.sources} if self.sources else {})
        )

    def predictions(self) -> Iterator[dict[str, Any]]:
        """One object a question, with its own score under the task's metric."""
        of_answer = METRICS[self.primary.name].of_answer
        for question, answer, source in zip_longest(self.questions, self.generated, self.sources):
            line = {
                "id": question.id,
                **({"source": source} if source is not None else {}),
                "prompt": question.text,
                "images": list(question.images),
                "references": list(question.references),
                "prediction": answer.text,
                "score": of_answer(answer.text, question.references),
                "correct": is_correct(answer.text, question.references),
                "cut": answer.cut,
            }
            if answer.probabilities:
                line["probabilities"] = dict(zip(self.answer_words, answer.probabilities, strict=True))
            yield line


def check_references(questions: QuestionDataset, config: EvaluationConfig) -> None:
    """Look whether the metrics can be computed on these questions at all.

    Raises:
        UserError: an answer to compare with is labelled as a bad one, a reference is none of the words whose
            probabilities are compared, or all are on one side.
    """
    require_good_references(questions)
    if not any(METRICS[name].needs_probabilities for name in config.metrics):
        return
    words = [normalize_answer(word) for word in config.answer_words]
    positives = 0
    for question in questions.questions():
        references = {normalize_answer(reference) for reference in question.references}
        if not references & set(words):
            raise UserError(
                f"the answer to {question.id!r} is {question.references[0]!r}, which is none of the answer words",
                where=questions.table.shown,
                hint=f"evaluation.answer_words is [{', '.join(config.answer_words)}]; auroc needs all answers in it",
            )
        positives += words[0] in references
    if positives in (0, len(questions)):
        side = "none" if positives == 0 else "each"
        raise UserError(
            f"auroc compares two kinds of answers, and {side} of the {len(questions)} is {config.answer_words[0]!r}",
            where=questions.table.shown,
            hint="evaluate on data that has both, or leave auroc out of evaluation.metrics",
        )


def require_good_references(questions: QuestionDataset) -> None:
    """Raise `UserError` if the only reference of a question is an answer that is labelled as a bad one."""
    table = questions.table
    bad = table.labels()[questions.index[:, 0]] == 0
    last = questions.index[:, 1] == table.turn_counts()[questions.index[:, 0]] - 1
    for record_index, turn_index in questions.index[bad & last].tolist():
        record = table[record_index]
        if not record.turns[-1].answers:
            what = "is labelled as a bad answer, and there is no other to score by"
            where = f"{table.where(record)}: conversations[{turn_index}]"
            raise UserError(what, where=where, hint='list the right ones in "answers", or leave the record out')


def evaluate(
    model: Any,
    processor: Phi3VProcessor,
    questions: QuestionDataset,
    config: EvaluationConfig,
    *,
    autocast_dtype: torch.dtype | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int], None] = lambda count: None,
) -> EvaluationResult:
    """Answer every question and score the answers; all ranks return the same."""
    start = time.perf_counter()
    words = config.answer_words
    max_new_tokens = config.max_new_tokens or answer_limit(questions, None).tokens
    generated = generate_answers(
        model,
        processor,
        questions,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        max_new_tokens=max_new_tokens,
        words=words,
        autocast_dtype=autocast_dtype,
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
        on_batch=on_batch,
    )
    seconds = time.perf_counter() - start
    asked = list(questions.questions())

    def score(places: Sequence[int]) -> list[Score]:
        answers = Answers(
            [asked[place].text for place in places],
            [asked[place].references for place in places],
            [generated[place].text for place in places],
            words,
            np.array([generated[place].probabilities for place in places]) if words else None,
        )
        return [score_answers(name, answers) for name in config.metrics]

    names, places_of = questions.table.names, dict[str, list[int]]()
    sources = [names[source] for source in questions.sources()]
    for place, name in enumerate(sources):
        places_of.setdefault(name, []).append(place)
    scores_of = {name: score(places_of[name]) for name in names if name in places_of}
    scores = score(range(len(asked)))
    return EvaluationResult(scores, seconds, asked, generated, words, max_new_tokens, sources, scores_of)
