"""What a run needs before it begins: everything checked and loaded, nothing written yet."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from transformers import set_seed

from phi3v.config import EvaluationConfig, ObjectiveConfig, RunConfig
from phi3v.data.batches import BatchPlan, RowPlan
from phi3v.data.cache import CACHE_HINT, cache_root
from phi3v.data.collate import QuestionDataset
from phi3v.data.features import FeatureStore
from phi3v.data.lengths import Context, RecordLengths, require_context
from phi3v.data.mixture import measure
from phi3v.data.order import Mixed, Order
from phi3v.data.overlap import find_overlaps
from phi3v.data.preferences import Preferences, lengths_at
from phi3v.data.rows import RowDataset
from phi3v.data.table import RecordTable
from phi3v.evaluate.answer_limit import AnswerLimit, answer_limit
from phi3v.findings import Finding
from phi3v.model.checkpoint import model_content
from phi3v.model.shape import ModelShape
from phi3v.paths import require_writable
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.checks import Case, require_possible
from phi3v.train.collectives import HostCollectives
from phi3v.train.compute.activations import (
    RECOMPUTES_ALL,
    Activations,
    Gradients,
    MicroBatch,
    Policy,
    kind_of_attention,
    residual_bytes,
)
from phi3v.train.compute.checkpointing import choose_checkpointing, free_bytes, free_pinned_bytes
from phi3v.train.compute.fast_paths import apply_fast_paths
from phi3v.train.data_facts import DataFacts, doubtful_answers
from phi3v.train.device import RuntimeDevice, default_workers
from phi3v.train.engines import Engine, make_engine
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.methods.gradient_check import check_gradients
from phi3v.train.methods.loading import ModelFacts, inspect_model, load_for_training, load_processor
from phi3v.train.methods.optimizers import state_bytes
from phi3v.train.objectives import Objective, make_objective
from phi3v.train.open_data import data_files, few_shards, open_data, order_of, probe_index, questions_of
from phi3v.train.run_folder import check_run_folder
from phi3v.train.selfcheck.check import SelfCheck, self_check
from phi3v.train.selfcheck.small_row import small_row


@dataclass(frozen=True)
class PreparedRun:
    """A run that may begin: everything checked and loaded, nothing written yet."""

    config: RunConfig
    console: Console
    runtime: RuntimeDevice
    collectives: HostCollectives
    facts: ModelFacts
    folder: Path
    accumulation: int
    processor: Phi3VProcessor
    engine: Engine
    train_table: RecordTable
    questions: QuestionDataset | None  # to evaluate on
    limit: AnswerLimit | None  # of their answers
    plan: BatchPlan
    checkpointing: str  # the policy and its reason
    checked: SelfCheck
    findings: tuple[Finding, ...] = ()  # what is doubtful about the data

    @cached_property
    def objective(self) -> Objective:
        return make_objective(self.config.objective, self.train_table.names)

    @property
    def mixture(self) -> Mixed | None:
        """Of a mixture, what an epoch takes of it."""
        return self.plan.order if isinstance(self.plan.order, Mixed) else None

    @property
    def model(self) -> Any:
        """Not wrapped."""
        return self.engine.model

    @property
    def num_workers(self) -> int:
        wanted = self.config.data.num_workers
        return default_workers(self.runtime) if wanted is None else wanted

    @property
    def about(self) -> dict[str, Any]:
        """What ``environment.json`` tells of it."""
        found = self.checked.to_json_dict()
        return {"self_check": found} if found else {}

    @property
    def contents(self) -> dict[str, str]:
        """What model and data files hold, in short."""
        tables = {"train": self.train_table} | ({"eval": self.questions.table} if self.questions is not None else {})
        return {"model": model_content(self.config.model.path)} | {name: t.sha256 for name, t in tables.items()}

    @property
    def evaluation(self) -> EvaluationConfig:
        """How it is evaluated, with the answers' limit as a number: the same every time."""
        evaluation = self.config.evaluation
        return replace(evaluation, max_new_tokens=self.limit.tokens) if self.limit is not None else evaluation

    def dataset(self, features: FeatureStore | None = None, reference: torch.Tensor | None = None) -> RowDataset:
        """What makes the rows of the plan; with their images' features, if kept.

        Args:
            reference: of `train.reference`, for objectives that need it.
        """
        return RowDataset(
            self.train_table,
            self.processor,
            self.config.training.loss_weighting,
            packed=self.plan.is_packed,
            features=features,
            on_bad=self.config.data.on_bad_sample,
            preferences=preferences_of(self.config, self.facts, self.train_table, reference),
        )

    def probe(self) -> dict[str, Any]:
        """The batch of the gradient check: the first record with an image, or the first, as training takes it."""
        return self.dataset()[RowPlan(((probe_index(self.train_table),),), ends_step=True)]

    def check_gradients(self) -> int:
        """As `check_gradients` on the `probe`, with the loss of the objective."""
        return check_gradients(
            self.model, self.probe(), autocast_dtype=self.runtime.autocast_dtype, loss_of=self.objective.probe_loss
        )


