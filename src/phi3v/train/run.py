"""One run from recipe to result: check, load, measure, train, save, measure again."""

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
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback as LibraryProgressCallback

from phi3v.config import RunConfig
from phi3v.data.features import FeatureStore
from phi3v.data.readers import Readers
from phi3v.errors import LostRankError, StoppedError, UserError
from phi3v.evaluate.evaluation import EvaluationResult
from phi3v.train.checkpoints.folder import checkpoint_name, checkpoints
from phi3v.train.checkpoints.resume import (
    FinishedRun,
    ResumePoint,
    find_resume_point,
    reopen_run_folder,
    require_same_content,
)
from phi3v.train.checkpoints.weights import read_trained, save_replacing, saved_tensors
from phi3v.train.checkpoints.writer import Checkpointer
from phi3v.train.collectives import HostCollectives
from phi3v.train.compute.feature_cache import fill_features
from phi3v.train.device import choose_device
from phi3v.train.engines.data_parallel import load_whole
from phi3v.train.header import Forecast, print_header
from phi3v.train.loop import Phi3VTrainer, training_arguments
from phi3v.train.methods.gradient_check import check_gradients
from phi3v.train.methods.optimizers import optimizer_factory
from phi3v.train.observers.evaluating import measure, show_scores
from phi3v.train.observers.evaluation import EvaluationCallback
from phi3v.train.observers.faults import StepFaults, is_lost_rank, is_out_of_memory
from phi3v.train.observers.progress import ProgressCallback, progress_bar
from phi3v.train.observers.signals import Signals
from phi3v.train.prepare import PreparedRun, prepare, questions_of
from phi3v.train.result import RunResult, print_result
from phi3v.train.run_folder import claim_run_folder, describe_again, hold_run_folder

logger = logging.getLogger("phi3v")


def run_training(
    config: RunConfig,
    console: Console,
    resume: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    forecast: Forecast | None = None,
) -> RunResult | FinishedRun:
    """Train as configured.

    What can be known to be wrong is found before it costs anything: first the configuration, then model and data
    without loading the model, then the gradients of one batch. Only then is anything in the run folder replaced.

    Args:
        resume: ``auto`` to go on from the newest valid checkpoint of the run folder, or a checkpoint; nothing to go on
            from means to start anew.
        callbacks: told of every step after our own, when its line of ``metrics.jsonl`` is written.
        forecast: what the run will take, by its configuration, the number of records and of ranks.

    Raises:
        UserError: the configuration, the model or the data are wrong.
        StoppedError: by a signal.
        LostRankError: another process ended or does not answer.
    """
    config = config.absolute()
    with Signals() as signals, contextlib.ExitStack() as held:
        try:
            compute = choose_device(config.training.precision, timeout_minutes=config.distributed.timeout_minutes)
            collectives = HostCollectives(compute.world_size, timedelta(minutes=config.distributed.timeout_minutes))
            hold = hold_run_folder(Path(config.training.output_dir))
            collectives.run_on_first(compute.rank, lambda: held.enter_context(hold))
            point = find_resume_point(resume, config, compute, collectives, console)
            if isinstance(point, FinishedRun):
                return point
            setup = prepare(config, console, compute, resume=resume is not None)
            require_same_content(setup.contents, point, collectives)
            print_header(setup, forecast)
            checked = check_gradients(setup.model, setup.probe(), autocast_dtype=setup.compute.autocast_dtype)
            console.print(f"gradient check: all {checked} trainable tensors get a gradient, no frozen one does")
            result = _in_run_folder(setup, point, collectives, signals, callbacks)
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
    collectives: HostCollectives,
    signals: Signals,
    callbacks: Sequence[TrainerCallback],
) -> RunResult:
    try:
        if setup.compute.rank == 0:
            if point is None:
                claim_run_folder(setup.config)
            else:
                reopen_run_folder(setup.config, point)
                describe_again(setup.config)
            _log_to(setup.folder / "log.txt")
        PartialState().wait_for_everyone()
        return _train_and_measure(setup, point, collectives, signals, callbacks)
    except UserError as error:
        error.one_rank = setup.compute.rank > 0
        raise


