"""One run from recipe to result: check, load, measure, train, save, measure again."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as LibraryProgressCallback

from phi3v.config import RunConfig
from phi3v.data.check import ensure_checked
from phi3v.data.collate import Collator, ConversationDataset, QuestionDataset
from phi3v.data.features import FeatureStore
from phi3v.data.jsonl import require_file
from phi3v.data.packing import PackedDataset, PackingPlan, RowPlan, measure_records
from phi3v.data.table import RecordTable, open_table
from phi3v.errors import UserError
from phi3v.evaluate.evaluation import EvaluationResult, check_references
from phi3v.processing.hd_transform import num_distinct_crops, num_img_tokens
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.checkpointing import Policy, apply_checkpointing, choose_checkpointing, free_bytes
from phi3v.train.device import Compute, choose_compute, default_workers
from phi3v.train.evaluation_callback import Best, EvaluationCallback
from phi3v.train.feature_cache import cached_stage, fill_features, vision_part
from phi3v.train.gradient_check import check_gradients
from phi3v.train.kernels import apply_kernels, check_kernels
from phi3v.train.loading import ModelFacts, inspect_model, load_for_training, load_processor
from phi3v.train.measuring import measure, show_scores
from phi3v.train.optimizers import check_optimizer, optimizer_factory, state_bytes
from phi3v.train.progress import ProgressCallback, peak_memory_gb, progress_bar
from phi3v.train.run_folder import check_run_folder, claim_run_folder
from phi3v.train.saving import load_trained, round_to_stored_dtype, save_final
from phi3v.train.strategies import summarize
from phi3v.train.trainer import Phi3VTrainer, training_arguments

logger = logging.getLogger("phi3v")

# Where memory is estimated before a text is tokenised.
ASSUMED_TEXT_TOKENS = 512


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
    best: Best | None = None  # the measurement whose weights were kept
    stopped_early: bool = False

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


@dataclass(frozen=True)
class Setup:
    """A run that may begin: everything checked and loaded, nothing written yet."""

    config: RunConfig
    console: Console
    compute: Compute
    facts: ModelFacts
    folder: Path
    accumulation: int
    processor: Phi3VProcessor
    model: Any
    train_table: RecordTable
    questions: QuestionDataset | None  # to measure on
    plan: PackingPlan | None  # of packed rows
    checkpointing: str  # the policy and its reason

    @property
    def num_workers(self) -> int:
        wanted = self.config.data.num_workers
        return default_workers(self.compute) if wanted is None else wanted

    def collator(self) -> Collator:
        """Makes batches to learn from."""
        pad = self.processor.tokenizer.pad_token_id
        return Collator(pad, loss_weighting=self.config.training.loss_weighting)

    def dataset(self, features: FeatureStore | None = None) -> ConversationDataset | PackedDataset:
        """What is learnt from: records, or rows of them as the plan says; with their pictures' features, if kept."""
        if self.plan is None:
            return ConversationDataset(self.train_table, self.processor, features=features)
        weighting = self.config.training.loss_weighting
        return PackedDataset(self.train_table, self.processor, weighting, features=features)

    def probe(self) -> dict[str, Any]:
        """The batch of the gradient check: the first record with a picture, or the first, as training takes it."""
        index, dataset = probe_index(self.train_table), self.dataset()
        if isinstance(dataset, PackedDataset):
            return dataset[RowPlan(((index,),), ends_step=True)]
        return self.collator()([dataset[index]])


def run_training(config: RunConfig, console: Console) -> RunResult:
    """Train as configured.

    What can be known to be wrong is found before it costs anything: first the configuration, then model and data
    without loading the model, then the gradients of one batch. Only then is the run folder touched.

    Raises:
        UserError: the configuration, the model or the data are wrong.
    """
    setup = prepare(config, console)
    checked = check_gradients(setup.model, setup.probe(), autocast_dtype=setup.compute.autocast_dtype)
    console.print(f"gradient check: all {checked} trainable tensors get a gradient, no frozen one does")
    try:
        if setup.compute.rank == 0:
            claim_run_folder(config)
            _log_to(setup.folder / "log.txt")
        PartialState().wait_for_everyone()
        result = _train_and_measure(setup)
    except UserError as error:
        error.one_rank = setup.compute.rank > 0
        raise
    logger.info("result %s", json.dumps(result.to_json_dict()))
    _print_result(console, result)
    return result


