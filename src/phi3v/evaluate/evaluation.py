"""Measuring a model on a data file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi3v.config import EvaluationConfig
from phi3v.data.collate import QuestionDataset
from phi3v.evaluate.generate import generate_answers
from phi3v.evaluate.metrics import accuracy, is_correct
from phi3v.processing.processor import Phi3VProcessor


@dataclass(frozen=True)
class EvaluationResult:
    """A score and the answers behind it."""

    metric: str
    score: float  # in 0..1
    seconds: float
    ids: list[str]
    questions: list[str]
    answers: list[list[str]]  # reference answers of each question
    generated_texts: list[str]

    def write(self, path: Path) -> None:
        """As the public recipe's files: answers, generated texts, score; and what they belong to."""
        content = {
            "metric": self.metric,
            "score": self.score,
            "num_questions": len(self.ids),
            "seconds": round(self.seconds, 2),
            "ids": self.ids,
            "questions": self.questions,
            "answers": self.answers,
            "generated_texts": self.generated_texts,
            "correct": [is_correct(p, r) for p, r in zip(self.generated_texts, self.answers, strict=True)],
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
    texts = generate_answers(
        model,
        processor,
        questions,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        autocast_dtype=autocast_dtype,
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
        on_batch=on_batch,
    )
    asked = [questions.question(index) for index in range(len(questions))]
    references = [list(answers) for _, _, answers in asked]
    return EvaluationResult(
        metric=config.metric,
        score=accuracy(texts, references),
        seconds=time.perf_counter() - start,
        ids=[name for name, _, _ in asked],
        questions=[text for _, text, _ in asked],
        answers=references,
        generated_texts=texts,
    )