def _out_of_memory(config: RunConfig, signals: Signals, error: BaseException) -> UserError:
    said = UserError(
        f"out of memory while {signals.doing.split(';')[0]}: {' '.join(str(error).split())[:200]}",
        where=config.training.output_dir,
        hint=f"{_kept(config)}; lower training.micro_batch_size, data.pack_tokens or model.num_crops, or set "
        "training.activation_checkpointing to full (`phi3v plan` tells what fits)",
    )
    said.one_rank = True
    return said


def _lost(config: RunConfig, signals: Signals, error: BaseException) -> str:
    """What to say where another process is gone."""
    why = " ".join(str(error).split())[:200]
    return (
        f"another process of this run ended, or did not answer within {config.distributed.timeout_minutes:g} minutes "
        f"(while {signals.doing}: {why})\n  → {_kept(config)}; start again with --resume"
    )


def _kept(config: RunConfig) -> str:
    folder = Path(config.training.output_dir)
    newest = next(iter(checkpoints(folder)), None)
    return f"{newest} is the newest checkpoint" if newest is not None else f"there is no checkpoint in {folder} yet"


def _train_and_measure(
    setup: PreparedRun,
    point: ResumePoint | None,
    collectives: HostCollectives,
    signals: Signals,
    callbacks: Sequence[TrainerCallback],
) -> RunResult:
    config, compute, model = setup.config, setup.compute, setup.model
    features = fill_features(
        config.training.feature_cache,
        model,
        setup.train_table,
        setup.processor.image_processor,
        compute,
        setup.console,
        show_bar=config.training.progress_bar,
    )
    signals.doing = "measuring before training; no step was taken"
    before = _measure(setup, model, "before") if config.evaluation.before and point is None else None
    signals.doing = "preparing to train; no step was taken by this process"

    trainer, progress, during, saves = _trainer(setup, features, point, collectives, signals)
    for callback in callbacks:
        trainer.add_callback(callback)
    try:
        with signals.waiting():
            signals.doing = "training, within a step; start again with --resume"
            trainer.train()
            seconds = progress.seconds
            saves.wait()
    finally:
        trainer.readers.close()
        saves.join()
        progress.close()
    if saves.stopped_by is not None:
        raise _stopped(saves, trainer.state.global_step)
    signals.doing = "saving the result; start again with --resume to finish it"

    best = during.best if during is not None and config.evaluation.keep_best else None
    tuned = setup.engine.finished(model, setup.facts.stored_dtype)
    if best is not None and during is not None:
        trained = read_trained(tuned, during.best_folder) if compute.rank == 0 else None
        load_whole(tuned, trained, compute.world_size)
        setup.console.print(f"final/ holds the weights of step {best.step}, the best measured", highlight=False)
    if compute.rank == 0:
        try:
            save_replacing(tuned, setup.processor, setup.folder / "final", saved_tensors(tuned))
        except (OSError, SafetensorError) as error:
            hint = f"{saves.newest()}; make room and start again with --resume"
            raise UserError(f"cannot be saved: {error}", where=str(setup.folder / "final"), hint=hint) from error
    trainer.accelerator.wait_for_everyone()
    signals.doing = "measuring after training; final/ is saved, start again with --resume to measure it"
    after = _measure(setup, tuned, "after") if config.evaluation.after else None

    seen = trainer.seen
    return RunResult(
        folder=setup.folder,
        before=before,
        after=after,
        steps=trainer.state.global_step,
        train_seconds=round(seconds, 2),
        questions_per_second=round(seen["questions"] / seconds, 2),
        samples_per_second=round(seen["samples"] / seconds, 2),
        tokens_per_second=round(seen["tokens"] / seconds, 2),
        mean_train_loss=trainer.mean_loss,
        best=best,
        stopped_early=during is not None and during.stopped_early,
        skipped=tuple(trainer.skipped),
        dropped_steps=trainer.faults.dropped if trainer.faults is not None else 0,
    )


