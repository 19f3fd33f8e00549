"""The plan of a run: what fits, what would make the rest fit, how long it takes, and one recommendation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from phi3v.config import METHODS, DataSource, MethodName, Packing, RunConfig
from phi3v.data.lengths import Context, require_context
from phi3v.data.mixture import measure
from phi3v.data.preferences import lengths_at
from phi3v.data.shards.index import is_shards
from phi3v.errors import UserError
from phi3v.model.presets import planned_config
from phi3v.model.shape import ModelShape
from phi3v.plan.hardware import Machine
from phi3v.plan.inputs import (
    ENGINES,
    Engine,
    TrainSetup,
    engine_of,
    planned_runtime,
    recipe_changes,
    setup_from_config,
)
from phi3v.plan.memory import Memory, activations_of, predict_memory
from phi3v.plan.options import Option, Plan, gib, on_engine, refused, relaxations
from phi3v.plan.parameters import Parameters, count_model, meta_model
from phi3v.plan.published import assumed_utilisation, published_row
from phi3v.plan.rows import PackedRows, pack_workload
from phi3v.plan.throughput import CPU_UTILISATION, SampleWork, Speed, predict_speed, training_flops
from phi3v.plan.workload import Workload, assumed_workload, read_workload
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.checks import Case, refusals
from phi3v.train.compute.activations import MicroBatch, kind_of_attention
from phi3v.train.data_facts import DataFacts
from phi3v.train.methods.loading import choose_attention, make_skeleton
from phi3v.train.open_data import open_tables, order_of, questions_of
from phi3v.train.schedule import total_steps

# Where the recipe's method does not fit: the order of Microsoft's published DocVQA scores (83.65, 82.46, 81.85, 79.19).
BY_SCORE: tuple[MethodName, ...] = ("full", "lora", "qlora", "frozen-vision")
MARGIN = 0.95  # of a device's memory that a plan may fill
DEFAULT_CROPS = 16
PACK_TOKENS = (1024, 2048, 4096, 8192, 16384)  # lengths of rows that are recommended


class Planner:
    """Plans for one recipe; the dataset is read and the model counted once, whatever the number of machines."""

    def __init__(self, config: RunConfig, *, progress: bool = True) -> None:
        self.config = config
        self.model_config, self.model_basis = planned_config(config.model.path)
        self.shape = ModelShape.of(self.model_config)
        processor = _processor(config)
        self.workload = _workload(config, processor, progress=progress)
        advised = config.model.num_crops or (processor.image_processor.num_crops if processor else DEFAULT_CROPS)
        self._require_context(Context(self.model_config.max_position_embeddings, processor), advised)
        self.num_crops, self.crops_reason = self.workload.recommended_crops(advised)
        if config.model.num_crops is not None:
            self.crops_reason = f"the recipe says so; recommended are {self.num_crops}: {self.crops_reason}"
            self.num_crops = config.model.num_crops
        self.skeleton = make_skeleton(self.model_config)
        self.data = None if self.workload.is_assumed else _data_facts(config, processor)
        self._models: dict[tuple[str, str], nn.Module] = {}
        self._counts: dict[tuple[str, str], Parameters] = {}
        self._rows: dict[tuple[int, str, int, int], PackedRows] = {}

    def _require_context(self, context: Context, num_crops: int) -> None:
        """Raise `UserError` for records that are longer than the model reads."""
        if self.config.data.train is not None and not self.workload.is_assumed:
            table, _ = open_tables(self.config.with_keys({"data.eval": None}), progress=False)
            lengths = lengths_at(measure(table, context.processor), self.config.objective, num_crops)
            require_context(table, context, lengths)

    def plan(self, machine: Machine) -> Plan:
        """The plan for ``machine``.

        Raises:
            UserError: `phi3v train` would refuse the recipe there, whatever the method and the engine.
        """
        base = setup_from_config(self._splittable(machine), machine, self.num_crops)
        engines: Sequence[Engine] = ENGINES if machine.gpus > 1 else ("ddp",)
        options = tuple(
            self.option(on_engine(base.with_method(method), engine), machine)
            for method in METHODS
            for engine in engines
        )
        refusal = next(iter(refusals(self._case(self.config, machine))), None)
        if refusal is not None and all(option.refusal for option in options):
            raise refusal
        own = setup_from_config(self.config, machine, self.num_crops)
        own_option = self.option(own, machine) if refusal is None else refused(own, refusal)
        recommended, reason = self._recommend(own_option, options, machine)
        records = len(self.workload)
        samples = math.ceil(records * self.config.training.epochs)
        by_tokens = self.config.training.batch_tokens is not None
        an_epoch = self.rows(base).steps if by_tokens else math.ceil(records / self.config.training.batch_size)
        steps = total_steps(self.config.training, an_epoch)
        if self.config.training.max_steps:
            samples = steps * self.config.training.batch_size
        return Plan(
            machine=machine,
            config=self.config,
            model_basis=self.model_basis,
            workload=self.workload,
            num_crops=self.num_crops,
            crops_reason=self.crops_reason,
            own=own_option,
            options=options,
            recommended=recommended,
            reason=reason,
            steps=steps,
            samples=samples,
            published={m: row for m in METHODS if (row := published_row(machine, m)) is not None},
        )

    def option(self, setup: TrainSetup, machine: Machine) -> Option:
        """Whether a set-up fits, and if not, the fewest changes that make it fit."""
        if (refusal := self._refusal(setup, machine)) is not None:
            return refused(setup, refusal)
        limit = int(machine.gpu.memory_bytes * MARGIN)
        first = self.memory(setup, machine)
        best, best_memory = setup, first
        changes: tuple[str, ...] = ()
        for changed, words in relaxations(setup, on_host=machine.gpu.is_cpu):
            if self._refusal(changed, machine) is not None:
                continue
            memory = self.memory(changed, machine)
            if memory.peak < best_memory.peak or not words:
                best, best_memory, changes = changed, memory, words
            if memory.peak <= limit:
                reason = f"{gib(memory.peak)} of {gib(machine.gpu.memory_bytes)} ({memory.moment})"
                if words:
                    reason = f"{reason}; as the recipe is, {gib(first.peak)}"
                speed = self.speed(changed, machine)
                return Option(changed, True, words, reason, memory, speed, self.rows_or_none(changed))
        biggest = max(best_memory.parts, key=lambda name: best_memory.parts[name])
        tried = ", ".join(changes) or "one sample"
        reason = (
            f"{gib(best_memory.peak)} of {gib(machine.gpu.memory_bytes)} even with {tried}"
            f"; {gib(best_memory.parts[biggest])} of it {biggest}"
        )
        return Option(best, False, (), reason, best_memory, None)

    def _case(self, config: RunConfig, machine: Machine) -> Case:
        return Case(config, planned_runtime(config, machine), self.skeleton, self.data)

    def _refusal(self, setup: TrainSetup, machine: Machine) -> UserError | None:
        """Why `phi3v train` would not begin with a set-up."""
        try:
            config = self.config.with_keys(recipe_changes(setup))
        except UserError as error:
            return error
        return next(iter(refusals(self._case(config, machine))), None)

    def _packed(self, setup: TrainSetup, packing: Packing, machine: Machine) -> TrainSetup:
        """A set-up with packed rows, which other attention computes."""
        config = self.config.with_keys({"data.packing": packing, "training.micro_batch_size": 1})
        attention = kind_of_attention(choose_attention(config, planned_runtime(config, machine))[0])
        return replace(setup, packing=packing, micro_batch=1, attention=attention)

    def memory(self, setup: TrainSetup, machine: Machine) -> Memory:
        """The predicted peak of a rank."""
        if setup.packing == "none":
            batch = MicroBatch.largest_of(self.workload.at(setup.num_crops).lengths, setup.micro_batch)
        else:
            rows = self.rows(setup)
            batch, setup = rows.largest, replace(setup, accumulates=rows.most_rows > 1)
        return predict_memory(self.shape, self.counts(setup), setup, batch, cpu=machine.gpu.is_cpu)

    def speed(self, setup: TrainSetup, machine: Machine) -> Speed:
        """The predicted speed of all ranks."""
        work = self._mean_sample(setup.num_crops) if setup.packing == "none" else self.rows(setup).work
        flops = training_flops(
            self.shape,
            setup,
            work,
            tower_trained=self.counts(setup).gradients.tower_trained,
            extra_forwards=int(self.config.objective.name == "kto"),  # for its estimate of the drift
        )
        if machine.gpu.is_cpu:
            basis = f"{CPU_UTILISATION:.0%} of the nominal rate, as measured with the tiny model"
            return predict_speed(flops, machine, CPU_UTILISATION, basis)
        utilisation, basis = assumed_utilisation(machine, setup.method.name)
        if setup.float8:
            basis += "; what fp8 gains has not been measured and is not counted"
        moved = 0.0
        if setup.checkpointing == "offload":
            mean = MicroBatch(1, round(work.tokens), round(work.image_tokens), round(work.crops), 0)
            moved = activations_of(self.shape, self.counts(setup), setup).moved(mean)
        return predict_speed(flops, machine, utilisation, basis, moved=moved)

    def _mean_sample(self, num_crops: int) -> SampleWork:
        lengths = self.workload.at(num_crops).lengths
        return SampleWork(
            tokens=float(lengths.separate.mean()),
            tokens_squared=float(lengths.squared.mean()),
            image_tokens=float(lengths.image_tokens.mean()),
            crops=float(lengths.crops.mean()),
            answer_tokens=float(lengths.targets.mean()),
        )

    def rows(self, setup: TrainSetup) -> PackedRows:
        """The rows of a packed set-up."""
        key = (setup.num_crops, setup.packing, setup.pack_tokens, setup.gpus)
        if key not in self._rows:
            self._rows[key] = pack_workload(self.workload, setup, self.config, self.shape.training_costs())
        return self._rows[key]

    def rows_or_none(self, setup: TrainSetup) -> PackedRows | None:
        """The rows of a set-up, if it packs."""
        return None if setup.packing == "none" else self.rows(setup)

    def counts(self, setup: TrainSetup) -> Parameters:
        """Parameters of the set-up's method."""
        key = (setup.method.name, setup.precision)
        if key not in self._counts:
            self._counts[key] = self._count(setup)
        return self._counts[key]

    def _count(self, setup: TrainSetup) -> Parameters:
        key = ("lora" if setup.is_adapter else setup.method.name, setup.precision)
        if key not in self._models:
            self._models[key] = meta_model(self.model_config, setup.method, setup.precision)
        return count_model(self._models[key], setup.method)

    def _recommend(self, recipe: Option, options: Sequence[Option], machine: Machine) -> tuple[Option | None, str]:
        wanted = self.config.method.name
        runnable = [option for option in options if option.fits]
        for name in (wanted, *(method for method in BY_SCORE if method != wanted)):
            own = [option for option in runnable if option.setup.method.name == name]
            if not own:
                continue
            chosen = self._faster(self._least_changed(own, name, machine), machine)
            if name == wanted:
                fits = f"{name}, the recipe's method, fits {machine.label}"
                if recipe.refusal is not None:
                    changed = ", ".join(chosen.changes) or f"engine {chosen.setup.engine}"
                    return chosen, f"{fits} with {changed}; as it is, the recipe cannot run there: {recipe.reason}"
                return chosen, fits + (f" with {', '.join(chosen.changes)}" if chosen.changes else " as it is")
            return chosen, (
                f"{name}: {self._why_not(options, machine)}; of what fits, {name} has the best published score"
            )
        return None, f"nothing fits {machine.label}: take a larger GPU, or a smaller num_crops"

    def _least_changed(self, options: Sequence[Option], name: MethodName, machine: Machine) -> Option:
        """The option with the fewest changes; of several, that on the engine that training would take."""
        engine = engine_of(self.config, machine, name)
        return min(options, key=lambda option: (len(option.changes), option.setup.engine != engine))

    def _why_not(self, options: Sequence[Option], machine: Machine) -> str:
        """Why the recipe's own method cannot run here."""
        name = self.config.method.name
        own = next(option for option in options if option.setup.method.name == name)
        return f"{name} does not fit {machine.label} ({own.reason})"

    def _faster(self, option: Option, machine: Machine) -> Option:
        """The same with the rest of the memory put to use: packed rows or larger micro-batches, no recomputing."""
        setup = option.setup
        lengths = self._row_lengths(setup, machine)
        shortest = next((packed for packed in lengths if self._runs(packed, machine)), None)
        best = shortest or setup
        if best.checkpointing == "full" and not option.changes:
            spared = replace(best, checkpointing="none")
            if self._runs(spared, machine):
                best = spared
        for larger in lengths if shortest else self._micro_batches(best):
            if shortest and larger.pack_tokens <= best.pack_tokens:
                continue
            grown = replace(larger, checkpointing=best.checkpointing)
            if not self._runs(grown, machine):
                break
            best = grown
        if best == option.setup:
            return option
        memory = self.memory(best, machine)
        return replace(
            option,
            setup=best,
            memory=memory,
            speed=self.speed(best, machine),
            reason=f"{gib(memory.peak)} of {gib(machine.gpu.memory_bytes)} ({memory.moment})",
            rows=self.rows_or_none(best),
        )

    def _runs(self, setup: TrainSetup, machine: Machine) -> bool:
        if self._refusal(setup, machine) is not None:
            return False
        return self.memory(setup, machine).peak <= int(machine.gpu.memory_bytes * MARGIN)

    def _row_lengths(self, setup: TrainSetup, machine: Machine) -> list[TrainSetup]:
        """The set-up with packed rows, from short to long, up to where a step is one row a rank.

        Packing changes no record's loss or gradient, so it is recommended wherever it can run.
        """
        shared = setup.packing == "shared-image" or self.workload.shared_image_factor > 1.05
        try:
            base = self._packed(setup, "shared-image" if shared else "samples", machine)
        except UserError:  # of attention that is named and does not go with it
            return []
        if self._refusal(base, machine) is not None:
            return []
        mean = float(self.workload.at(setup.num_crops).tokens.mean())
        chosen: list[TrainSetup] = []
        for tokens in [tokens for tokens in PACK_TOKENS if tokens >= mean] or [PACK_TOKENS[-1]]:
            packed = replace(base, pack_tokens=tokens)
            most = self.rows(packed).most_rows
            chosen.append(replace(packed, accumulates=most > 1))
            if most == 1:
                break
        return chosen

    def _micro_batches(self, setup: TrainSetup) -> Iterator[TrainSetup]:
        """The set-up with ever more samples at a time, where they are not packed."""
        share = self.config.training.batch_size // setup.gpus
        while setup.packing == "none" and setup.micro_batch * 2 <= 8 and share and share % (setup.micro_batch * 2) == 0:
            doubled = setup.micro_batch * 2
            setup = replace(setup, micro_batch=doubled, accumulates=share > doubled)
            yield setup

    def _splittable(self, machine: Machine) -> RunConfig:
        """The configuration with a micro-batch that the machine's ranks can share, where the recipe's cannot be."""
        training = self.config.training
        if self.config.data.packing != "none" or training.batch_size % machine.gpus:
            return self.config
        micro_batch = math.gcd(training.micro_batch_size, training.batch_size // machine.gpus)
        return self.config.with_keys({"training.micro_batch_size": micro_batch})


def _processor(config: RunConfig) -> Phi3VProcessor | None:
    """The model's processor where it lies on the disk; a plan never downloads."""
    if not Path(config.model.path).is_dir():
        return None
    try:
        return Phi3VProcessor.from_pretrained(config.model.path, num_crops=config.model.num_crops)
    except (OSError, KeyError):
        return None


def _data_facts(config: RunConfig, processor: Phi3VProcessor | None) -> DataFacts:
    """What checks ask of the data files that are here."""
    evaluation_is_here = processor is not None and _are_here(config.data.eval_sources)
    here = config if evaluation_is_here else config.with_keys({"data.eval": None})
    train_table, eval_table = open_tables(here, progress=False)
    questions = questions_of(config, eval_table, processor) if processor is not None else None
    return DataFacts.of(train_table, questions, config.evaluation)


def _workload(config: RunConfig, processor: Phi3VProcessor | None, *, progress: bool) -> Workload:
    if not _are_here(config.data.train_sources):
        return assumed_workload(objective=config.objective)
    order = partial(order_of, config)
    return read_workload(config.data, processor, config.objective, order_of=order, progress=progress)


def _are_here(sources: Sequence[DataSource]) -> bool:
    return bool(sources) and all(is_shards(source.path) or Path(source.path).is_file() for source in sources)
