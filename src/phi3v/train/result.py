"""What a run came to."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from phi3v.evaluate.evaluation import EvaluationResult
from phi3v.train.observers.evaluating import always
from phi3v.train.observers.evaluation import Best
from phi3v.train.observers.progress import peak_memory_gb


@dataclass(frozen=True)
class RunResult:
    """What a run came to."""

    folder: Path
    before: EvaluationResult | None
    after: EvaluationResult | None
    steps: int
    train_seconds: float
    questions_per_second: float
    samples_per_second: float
    tokens_per_second: float
    mean_train_loss: float
    best: Best | None = None  # the evaluation whose weights were kept
    stopped_early: bool = False
    skipped: tuple[tuple[str, str], ...] = ()  # records that were left out, and why
    dropped_steps: int = 0  # whose loss or gradient was not finite

    def to_json_dict(self) -> dict[str, Any]:
        summary = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name not in ("folder", "before", "after", "best")
        }
        if self.best is not None:
            summary["best_step"] = self.best.step
        scores = {
            f"{name}_{result.primary.name}": result.primary.value
            for name, result in (("before", self.before), ("after", self.after))
            if result is not None
        }
        if not math.isfinite(self.mean_train_loss):
            summary["mean_train_loss"] = None  # JSON has no infinity
        return {"folder": str(self.folder), **scores, **summary, "peak_memory_gb": peak_memory_gb()}


def print_result(console: Console, result: RunResult) -> None:
    """Say on the console what a run came to, and what to type next."""
    _print_scores(console, result)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("steps", f"{result.steps}{' (stopped early)' if result.stopped_early else ''}")
    if result.skipped:
        table.add_row("records left out", str(len(result.skipped)))
    if result.dropped_steps:
        table.add_row("steps not finite", str(result.dropped_steps))
    if result.best is not None:
        table.add_row("best weights", f"step {result.best.step}")
    table.add_row("training time", f"{result.train_seconds:.1f} s")
    table.add_row("speed", f"{result.questions_per_second:.1f} questions/s")
    table.add_row("", f"{result.samples_per_second:.2f} samples/s")
    table.add_row("", f"{result.tokens_per_second:,.0f} tokens/s")
    table.add_row("peak memory", f"{peak_memory_gb():.2f} GB")
    console.print(table)
    console.print(f"[bold]run folder:[/bold] {escape(str(result.folder))}", highlight=False, soft_wrap=True)
    console.print("[bold]next:[/bold]", highlight=False)
    name = result.folder.name
    for command, purpose in (
        (f"phi3v report {result.folder} --open", "curves, scores and every answer"),
        (f"phi3v chat {result.folder}", "ask it about your own image"),
        (f"phi3v export {result.folder} --out models/{name}", "merged weights in the official layout"),
    ):
        console.print(f"  {escape(command)}  [dim]# {purpose}[/dim]", highlight=False, soft_wrap=True)


def _print_scores(console: Console, result: RunResult) -> None:
    """A row a metric: before and after, with their intervals."""
    evaluated = [(when, of) for when, of in (("before", result.before), ("after", result.after)) if of is not None]
    if not evaluated:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("score")
    for when, _ in evaluated:
        table.add_column(when, justify="right")
    table.add_column(escape(always(evaluated[-1][1])), justify="right")
    for place, score in enumerate(evaluated[-1][1].scores):
        shown = [escape(str(of.scores[place])) for _, of in evaluated]
        constant = "" if score.most_frequent is None else f"{100 * score.most_frequent:.2f} %"
        table.add_row(score.name, *shown, constant)
        for name in evaluated[-1][1].scores_of:
            of_source = [of.scores_of[name][place] for _, of in evaluated]
            table.add_row(f"  {escape(name)}", *(escape(str(each)) for each in of_source), "")
    if any(of.num_cut for _, of in evaluated):
        table.add_row("answers cut", *(f"{of.num_cut:,} of {len(of.generated):,}" for _, of in evaluated), "")
    console.print(table)