def prepare(
    config: RunConfig, console: Console, runtime: RuntimeDevice, collectives: HostCollectives, *, resume: bool = False
) -> PreparedRun:
    """Check everything and load the model.

    Args:
        resume: the run folder may hold a run already.

    Raises:
        UserError: the configuration, the model or the data are wrong.
    """
    case = Case(config, runtime)
    require_possible(case)
    choice, accumulation = case.engine, config.accumulation_steps(runtime.world_size)
    folder = check_run_folder(config, resume=resume)
    if config.training.feature_cache == "disk":
        require_writable(cache_root() / "features", "training.feature_cache", CACHE_HINT)
    data_files(config)  # a wrong name is found before a model is asked for, perhaps from a hub
    facts = inspect_model(config, runtime)
    require_possible(replace(case, model=facts.skeleton))
    processor = load_processor(config)
    with PartialState().main_process_first():  # one rank reads and checks, the others find it done
        train_table, eval_table = open_data(config)
        shared = find_overlaps(train_table, eval_table) if eval_table is not None else []
        lengths = require_lengths(config, train_table, facts, processor, config.objective)
        if eval_table is not None:
            require_lengths(config, eval_table, facts, processor)
    questions = questions_of(config, eval_table, processor)
    data = DataFacts.of(train_table, questions, config.evaluation)
    doubtful = doubtful_answers(config.objective, data)
    require_possible(replace(case, model=facts.skeleton, data=data))
    limit = answer_limit(questions, config.evaluation.max_new_tokens) if questions is not None else None
    # Before the model is loaded, whose memory it may take meanwhile.
    checked = check_fast_paths(config, facts, runtime, collectives, train_table, lengths, processor, console)
    facts = facts.with_attention(checked.paths.attention)
    set_seed(config.training.seed)
    model = load_for_training(config, facts, runtime)
    plan = make_plan(config, runtime, facts.skeleton, lengths, order_of(config, train_table))
    checkpointing, reason = _choose_checkpointing(config, checked, model, facts, plan, runtime, collectives, choice)
    apply_fast_paths(model, replace(checked.paths, checkpointing=checkpointing))
    engine = make_engine(model, choice, config, runtime)
    return PreparedRun(
        config,
        console,
        runtime,
        collectives,
        facts,
        folder,
        accumulation,
        processor,
        engine,
        train_table,
        questions,
        limit,
        plan,
        f"{checkpointing} ({reason})",
        checked,
        (
            *checked.findings,
            *shared,
            *([limit.finding] if limit is not None and limit.finding is not None else []),
            *(said for said in (doubtful, few_shards(plan.order, runtime.world_size)) if said is not None),
        ),
    )


def check_fast_paths(
    config: RunConfig,
    facts: ModelFacts,
    runtime: RuntimeDevice,
    collectives: HostCollectives,
    table: RecordTable,
    lengths: RecordLengths,
    processor: Phi3VProcessor,
    console: Console | None,
) -> SelfCheck:
    """As `self_check`, on a row of the data to train on."""

    def row() -> dict[str, Any]:
        return small_row(config, lengths, table, processor, preferences_of(config, facts, table))

    def say(line: str) -> None:
        if console is not None:
            console.print(f"[bold]self-check:[/bold] {escape(line)}", highlight=False, soft_wrap=True)

    return self_check(config, facts, runtime, collectives, row, say)


def _choose_checkpointing(
    config: RunConfig,
    checked: SelfCheck,
    model: Any,
    facts: ModelFacts,
    plan: BatchPlan,
    runtime: RuntimeDevice,
    collectives: HostCollectives,
    engine: EngineChoice,
) -> tuple[Policy, str]:
    """The policy for the largest row that any epoch may hold, and the reason."""
    paths = checked.paths
    if paths.checkpointing != "auto":
        is_asked = paths.checkpointing == config.training.activation_checkpointing
        return paths.checkpointing, "as configured" if is_asked else "in its place, by the self-check"
    activations = _activations(config, model, facts, runtime)
    state = engine.state_bytes(state_bytes(config.training), runtime.world_size)
    free = free_bytes(model, runtime.device, runtime.node_ranks, state)
    # Compiled layers contain their checkpoint, and the hooks of `offload` cannot be compiled.
    pinned = 0 if paths.compile else free_pinned_bytes(runtime.device, runtime.node_ranks)
    # The ranks must recompute alike.
    free, pinned = (min(each) for each in zip(*collectives.all_gather((free, pinned)), strict=True))
    batch = _largest_batch(plan, masks=activations.attention == "sdpa")
    least: Policy = "full" if config.training.lean else "none"
    return choose_checkpointing(activations, batch, free, pinned=pinned, least=least, without=checked.unfit)


