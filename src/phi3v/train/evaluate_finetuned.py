"""``phi3v eval``: the scores of a model, an adapter or a run on a data file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from phi3v.config import DataSource, Precision, RunConfig
from phi3v.data.check import ensure_checked
from phi3v.data.collate import QuestionDataset
from phi3v.data.lengths import Context, require_context
from phi3v.data.mixture import measure, open_sources
from phi3v.data.shards.index import require_data
from phi3v.data.table import RecordTable
from phi3v.evaluate.answer_limit import answer_limit
from phi3v.evaluate.evaluation import EvaluationResult, check_references
from phi3v.evaluate.submission import find_benchmark, require_new_file, submission_config, write_submission
from phi3v.terminal import progress_bar
from phi3v.train.device import choose_device, default_workers
from phi3v.train.finetuned import FinetunedModel, Inspected, described, inspect_tuned, load_tuned, resolve_model
from phi3v.train.observers.evaluating import evaluate_model, show_scores


def open_data(tuned: FinetunedModel, data: str | list[DataSource]) -> RecordTable:
    """The records of a file, or of several, checked, as the model's run read its own; one rank reads, the others find
    it done.

    Raises:
        UserError: there are faults, or the file cannot be read.
    """
    reading = tuned.run.data.reading
    with PartialState().main_process_first():
        paths = [data] if isinstance(data, str) else [source.path for source in data]
        level = tuned.run.data.image_check
        hashes = [ensure_checked(Path(path), **reading, image_level=level).sha256 for path in paths]
        return open_sources(data, hashes, **reading)


def open_questions(table: RecordTable, inspected: Inspected, *, limit: int | None, seed: int) -> QuestionDataset:
    """The questions of a file, or some of them as of `QuestionDataset`; one rank counts tokens for all.

    Raises:
        UserError: a record is longer than the model reads.
    """
    processor = inspected.processor
    questions = QuestionDataset(table, processor, limit=limit, seed=seed)
    with PartialState().main_process_first():
        lengths = measure(table, processor, progress=True).at(processor.image_processor.num_crops)
    require_context(table, Context(inspected.facts.context, processor), lengths)
    return questions


def evaluate_tuned(
    name: str,
    data: str | list[DataSource],
    console: Console,
    *,
    base: str | None = None,
    run: RunConfig | None = None,
    settings: dict[str, Any],
    num_crops: int | None = None,
    precision: Precision | None = None,
    out: Path | None = None,
    submission: Path | None = None,
) -> EvaluationResult:
    """Evaluate on ``data``; under ``torchrun`` all ranks share the questions.

    Args:
        name: a model folder, a hub id, an adapter or a run folder.
        data: a file, or several.
        base: the model that it was tuned from, where that has moved.
        run: how it was tuned, where its folder does not tell, as that of an export.
        settings: fields of ``EvaluationConfig`` in place of the run's own, or of the defaults.
        num_crops: crops of a page at most; by default as the model was saved.
        precision: arithmetic; by default the run's own.
        out: folder for ``eval.json`` and ``predictions.jsonl``; nothing is written without one.
        submission: file for the benchmark's official evaluator, of all questions of ``data``.

    Raises:
        UserError: the model, the data or a setting is wrong.
    """
    for path in [data] if isinstance(data, str) else [source.path for source in data]:
        require_data(path)
    tuned = resolve_model(name, base)
    if run is not None:
        tuned = dataclasses.replace(tuned, run=run)
    config = dataclasses.replace(tuned.run.evaluation, **settings)
    if out is not None:
        require_new_file(out / "eval.json", "--out")
    benchmark = None
    if submission is not None:
        require_new_file(submission, "--submission")
        benchmark = find_benchmark(open_sources(data, special_text=tuned.run.data.special_text))
        config = submission_config(config, benchmark, all_questions="max_questions" not in settings)
    runtime = choose_device(precision or tuned.run.training.precision)
    table = open_data(tuned, data)
    inspected = inspect_tuned(tuned, runtime, num_crops=num_crops)
    processor = inspected.processor
    questions = open_questions(table, inspected, limit=config.max_questions, seed=tuned.run.training.seed)
    check_references(questions, config)
    limit = answer_limit(questions, config.max_new_tokens)
    config = dataclasses.replace(config, max_new_tokens=limit.tokens)
    adapter = f" with the adapter {tuned.adapter}" if tuned.adapter is not None else ""
    stored = inspected.facts.quantisation
    bits = ", in 4 bits as it was trained" if tuned.is_quantised else f", quantised ({stored.name})" if stored else ""
    for line in (
        f"[bold]evaluating[/bold] {tuned.base}{adapter}{bits}",
        f"{described(tuned, runtime)}, {runtime.world_size} ranks",
        f"data: {len(questions)} questions of {table.shown}{questions.by_source}",
        f"answers: {limit}",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    if limit.finding is not None:
        limit.finding.render(console)
    model, _ = load_tuned(tuned, runtime, inspected=inspected)
    workers = default_workers(runtime) if tuned.run.data.num_workers is None else tuned.run.data.num_workers
    with progress_bar(console) as bar:
        result = evaluate_model(
            model, processor, questions, config, runtime, num_workers=workers, bar=bar, description="evaluating"
        )
    if runtime.rank == 0:
        show_scores(console, result)
        try:
            if out is not None:
                result.write(out)
        finally:  # one that cannot be written does not take the other along
            if submission is not None and benchmark is not None:
                said = write_submission(submission, benchmark, result.questions, result.generated)
                console.print(said, highlight=False, markup=False, soft_wrap=True)
    return result
