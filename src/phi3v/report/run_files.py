"""What a run folder tells: read as far as it goes, with a note of what is missing or damaged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from phi3v.config import lacking_groups, read_yaml
from phi3v.errors import UserError

Status = Literal["finished", "running", "unfinished"]

# Curves of a page; a longer run is averaged over groups of lines.
MAX_POINTS = 4000
LOG_LINES = 200
# Columns of metrics.jsonl that are drawn or shown.
CURVES = (
    "loss",
    "learning_rate",
    "grad_norm",
    "samples_per_second",
    "questions_per_second",
    "tokens_per_second",
    "peak_memory_gb",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "tokens/chosen",
    "tokens/rejected",
    "kl",
)
_SOURCE_LOSS = re.compile(r"source/.+/loss")
TOLD_BY = ("metrics.jsonl", "eval_before.json", "eval_after.json", "config.yaml")
# The files of a finished run, and what is not shown without them.
EXPECTED = {
    "config.yaml": "the configuration",
    "environment.json": "the environment",
    "metrics.jsonl": "the curves",
    "log.txt": "the log and the totals",
}


@dataclass
class Curves:
    """The lines of ``metrics.jsonl`` as columns, in the order of steps.

    Attributes:
        steps, seconds: of each point; seconds of training, without evaluations in between.
        values: of each name in `CURVES` that was logged, and of the loss of each source (``source/NAME/loss``); None
            where a line has no number.
        evaluations: during training: ``{"step", "seconds", "best", "scores": {name: {value, low, high, n}}}``, and of
            several sources ``"sources": {source: scores}``.
        resumed: steps after which the run was taken up again.
        averaged: logged lines that one point stands for.
    """

    steps: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: dict[str, list[float | None]] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    averaged: int = 1


@dataclass
class RunFiles:
    """A run folder, as far as it could be read.

    Attributes:
        config: the resolved configuration, a tree of plain values.
        result: what the run said at its end (steps, seconds, rates, memory), from its log.
        evaluations: ``before`` and ``after``: the summary of each evaluation.
        predictions: ``before`` and ``after``: one object a question.
        missing: a sentence for each thing that is not there or not readable.
    """

    folder: Path
    name: str
    status: Status = "unfinished"
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=Curves)
    result: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    predictions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def setting(self, *keys: str) -> Any:
        """A value of the configuration, or None."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_run(folder: Path, *, with_predictions: bool = True) -> RunFiles:
    """Read a run folder.

    Args:
        with_predictions: read the answers too, which is most of what there is to read.

    Raises:
        UserError: it is no run folder.
    """
    if not folder.is_dir():
        raise UserError("no such folder", where=str(folder), hint="name the output_dir of a run")
    if not any((folder / name).is_file() for name in TOLD_BY):
        hint = f"a run folder holds {TOLD_BY[-1]} and {TOLD_BY[0]}"
        raise UserError("is no run folder: there is nothing to report", where=str(folder), hint=hint)
    run = RunFiles(folder, folder.resolve().name)
    for name, what in EXPECTED.items():
        if not (folder / name).is_file():
            run.missing.append(f"{name} is missing: {what} cannot be shown")
    run.config = _read(run, "config.yaml", read_yaml)
    if run.config and (lacking := lacking_groups(run.config)):
        run.missing.append(f"config.yaml is damaged: {lacking} is missing")
    run.environment = _read(run, "environment.json", json.loads)
    run.curves = _read_curves(run)
    run.log = (_text(run, "log.txt") or "").splitlines()
    for line in run.log:
        _, found, rest = line.partition(" INFO phi3v: result ")
        if found:
            run.result = _object(_json(rest))
    run.log = run.log[-LOG_LINES:]
    for when in ("before", "after"):
        _read_evaluation(run, when, with_predictions)
    finished = (folder / "final").is_dir() and ("after" in run.evaluations or not _expects(run, "after"))
    run.status = "finished" if run.result or finished else "unfinished"
    return run


def _expects(run: RunFiles, when: str) -> bool:
    return bool(run.setting("evaluation", when)) and run.setting("data", "eval") is not None