def prepare(config: RunConfig, console: Console) -> Setup:
    """Check everything, load the model and say what will happen.

    Raises:
        UserError: the configuration, the model or the data are wrong.
    """
    compute = choose_compute(config.training.precision)
    accumulation = config.accumulation_steps(compute.world_size)
    check_optimizer(config, compute, accumulation)
    check_kernels(config.training, compute.device, compute.precision)
    folder = check_run_folder(config)
    data_files(config)  # a wrong name is found before a model is asked for, perhaps from a hub
    facts = inspect_model(config, compute)
    processor = load_processor(config)
    with PartialState().main_process_first():  # one rank reads and checks, the others find it done
        train_table, eval_table = open_data(config)
    questions = _questions(config, eval_table, processor)
    if questions is not None:
        check_references(questions, config.evaluation)
    set_seed(config.training.seed)
    model = load_for_training(config, facts, compute)
    plan = make_plan(config, compute, model, train_table, processor)
    checkpointing, reason = _choose_checkpointing(config, model, processor, train_table, plan, compute)
    apply_checkpointing(model, checkpointing)
    apply_kernels(model, config.training)
    setup = Setup(
        config,
        console,
        compute,
        facts,
        folder,
        accumulation,
        processor,
        model,
        train_table,
        questions,
        plan,
        f"{checkpointing} ({reason})",
    )
    _print_header(setup)
    _check_pictures(model, train_table)
    if config.training.feature_cache != "off":
        cached_stage(vision_part(model))  # refuses a tower that trains
    return setup


def _choose_checkpointing(
    config: RunConfig,
    model: Any,
    processor: Phi3VProcessor,
    table: RecordTable,
    plan: PackingPlan | None,
    compute: Compute,
) -> tuple[Policy, str]:
    """The policy for a micro-batch of the largest records that the data may hold, or for a full row; and the reason."""
    if config.training.lean:
        return "full", "lean mode"
    num_crops = processor.image_processor.num_crops
    crops_of_page = num_distinct_crops(1, num_crops)
    most_images = int(table.image_counts().max())
    if plan is None:
        samples = config.training.micro_batch_size
        images = most_images * samples
        # A page of one column has the most row ends.
        tokens = images * num_img_tokens(num_crops, 1) + samples * ASSUMED_TEXT_TOKENS
        crops = images * crops_of_page
    else:
        tokens = max(plan.pack_tokens, int(plan.lengths.tokens.max()))
        # A page of one row has the most crops for its tokens.
        crops = math.ceil(tokens / num_img_tokens(1, num_crops) * crops_of_page) if most_images else 0
    return choose_checkpointing(
        config.training.activation_checkpointing,
        model.config,
        tokens=tokens,
        crops=crops,
        bytes_per_value=compute.dtype.itemsize,
        free=free_bytes(model, compute.device, compute.world_size, state_bytes(config.training)),
    )


def _train_and_measure(setup: Setup) -> RunResult:
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


def open_data(config: RunConfig) -> tuple[RecordTable, RecordTable | None]:
    """The checked data files.

    Raises:
        UserError: no data, or faults in it.
    """
    tables: list[RecordTable] = []
    for path in data_files(config):
        ensure_checked(
            path,
            max_pixels=config.data.max_image_pixels,
            image_level=config.data.image_check,
            special_text=config.data.special_text,
            progress=config.training.progress_bar,
        )
        table = open_table(
            path,
            special_text=config.data.special_text,
            max_pixels=config.data.max_image_pixels,
            progress=config.training.progress_bar,
        )
        tables.append(table)
    return tables[0], tables[1] if len(tables) > 1 else None


def data_files(config: RunConfig) -> list[Path]:
    """The file to learn from and, where there is one, the file to measure on.

    Raises:
        UserError: none is named, or one does not exist.
    """
    if config.data.train is None:
        raise UserError("no data to learn from", where="data.train", hint="give a JSONL file: --data.train FILE.jsonl")
    if config.data.eval is None and config.evaluation.eval_steps is not None:
        raise UserError(
            "there is no data to measure on", where="evaluation.eval_steps", hint="set data.eval to a JSONL file"
        )
    files = [Path(name) for name in (config.data.train, config.data.eval) if name is not None]
    for file in files:
        require_file(file)
    return files


def _check_pictures(model: Any, table: RecordTable) -> None:
    trained = {part.part for part in summarize(model) if part.trainable}
    if not table.image_counts().any() and trained & {"vision", "projector"}:
        raise UserError(
            "no record has a picture, so the vision part would learn nothing",
            where=str(table.path),
            hint="use method.name frozen-vision, or method.lora.parts [decoder, head]",
        )


def probe_index(table: RecordTable) -> int:
    """A record for the gradient check: the first one with a picture, or the first."""
    with_images = table.image_counts().nonzero()[0]
    return int(with_images[0]) if len(with_images) else 0


