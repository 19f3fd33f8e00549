"""One run from recipe to result: check, load, measure, train, save, measure again."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback as LibraryProgressCallback

from phi3v.config import RunConfig
from phi3v.errors import UserError
from phi3v.evaluate.evaluation import EvaluationResult
from phi3v.train.evaluation_callback import EvaluationCallback
from phi3v.train.feature_cache import fill_features
from phi3v.train.gradient_check import check_gradients
from phi3v.train.header import print_header
from phi3v.train.measuring import measure, show_scores
from phi3v.train.optimizers import optimizer_factory
from phi3v.train.progress import ProgressCallback, progress_bar
from phi3v.train.result import RunResult, print_result
from phi3v.train.run_folder import claim_run_folder
from phi3v.train.saving import load_trained, round_to_stored_dtype, save_final
from phi3v.train.setup import Setup, prepare, questions_of
from phi3v.train.trainer import Phi3VTrainer, training_arguments

logger = logging.getLogger("phi3v")


def run_training(config: RunConfig, console: Console, *, callbacks: Sequence[TrainerCallback] = ()) -> RunResult:
    """Train as configured.

    What can be known to be wrong is found before it costs anything: first the configuration, then model and data
    without loading the model, then the gradients of one batch. Only then is the run folder touched.

    Args:
        callbacks: told of every step after our own, when its line of ``metrics.jsonl`` is written.

    Raises:
        UserError: the configuration, the model or the data are wrong.
    """
    setup = prepare(config, console)
    print_header(setup)
    checked = check_gradients(setup.model, setup.probe(), autocast_dtype=setup.compute.autocast_dtype)
    console.print(f"gradient check: all {checked} trainable tensors get a gradient, no frozen one does")
    try:
        if setup.compute.rank == 0:
            claim_run_folder(config)
            _log_to(setup.folder / "log.txt")
        PartialState().wait_for_everyone()
        result = _train_and_measure(setup, callbacks)
    except UserError as error:
        error.one_rank = setup.compute.rank > 0
        raise
    logger.info("result %s", json.dumps(result.to_json_dict()))
    print_result(console, result)
    return result


def _train_and_measure(setup: Setup, callbacks: Sequence[TrainerCallback]) -> RunResult:
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
    before = _measure(setup, "before") if config.evaluation.before else None
    after = None

    arguments = training_arguments(
        config,
        setup.folder,
        precision=compute.precision,
        use_cpu=compute.device.type == "cpu",
        accumulation=setup.accumulation,
        num_workers=setup.num_workers,
    )
    trainer = Phi3VTrainer(
        model=model,
        args=arguments,
        train_dataset=setup.dataset(features),
        data_collator=setup.collator(),
        optimizer_cls_and_kwargs=optimizer_factory(config.training),
        lean=config.training.lean,
        plan=setup.plan,
    )
    for callback in (PrinterCallback, LibraryProgressCallback):
        trainer.remove_callback(callback)
    show_bar = config.training.progress_bar
    progress = ProgressCallback(setup.console, setup.folder / "metrics.jsonl", show_bar=show_bar)
    progress.trainer = trainer
    trainer.add_callback(progress)
    during = _during(setup, progress)
    if during is not None:
        trainer.add_callback(during)
    for callback in callbacks:
        trainer.add_callback(callback)
    started = time.perf_counter()
    try:
        output = trainer.train()
    finally:
        progress.close()
    seconds = time.perf_counter() - started - (during.seconds if during is not None else 0.0)

    best = during.best if during is not None and config.evaluation.keep_best else None
    if best is not None and during is not None:
        load_trained(model, during.best_folder, rank=compute.rank, world_size=compute.world_size)
        setup.console.print(f"final/ holds the weights of step {best.step}, the best measured", highlight=False)
    round_to_stored_dtype(model, setup.facts.stored_dtype)
    if compute.rank == 0:
        save_final(model, setup.processor, setup.folder / "final")
    trainer.accelerator.wait_for_everyone()
    if config.evaluation.after:
        after = _measure(setup, "after")

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
        mean_train_loss=float(output.training_loss),
        best=best,
        stopped_early=during is not None and during.stopped_early,
    )


def _during(setup: Setup, progress: ProgressCallback) -> EvaluationCallback | None:
    """What measures while it trains, if that is wanted."""
    config = setup.config
    if setup.questions is None or config.evaluation.eval_steps is None:
        return None
    fewer = config.evaluation.eval_steps_questions
    questions = questions_of(config, setup.questions.table, setup.processor, fewer)
    assert questions is not None
    return EvaluationCallback(
        setup.model,
        setup.processor,
        questions,
        config.evaluation,
        setup.compute,
        stored_dtype=setup.facts.stored_dtype,
        folder=setup.folder,
        console=setup.console,
        progress=progress,
        num_workers=setup.num_workers,
    )


def _measure(setup: Setup, when: str) -> EvaluationResult | None:
    """The scores before or after training, written to the run folder; none without data to measure on."""
    if setup.questions is None:
        return None
    with progress_bar(setup.console, enabled=setup.config.training.progress_bar) as bar:
        result = measure(
            setup.model,
            setup.processor,
            setup.questions,
            setup.config.evaluation,
            setup.compute,
            num_workers=setup.num_workers,
            bar=bar,
            description=f"evaluating {when}",
        )
    if setup.compute.rank == 0:
        result.write(setup.folder, f"_{when}")
        show_scores(setup.console, result, when)
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