def _read_evaluation(run: RunFiles, when: str, with_predictions: bool) -> None:
    summary = _read(run, f"eval_{when}.json", json.loads)
    scores = {str(name): score for name, score in _object(summary.get("scores")).items() if isinstance(score, dict)}
    if scores:
        metric = summary.get("metric")
        numbers = ("score", "num_questions", "seconds", "max_new_tokens", "num_cut")
        kept: dict[str, Any] = {key: _number(summary.get(key)) for key in numbers}
        frequent = summary.get("most_frequent_answer")
        kept |= {
            "metric": metric if isinstance(metric, str) else None,
            "most_frequent_answer": frequent if isinstance(frequent, str) else None,
        }
        sources = {name: _object(source) for name, source in _object(summary.get("sources")).items()}
        run.evaluations[when] = _plain(kept | {"scores": scores} | ({"sources": sources} if sources else {}))
    elif _expects(run, when) and not summary:
        run.missing.append(f"eval_{when}.json is missing: there are no scores from {when} training")
    if not with_predictions:
        return
    name = f"predictions_{when}.jsonl"
    lines = [_plain(line) for line in _read_lines(run, name) if isinstance(line.get("prediction"), str)]
    if lines:
        run.predictions[when] = lines
    elif scores:
        run.missing.append(f"{name} is missing: the answers from {when} training cannot be shown")


def _read_curves(run: RunFiles) -> Curves:
    """Steps that a run did again after it was resumed count once, as they were done last."""
    lines: list[dict[str, Any]] = []
    curves = Curves()
    offset = last_seconds = 0.0
    last_step = -1.0
    for line in _read_lines(run, "metrics.jsonl"):
        step = _number(line.get("step"))
        if step is None:
            continue
        seconds = _number(line.get("seconds"))
        if step < last_step or (step == last_step and "loss" in line and lines and lines[-1]["step"] == step):
            lines = [earlier for earlier in lines if earlier["step"] < step]
            curves.evaluations = [earlier for earlier in curves.evaluations if earlier["step"] < step]
            curves.resumed.append(int(step) - 1)
        if seconds is not None:
            if seconds + offset < last_seconds:  # the clock of a resumed run starts anew
                offset = lines[-1]["seconds"] if lines else 0.0
            last_seconds = seconds + offset
        last_step = step
        if "loss" in line:
            values = {name: _number(line[name]) for name in line if name in CURVES or _SOURCE_LOSS.fullmatch(name)}
            lines.append({"step": step, "seconds": last_seconds, **values})
        if isinstance(line.get("eval"), dict):
            scores = {str(name): _plain(score) for name, score in line["eval"].items() if isinstance(score, dict)}
            evaluated = {"step": step, "seconds": last_seconds, "best": line.get("best") is True, "scores": scores}
            if sources := _object(line.get("eval_sources")):
                evaluated["sources"] = {name: _object(source) for name, source in sources.items()}
            curves.evaluations.append(evaluated)
    curves.averaged = max(1, math.ceil(len(lines) / MAX_POINTS))
    groups = [lines[start : start + curves.averaged] for start in range(0, len(lines), curves.averaged)]
    curves.steps = [group[-1]["step"] for group in groups]
    curves.seconds = [group[-1]["seconds"] for group in groups]
    for name in [*CURVES, *sorted({name for line in lines for name in line} - {*CURVES, "step", "seconds"})]:
        column = [_mean([line.get(name) for line in group]) for group in groups]
        if any(value is not None for value in column):
            curves.values[name] = column
    return curves


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(f"{sum(numbers) / len(numbers):.6g}") if numbers else None


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _plain(value: Any) -> Any:
    """The value with what JSON has no word for as None, or as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _object(value: Any) -> dict[str, Any]:
    return _plain(value) if isinstance(value, dict) else {}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(run: RunFiles, name: str) -> str | None:
    """The text of a file, damaged bytes shown as such; None if it is not there."""
    try:
        return (run.folder / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        run.missing.append(f"{name} cannot be read: {error.strerror}")
        return None


def _read(run: RunFiles, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """The object that ``parse`` makes of a file; empty, with a note if it is damaged, where there is none."""
    text = _text(run, name)
    if text is None:
        return {}
    try:
        value = _object(parse(text))
    except (ValueError, RecursionError, yaml.YAMLError):
        value = {}
    if not value:
        run.missing.append(f"{name} is damaged and left out")
    return value


def _read_lines(run: RunFiles, name: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; lines that are none are counted in a note."""
    damaged, found = 0, False
    for line in (_text(run, name) or "").split("\n"):
        if not line.strip():
            continue
        value = _json(line)
        if isinstance(value, dict):
            found = True
            yield value
        else:
            damaged += 1
    if not damaged and not found and (run.folder / name).is_file():
        run.missing.append(f"{name} is empty")
    if damaged:
        run.missing.append(f"{name}: {damaged} damaged line{'s' * (damaged != 1)} left out")