def _trainer(
    setup: PreparedRun,
    features: FeatureStore | None,
    point: ResumePoint | None,
    collectives: HostCollectives,
    signals: Signals,
) -> tuple[Phi3VTrainer, ProgressCallback, EvaluationCallback | None, Checkpointer]:
    """The trainer, and what looks on while it trains."""
    config, compute, console = setup.config, setup.compute, setup.console
    transformers.utils.logging.disable_progress_bar()  # one for every checkpoint that is written
    progress = ProgressCallback(console, setup.folder / "metrics.jsonl", show_bar=config.training.progress_bar)
    during = _during(setup, collectives, progress)
    saves = Checkpointer(
        config,
        setup.engine,
        collectives,
        signals,
        model=setup.model,
        processor=setup.processor,
        rank=compute.rank,
        folder=setup.folder,
        console=console,
        progress=progress,
        during=during,
        contents=setup.contents,
    )
    dataset = setup.dataset(features)
    trainer = Phi3VTrainer(
        model=setup.model,
        args=training_arguments(
            config,
            setup.folder,
            precision=compute.precision,
            use_cpu=compute.device.type == "cpu",
        ),
        train_dataset=dataset,
        readers=Readers(dataset.__getitem__, setup.num_workers, timeout=60 * config.distributed.timeout_minutes),
        optimizer_cls_and_kwargs=optimizer_factory(config.training),
        config=config,
        engine=setup.engine,
        collectives=collectives,
        faults=StepFaults(
            collectives,
            setup.train_table,
            console,
            max_nonfinite_steps=config.training.max_nonfinite_steps,
            can_drop=setup.engine.can_drop_step and not config.training.lean,
            newest_checkpoint=saves.newest,
        ),
        plan=setup.plan,
    )
    trainer.checkpoints, trainer.point = saves, point
    progress.trainer = trainer
    for callback in (PrinterCallback, LibraryProgressCallback):
        trainer.remove_callback(callback)
    for own in (progress, during, saves):  # in this order: a checkpoint holds what the others came to
        if own is not None:
            trainer.add_callback(own)
    return trainer, progress, during, saves


def _stopped(saves: Checkpointer, step: int) -> BaseException:
    """The end of a run that a signal stopped after a step."""
    if saves.last_failure is not None:
        return UserError(
            f"stopped by {saves.stopped_by} after step {step}, which could not be saved: {saves.last_failure}",
            where=str(saves.folder),
            hint=f"{saves.newest()}; start again with --resume",
        )
    return StoppedError(
        f"stopped by {saves.stopped_by} after step {step}, which is saved in {saves.folder / checkpoint_name(step)}; "
        "start again with --resume to go on"
    )


def _during(setup: PreparedRun, collectives: HostCollectives, progress: ProgressCallback) -> EvaluationCallback | None:
    """What measures while it trains, if that is wanted."""
    config = setup.config
    if setup.questions is None or config.evaluation.eval_steps is None:
        return None
    fewer = config.evaluation.eval_steps_questions
    questions = questions_of(config, setup.questions.table, setup.processor, fewer)
    assert questions is not None
    return EvaluationCallback(
        setup.model,
        setup.engine,
        setup.processor,
        questions,
        setup.evaluation,
        setup.compute,
        collectives,
        stored_dtype=setup.facts.stored_dtype,
        folder=setup.folder,
        console=setup.console,
        progress=progress,
        num_workers=setup.num_workers,
    )


def _measure(setup: PreparedRun, model: Any, when: str) -> EvaluationResult | None:
    """The scores before or after training, written to the run folder; none without data to measure on."""
    if setup.questions is None:
        return None
    with progress_bar(setup.console, enabled=setup.config.training.progress_bar) as bar:
        result = measure(
            model,
            setup.processor,
            setup.questions,
            setup.evaluation,
            setup.compute,
            num_workers=setup.num_workers,
            bar=bar,
            description=f"evaluating {when}",
        )
    if setup.compute.rank == 0:
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