def make_plan(
    config: RunConfig, compute: Compute, model: Any, table: RecordTable, processor: Phi3VProcessor
) -> PackingPlan | None:
    """How records are packed, if they are."""
    if config.data.packing == "none":
        return None
    lengths = measure_records(
        table,
        processor,
        model.config.long_context_start,
        progress=config.training.progress_bar and compute.rank == 0,
    )
    return PackingPlan(
        lengths,
        config.data.packing,
        batch_size=config.training.batch_size,
        batch_tokens=config.training.batch_tokens,
        pack_tokens=config.data.pack_tokens,
        shared_image_max=config.data.shared_image_max,
        world_size=compute.world_size,
        seed=config.training.seed,
    )


def _questions(
    config: RunConfig, table: RecordTable | None, processor: Phi3VProcessor, at_most: int | None = None
) -> QuestionDataset | None:
    """What is measured on: as many questions as configured, and ``at_most`` so many."""
    if table is None:
        return None
    limits = [limit for limit in (config.evaluation.max_questions, at_most) if limit is not None]
    return QuestionDataset(table, processor, limit=min(limits, default=None), seed=config.training.seed)


def _during(setup: Setup, progress: ProgressCallback) -> EvaluationCallback | None:
    """What measures while it trains, if that is wanted."""
    config = setup.config
    if setup.questions is None or config.evaluation.eval_steps is None:
        return None
    fewer = config.evaluation.eval_steps_questions
    questions = _questions(config, setup.questions.table, setup.processor, fewer)
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


def _print_header(setup: Setup) -> None:
    config, console, compute, facts = setup.config, setup.console, setup.compute, setup.facts
    train_table, questions = setup.train_table, setup.questions
    parts = summarize(setup.model)
    table = Table(box=None, pad_edge=False)
    for column in ("part", "parameters", "trained", "adapters"):
        table.add_column(column, justify="left" if column in ("part", "adapters") else "right")
    for part in parts:
        adapters = ", ".join(f"{name} ×{count}" for name, count in part.adapters.items())
        table.add_row(part.part, f"{part.total:,}", f"{part.trainable:,}", adapters)
    trainable, total = sum(part.trainable for part in parts), sum(part.total for part in parts)
    table.add_row("total", f"{total:,}", f"{trainable:,}", f"{100 * trainable / total:.2f} % trained")
    console.print(f"[bold]{config.method.name}[/bold] training of {config.model.path}", highlight=False)
    console.print(table)
    for line in (
        f"data: {len(train_table)} records, {int(train_table.turn_counts().sum())} questions to learn from"
        + (f", {len(questions)} questions to measure on" if questions is not None else ""),
        f"device: {compute.device}, {compute.precision} ({compute.reason})",
        f"attention: {facts.attention} ({facts.attention_reason})",
        f"activation checkpointing: {setup.checkpointing}",
        f"optimizer: {config.training.optimizer}" + ", stepping in the backward pass" * config.training.lean,
        f"step: {_step_line(setup)}; every {config.training.loss_weighting} weighs the same",
        f"output: {config.training.output_dir}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _step_line(setup: Setup) -> str:
    config, ranks = setup.config, setup.compute.world_size
    if setup.plan is None:
        return (
            f"{config.training.batch_size} samples = {ranks} ranks × {config.training.micro_batch_size} at a time × "
            f"{setup.accumulation} accumulated"
        )
    tokens, separate = setup.plan.epoch_tokens(), int(setup.plan.lengths.tokens.sum())
    wanted = config.training.batch_tokens
    size = f"{config.training.batch_size} samples" if wanted is None else f"about {wanted} tokens"
    shared = f" ({separate / tokens:.2f} times fewer tokens than apart)" if setup.plan.shares else ""
    return (
        f"{size} on {ranks} ranks in rows of at most {config.data.pack_tokens} tokens, {config.data.packing} packing"
        f"{shared}, {setup.plan.num_steps} steps an epoch"
    )


def _print_result(console: Console, result: RunResult) -> None:
    table = Table(title="result", box=None, pad_edge=False, title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for when, measured in (("before", result.before), ("after", result.after)):
        if measured is not None:
            table.add_row(f"{measured.primary.name} {when}", str(measured.primary))
    table.add_row("steps", f"{result.steps}{' (stopped early)' if result.stopped_early else ''}")
    if result.best is not None:
        table.add_row("best weights", f"step {result.best.step}")
    table.add_row("training time", f"{result.train_seconds:.1f} s")
    table.add_row("speed", f"{result.questions_per_second:.1f} questions/s")
    table.add_row("", f"{result.samples_per_second:.2f} samples/s")
    table.add_row("", f"{result.tokens_per_second:,.0f} tokens/s")
    table.add_row("peak memory", f"{peak_memory_gb():.2f} GB")
    console.print(table)
    console.print(f"run folder: {result.folder}", highlight=False, soft_wrap=True)


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
