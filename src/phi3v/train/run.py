"""One run from recipe to result: check, load, evaluate, train, save, evaluate again."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState
from rich.console import Console
from safetensors import SafetensorError

from phi3v.config import RunConfig
from phi3v.data.readers import Readers
from phi3v.errors import LostRankError, StoppedError, UserError
from phi3v.evaluate.evaluation import EvaluationResult
from phi3v.terminal import progress_bar, say
from phi3v.train.card import write_card
from phi3v.train.checkpoint_folder import checkpoint_name, newest_checkpoint
from phi3v.train.checkpoints.formats import CheckpointFormat, choose_format
from phi3v.train.checkpoints.resume import (
    FinishedRun,
    ResumePoint,
    find_resume_point,
    reopen_run_folder,
    require_same_content,
)
from phi3v.train.checkpoints.writer import Checkpointer
from phi3v.train.collectives import HostCollectives
from phi3v.train.compute.feature_cache import fill_features
from phi3v.train.device import choose_device, is_out_of_memory
from phi3v.train.engines.data_parallel import load_whole
from phi3v.train.finetuned import resolve_model
from phi3v.train.header import Forecast, print_header
from phi3v.train.loop import TrainingLoop
from phi3v.train.methods.weights import read_trained, save_replacing, saved_tensors
from phi3v.train.observers.evaluating import evaluate_model, show_scores
from phi3v.train.observers.evaluation import EvaluationObserver
from phi3v.train.observers.faults import StepFaults, is_lost_rank
from phi3v.train.observers.progress import ProgressObserver
from phi3v.train.observers.signals import Signals
from phi3v.train.observers.tracking import Trackers, prepare_trackers
from phi3v.train.open_data import questions_of
from phi3v.train.prepare import PreparedRun, prepare
from phi3v.train.reference import reference_log_probs
from phi3v.train.result import RunResult, print_result
from phi3v.train.run_folder import claim_run_folder, describe_again, hold_run_folder
from phi3v.train.state import Observer

logger = logging.getLogger("phi3v")


def run_training(
    config: RunConfig,
    console: Console,
    resume: str | None = None,
    observers: Sequence[Observer] = (),
    forecast: Forecast | None = None,
) -> RunResult | FinishedRun:
    """Train as configured.

    What can be known to be wrong is found before it costs anything: first the configuration, then model and data
    without loading the model, then the gradients of one batch. Only then is anything in the run folder replaced.

    Args:
        resume: ``auto`` to go on from the newest valid checkpoint of the run folder, or a checkpoint; nothing to go on
            from means to start anew.
        observers: told of every step after our own, when its line of ``metrics.jsonl`` is written.
        forecast: what the run will take, by its configuration, the number of records and of ranks.

    Raises:
        UserError: the configuration, the model or the data are wrong.
        StoppedError: by a signal.
        LostRankError: another process ended or does not answer.
    """
    config = config.absolute()
    with Signals() as signals, contextlib.ExitStack() as held:
        try:
            runtime = choose_device(config.training.precision, timeout_minutes=config.distributed.timeout_minutes)
            collectives = HostCollectives(runtime.world_size, timedelta(minutes=config.distributed.timeout_minutes))
            hold = hold_run_folder(Path(config.training.output_dir))
            collectives.run_on_first(runtime.rank, lambda: held.enter_context(hold))
            point = find_resume_point(resume, config, runtime, collectives, console)
            if isinstance(point, FinishedRun):
                return point
            setup = prepare(config, console, runtime, collectives, resume=resume is not None)
            require_same_content(setup.contents, point, collectives)
            for line in prepare_trackers(config.training.report_to, runtime.rank):
                say(console, line)
            print_header(setup, forecast)
            checked = setup.check_gradients()
            console.print(f"gradient check: all {checked} trainable tensors get a gradient, no frozen one does")
            result = _in_run_folder(setup, point, signals, observers)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise _out_of_memory(config, signals, error) from error
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and is_lost_rank(error):
                raise LostRankError(_lost(config, signals, error)) from error
            raise
        logger.info("result %s", json.dumps(result.to_json_dict()))
    print_result(console, result)
    return result


def _in_run_folder(
    setup: PreparedRun,
    point: ResumePoint | None,
    signals: Signals,
    observers: Sequence[Observer],
) -> RunResult:
    try:
        if setup.runtime.rank == 0:
            if point is None:
                claim_run_folder(setup.config, setup.about)
            else:
                reopen_run_folder(setup.config, point)
                describe_again(setup.config, setup.about)
            _log_to(setup.folder / "log.txt")
        PartialState().wait_for_everyone()
        runtime = setup.runtime
        form, reason = choose_format(setup.config, setup.engine.choice, runtime.rank, setup.collectives)
        if runtime.world_size > 1:
            setup.console.print(f"checkpoints: {form.name} ({reason})", highlight=False)
        return _train_and_evaluate(setup, point, signals, observers, form(setup))
    except UserError as error:
        error.one_rank = setup.runtime.rank > 0
        raise


def _out_of_memory(config: RunConfig, signals: Signals, error: BaseException) -> UserError:
    newest = newest_checkpoint(Path(config.training.output_dir))
    said = UserError(
        f"out of memory while {signals.doing.split(';')[0]}: {' '.join(str(error).split())[:200]}",
        where=config.training.output_dir,
        hint=f"{newest}; lower training.micro_batch_size, data.pack_tokens or model.num_crops, or set "
        "training.activation_checkpointing to full or offload (`phi3v plan` tells what fits)",
    )
    said.one_rank = True
    return said


def _lost(config: RunConfig, signals: Signals, error: BaseException) -> str:
    """What to say where another process is gone."""
    why = " ".join(str(error).split())[:200]
    newest = newest_checkpoint(Path(config.training.output_dir))
    return (
        f"another process of this run ended, or did not answer within {config.distributed.timeout_minutes:g} minutes "
        f"(while {signals.doing}: {why})\n  → {newest}; start again with --resume"
    )


def _train_and_evaluate(
    setup: PreparedRun,
    point: ResumePoint | None,
    signals: Signals,
    observers: Sequence[Observer],
    form: CheckpointFormat,
) -> RunResult:
    config, runtime, model = setup.config, setup.runtime, setup.model
    features = fill_features(
        config.training.feature_cache,
        model,
        setup.train_table,
        setup.processor.image_processor,
        runtime,
        setup.console,
        show_bar=config.training.progress_bar,
    )
    reference = None
    if config.objective.needs_reference:
        signals.doing = "computing the reference; start again with --resume to go on with it"
        reference = reference_log_probs(setup, features)
    signals.doing = "evaluating before training; no step was taken"
    before = _evaluate(setup, model, "before") if config.evaluation.before and point is None else None
    signals.doing = "preparing to train; no step was taken by this process"

    transformers.utils.logging.disable_progress_bar()  # one for every checkpoint that is written
    progress = ProgressObserver(
        setup.console, setup.folder / "metrics.jsonl", rank=runtime.rank, show_bar=config.training.progress_bar
    )
    trackers = Trackers(setup.folder, config.training.report_to, runtime.rank)
    faults = StepFaults(setup)
    during = _during(setup, progress, faults, trackers)
    saves = Checkpointer(setup, signals, progress, during, faults, form)
    # In this order: a checkpoint holds what the others came to.
    own: list[Observer] = [progress, trackers, *([during] if during is not None else []), saves]
    dataset = setup.dataset(features, reference)
    readers = Readers(dataset.__getitem__, setup.num_workers, timeout=60 * config.distributed.timeout_minutes)
    loop = TrainingLoop(setup, readers, faults, observers=[*own, *observers], checkpoints=saves)
    try:
        with readers, trackers, signals.waiting():
            signals.doing = "training, within a step; start again with --resume"
            state = loop.run(point)
            seconds = progress.seconds
            saves.wait()
    except RuntimeError as error:
        if is_lost_rank(error):
            saves.abandon()
        raise
    finally:
        saves.join()
        progress.close()
    if saves.stopped_by is not None:
        raise _stopped(saves, state.step)
    signals.doing = "saving the result; start again with --resume to finish it"

    best = during.best if during is not None and config.evaluation.keep_best else None
    tuned = setup.engine.final_model(setup.facts.stored_dtype)
    if best is not None and during is not None:
        trained = read_trained(tuned, during.best_folder) if runtime.rank == 0 else None
        load_whole(tuned, trained, runtime.world_size)
        setup.console.print(f"final/ holds the weights of step {best.step}, the best score", highlight=False)
    if runtime.rank == 0:
        try:
            save_replacing(tuned, setup.processor, setup.folder / "final", saved_tensors(tuned))
        except (OSError, SafetensorError) as error:
            hint = f"{newest_checkpoint(setup.folder)}; make room and start again with --resume"
            raise UserError(f"cannot be saved: {error}", where=str(setup.folder / "final"), hint=hint) from error
    PartialState().wait_for_everyone()
    signals.doing = "evaluating after training; final/ is saved, start again with --resume to evaluate it"
    after = _evaluate(setup, tuned, "after") if config.evaluation.after else None
    if runtime.rank == 0:
        write_card(setup.folder / "final", resolve_model(str(setup.folder)), name=f"{setup.folder.name}/final")

    seen = state.seen
    return RunResult(
        folder=setup.folder,
        before=before,
        after=after,
        steps=state.step,
        train_seconds=round(seconds, 2),
        questions_per_second=round(seen["questions"] / seconds, 2),
        samples_per_second=round(seen["samples"] / seconds, 2),
        tokens_per_second=round(seen["tokens"] / seconds, 2),
        mean_train_loss=state.mean_loss,
        best=best,
        stopped_early=during is not None and during.stopped_early,
        skipped=tuple(state.skipped),
        dropped_steps=faults.dropped,
    )


def _stopped(saves: Checkpointer, step: int) -> BaseException:
    """The end of a run that a signal stopped after a step."""
    if saves.last_step != step or saves.last_failure is not None:
        why = saves.last_failure or "its gradient is not finite"
        return UserError(
            f"stopped by {saves.stopped_by} after step {step}, which could not be saved: {why}",
            where=str(saves.folder),
            hint=f"{newest_checkpoint(saves.folder)}; start again with --resume",
        )
    return StoppedError(
        f"stopped by {saves.stopped_by} after step {step}, which is saved in {saves.folder / checkpoint_name(step)}; "
        "start again with --resume to go on"
    )


def _during(
    setup: PreparedRun, progress: ProgressObserver, faults: StepFaults, trackers: Trackers
) -> EvaluationObserver | None:
    """What evaluates while it trains, if that is wanted."""
    evaluation = setup.config.evaluation
    if setup.questions is None or evaluation.eval_steps is None:
        return None
    questions = questions_of(setup.config, setup.questions.table, setup.processor, evaluation.eval_steps_questions)
    assert questions is not None
    return EvaluationObserver(setup, questions, progress, faults, trackers)


def _evaluate(setup: PreparedRun, model: Any, when: str) -> EvaluationResult | None:
    """The scores before or after training, written to the run folder; none without evaluation data."""
    if setup.questions is None:
        return None
    with progress_bar(setup.console, enabled=setup.config.training.progress_bar) as bar:
        result = evaluate_model(
            model,
            setup.processor,
            setup.questions,
            setup.evaluation,
            setup.runtime,
            num_workers=setup.num_workers,
            bar=bar,
            description=f"evaluating {when}",
        )
    if setup.runtime.rank == 0:
        show_scores(setup.console, result, when)
        result.write(setup.folder, f"_{when}")
    return result


def _log_to(path: Path) -> None:
    """Send our log and the library's to ``log.txt``."""
    for old in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        for name in ("phi3v", "transformers"):
            logging.getLogger(name).removeHandler(old)
        old.close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("phi3v", "transformers"):
        logging.getLogger(name).addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.info("command %s", " ".join(sys.argv))