def _activations(config: RunConfig, model: Any, facts: ModelFacts, runtime: RuntimeDevice) -> Activations:
    return Activations(
        ModelShape.of(model.config),
        Gradients.of(model),
        compute_bytes=runtime.dtype.itemsize,
        residual_bytes=residual_bytes(runtime.precision, config.method),
        attention=kind_of_attention(facts.attention),
        packing=config.data.packing,
        adapter_rank=config.method.lora.rank if config.method.uses_adapters else None,
    )


def _largest_batch(plan: BatchPlan, *, masks: bool) -> MicroBatch:
    """The most that a row may hold of everything: the longest records together, or a full packed row.

    Args:
        masks: whether the attention makes a mask for the branches of a row, which means planning some steps.
    """
    lengths = plan.lengths
    if not plan.is_packed:
        return MicroBatch.largest_of(lengths, min(plan.micro_batch_size, len(plan)))
    tokens = max(plan.pack_tokens, int(lengths.tokens.max()))
    steps = islice(plan.steps(0), 50)
    return MicroBatch(
        rows=1,
        tokens=tokens,
        image_tokens=tokens if lengths.crops.any() else 0,
        # Of the records with the most crops for their tokens.
        crops=math.ceil(tokens * float((lengths.crops / lengths.tokens).max())),
        answer_tokens=tokens,
        branch_pairs=max(plan.branch_pairs(row) for step in steps for rank in step for row in rank) if masks else 0,
    )


def require_lengths(
    config: RunConfig,
    table: RecordTable,
    facts: ModelFacts,
    processor: Phi3VProcessor,
    objective: ObjectiveConfig | None = None,
) -> RecordLengths:
    """The lengths of the records of a checked file, none of which is longer than the model reads.

    Args:
        objective: what is learned from them; by default they are answered.

    Raises:
        UserError: one is; or the header of an image cannot be read, and such records are not to be left out.
    """
    skip = config.data.on_bad_sample == "skip"
    measured = measure(table, processor, skip_unreadable=skip, progress=config.training.progress_bar)
    long_context_start = facts.skeleton.config.long_context_start
    objective = objective or ObjectiveConfig()
    lengths = lengths_at(measured, objective, processor.image_processor.num_crops, long_context_start)
    require_context(table, Context(facts.context, processor), lengths)
    return lengths


def preferences_of(
    config: RunConfig, facts: ModelFacts, table: RecordTable, reference: torch.Tensor | None = None
) -> Preferences | None:
    """What makes samples of all answers of a record, where the objective learns from them."""
    if not config.objective.is_preference:
        return None
    return Preferences(table, config.objective, facts.skeleton.config.long_context_start, reference)


def make_plan(
    config: RunConfig, runtime: RuntimeDevice, model: Any, lengths: RecordLengths, order: Order | None = None
) -> BatchPlan:
    """Which records each rank computes in which step.

    Args:
        model: without weights, and no method applied to it.
        order: of `order_of`.
    """
    tower_trained = "vision" in Case(config, runtime, model).trained
    again = "full" if config.training.lean else config.training.activation_checkpointing
    costs = ModelShape.of(model.config).training_costs(
        tower_trained=tower_trained,
        adapters=config.method.uses_adapters,
        features_kept=config.training.feature_cache != "off",
        # What `auto` will choose is not known yet, and may differ between machines.
        decoder_again=again in RECOMPUTES_ALL,
        tower_again=tower_trained and again not in ("none", "auto"),
    )
    return BatchPlan(
        lengths,
        config.data.packing,
        batch_size=config.training.batch_size,
        micro_batch_size=config.training.micro_batch_size,
        batch_tokens=config.training.batch_tokens,
        pack_tokens=config.data.pack_tokens,
        shared_image_max=config.data.shared_image_max,
        costs=costs,
        world_size=runtime.world_size,
        seed=config.training.seed,
        order=order,
    )
