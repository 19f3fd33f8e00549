"""Evaluating a model that is in memory: the bar, the call, what is shown."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import Progress

from phi3v.config import EvaluationConfig
from phi3v.data.collate import QuestionDataset
from phi3v.evaluate.evaluation import EvaluationResult, evaluate
from phi3v.findings import Finding
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.device import RuntimeDevice

SHOWN_ANSWER = 40  # characters of the most frequent answer


def evaluate_model(
    model: Any,
    processor: Phi3VProcessor,
    questions: QuestionDataset,
    config: EvaluationConfig,
    runtime: RuntimeDevice,
    *,
    num_workers: int,
    bar: Progress,
    description: str,
) -> EvaluationResult:
    """Answer all questions on all ranks, with a line in ``bar`` while it lasts."""
    task = bar.add_task(description, total=len(questions), extra="")
    try:
        return evaluate(
            model,
            processor,
            questions,
            config,
            autocast_dtype=runtime.autocast_dtype,
            num_workers=num_workers,
            rank=runtime.rank,
            world_size=runtime.world_size,
            # The other ranks are about as far; the last part of an uneven share must not overshoot.
            on_batch=lambda count: bar.advance(task, count * runtime.world_size),
        )
    finally:
        bar.remove_task(task)


def show_scores(console: Console, result: EvaluationResult, when: str = "") -> None:
    """One line a score, with its interval and what the most frequent answer scores; the speed; and what was cut."""
    count = len(result.questions)
    for score in result.scores:
        units = "" if score.n == count else f" in {score.n} groups"
        name = f"{score.name} {when}".rstrip()
        line = f"{name}: {score} on {count} questions{units}"
        if score.most_frequent is not None:
            line += f"; {always(result)} scores {100 * score.most_frequent:.2f} %"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        for name, scores in result.scores_of.items():
            of_source = next(each for each in scores if each.name == score.name)
            asked = result.sources.count(name)
            console.print(f"  {name}: {of_source} on {asked} questions", highlight=False, markup=False, soft_wrap=True)
    console.print(f"  {count / max(result.seconds, 1e-9):.1f} questions/s", highlight=False)
    if result.num_cut:
        what = (
            f"{result.num_cut:,} of {count:,} were cut at {result.max_new_tokens:,} tokens and are scored as they are"
        )
        Finding("answers", "warn", what, "where right answers are longer, raise max_new_tokens").render(console)


def always(result: EvaluationResult) -> str:
    """Whose score stands beside each score, in words."""
    text = " ".join(result.most_frequent_answer.split())
    if len(text) > SHOWN_ANSWER:
        text = text[: SHOWN_ANSWER - 1] + "…"
    return f"always {text!r}"
