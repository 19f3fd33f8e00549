"""The plan of a run: what fits, what would make the rest fit, how long it takes, and one recommendation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from phi3v.config import RunConfig
from phi3v.errors import UserError
from phi3v.plan.hardware import GIB, Machine
from phi3v.plan.inputs import (
    ENGINES,
    METHODS,
    OFFERED,
    Engine,
    MethodName,
    Optimizer,
    TrainSetup,
    recipe_changes,
    setup_from_config,
)
from phi3v.plan.memory import Memory, predict_memory
from phi3v.plan.parameters import Parameters, count_model, meta_model
from phi3v.plan.published import PublishedRow, assumed_utilisation, published_row
from phi3v.plan.shape import ModelShape, planned_config
from phi3v.plan.throughput import CPU_UTILISATION, SampleWork, Speed, predict_speed, training_flops
from phi3v.plan.workload import Workload, assumed_workload, read_workload
from phi3v.processing.processor import Phi3VProcessor

# Where the recipe's method does not fit: the order of Microsoft's published DocVQA scores (83.65, 82.46, 81.85, 79.19).
BY_SCORE: tuple[MethodName, ...] = ("full", "lora", "qlora", "frozen-vision")
MARGIN = 0.95  # of a device's memory that a plan may fill
DEFAULT_CROPS = 16


@dataclass(frozen=True)
class Option:
    """One method on one engine.

    Attributes:
        setup: as planned, with the changes that make it fit.
        changes: what differs from the recipe, in words; empty if it fits as it is.
        fits: with those changes.
        reason: why, in a sentence.
        offered: this version's `phi3v train` can run it.
    """

    setup: TrainSetup
    fits: bool
    changes: tuple[str, ...]
    reason: str
    memory: Memory | None
    speed: Speed | None
    offered: bool

    @property
    def verdict(self) -> str:
        """``fits``, ``fits with …`` or ``does not fit``."""
        if not self.fits:
            return "does not fit"
        return f"fits with {', '.join(self.changes)}" if self.changes else "fits"

    def to_json_dict(self) -> dict[str, Any]:
        setup = self.setup
        return {
            "method": setup.method.name,
            "engine": setup.engine,
            "verdict": self.verdict,
            "fits": self.fits,
            "changes": list(self.changes),
            "reason": self.reason,
            "offered": self.offered,
            "precision": setup.precision,
            "attention": setup.attention,
            "checkpointing": setup.checkpointing,
            "optimizer": setup.optimizer,
            "micro_batch_size": setup.micro_batch,
            "num_crops": setup.num_crops,
            "peak_gib": round(self.memory.peak / GIB, 2) if self.memory else None,
            "peak_at": self.memory.moment if self.memory else None,
            "memory_bytes": self.memory.parts if self.memory else None,
            "samples_per_second": round(self.speed.samples_per_second, 3) if self.speed else None,
            "speed_basis": self.speed.basis if self.speed else None,
        }


@dataclass(frozen=True)
class Plan:
    """Everything that `phi3v plan` says about one machine."""

    machine: Machine
    config: RunConfig
    model_basis: str
    workload: Workload
    num_crops: int
    crops_reason: str
    packing_length: int
    options: tuple[Option, ...]
    recommended: Option | None
    reason: str
    steps: int
    samples: int
    published: dict[str, PublishedRow]

    @property
    def hours(self) -> float | None:
        """Of training, for what is recommended."""
        if self.recommended is None or not self.recommended.speed or not self.recommended.speed.samples_per_second:
            return None
        return self.samples / self.recommended.speed.samples_per_second / 3600

    def best(self, method: MethodName) -> Option:
        """The option of a method that needs the fewest changes, what is offered first."""
        own = [option for option in self.options if option.setup.method.name == method]
        return min(own, key=lambda option: (not option.fits, not option.offered, len(option.changes)))

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine.label,
            "memory_gib": round(self.machine.gpu.memory_bytes / GIB, 1),
            "hardware_source": self.machine.gpu.source,
            "quota": self.machine.quota,
            "model": self.model_basis,
            "data": self.workload.basis,
            "records": len(self.workload),
            "tokens": [self.workload.at(crops).summary() for crops in sorted({self.num_crops, *_SHOWN_CROPS})],
            "recommended_num_crops": self.num_crops,
            "num_crops_reason": self.crops_reason,
            "packing_length": self.packing_length,
            "shared_image_factor": round(self.workload.shared_image_factor, 2),
            "steps": self.steps,
            "hours": round(self.hours, 3) if self.hours is not None else None,
            "options": [option.to_json_dict() for option in self.options],
            "recommended": self.recommended.to_json_dict() if self.recommended else None,
            "reason": self.reason,
            "published": {
                name: {"images_per_second": row.images_per_second, "gb": row.gigabytes}
                for name, row in self.published.items()
            },
        }


_SHOWN_CROPS = (1, 4, 9, 16)


class Planner:
    """Plans for one recipe; the dataset is read and the model counted once, whatever the number of machines."""

    def __init__(self, config: RunConfig, *, progress: bool = True) -> None:
        self.config = config
        self.model_config, self.model_basis = planned_config(config.model.path)
        self.shape = ModelShape.of(self.model_config)
        processor = _processor(config)
        self.workload = _workload(config, processor, progress=progress)
        advised = config.model.num_crops or (processor.image_processor.num_crops if processor else DEFAULT_CROPS)
        self.num_crops, self.crops_reason = self.workload.recommended_crops(advised)
        if config.model.num_crops is not None:
            self.crops_reason = f"the recipe says so; recommended are {self.num_crops}: {self.crops_reason}"
            self.num_crops = config.model.num_crops
        self._models: dict[tuple[str, str], nn.Module] = {}
        self._counts: dict[tuple[str, str], Parameters] = {}

    def plan(self, machine: Machine) -> Plan:
        """The plan for ``machine``.

        Raises:
            UserError: the machine lacks what the recipe asks for by name, or the batch cannot be split over it.
        """
        base = setup_from_config(_splittable(self.config, machine), machine, self.num_crops)
        engines: Sequence[Engine] = ENGINES if machine.gpus > 1 else ("ddp",)
        options = tuple(
            self.option(replace(base.with_method(method), engine=engine), machine)
            for method in METHODS
            for engine in engines
        )
        recommended, reason = self._recommend(options, machine)
        records = len(self.workload)
        samples = math.ceil(records * self.config.training.epochs)
        steps = self.config.training.max_steps or math.ceil(samples / self.config.training.batch_size)
        if self.config.training.max_steps:
            samples = steps * self.config.training.batch_size
        return Plan(
            machine=machine,
            config=self.config,
            model_basis=self.model_basis,
            workload=self.workload,
            num_crops=self.num_crops,
            crops_reason=self.crops_reason,
            packing_length=self.workload.packing_length(self.num_crops),
            options=options,
            recommended=recommended,
            reason=reason,
            steps=steps,
            samples=samples,
            published={m: row for m in METHODS if (row := published_row(machine, m)) is not None},
        )

    def option(self, setup: TrainSetup, machine: Machine) -> Option:
        """Whether a set-up fits, and if not, the fewest changes that make it fit."""
        if obstacle := _obstacle(setup, machine):
            return Option(setup, False, (), obstacle, None, None, setup.is_offered)
        limit = int(machine.gpu.memory_bytes * MARGIN)
        first = self.memory(setup, machine)
        best, best_memory = setup, first
        changes: tuple[str, ...] = ()
        for changed, words in _relaxations(setup):
            memory = self.memory(changed, machine)
            if memory.peak < best_memory.peak or not words:
                best, best_memory, changes = changed, memory, words
            if memory.peak <= limit:
                reason = f"{_gib(memory.peak)} of {_gib(machine.gpu.memory_bytes)} ({memory.moment})"
                if words:
                    reason = f"{reason}; as the recipe is, {_gib(first.peak)}"
                return Option(changed, True, words, reason, memory, self.speed(changed, machine), changed.is_offered)
        biggest = max(best_memory.parts, key=lambda name: best_memory.parts[name])
        tried = ", ".join(changes) or "one sample"
        reason = (
            f"{_gib(best_memory.peak)} of {_gib(machine.gpu.memory_bytes)} even with {tried}"
            f"; {_gib(best_memory.parts[biggest])} of it {biggest}"
        )
        return Option(best, False, (), reason, best_memory, None, best.is_offered)

    def memory(self, setup: TrainSetup, machine: Machine) -> Memory:
        """The predicted peak of a rank."""
        batch = self.workload.largest(setup.num_crops, setup.micro_batch)
        return predict_memory(self.shape, self.counts(setup), setup, batch, cpu=machine.gpu.is_cpu)

    def speed(self, setup: TrainSetup, machine: Machine) -> Speed:
        """The predicted speed of all ranks."""
        choice = self.workload.at(setup.num_crops)
        tokens = choice.tokens.astype(float)
        work = SampleWork(
            tokens=float(tokens.mean()),
            tokens_squared=float((tokens**2).mean()),
            image_tokens=float(choice.image_tokens.mean()),
            crops=float(choice.crops.mean()),
            answer_tokens=float(self.workload.answer_tokens.mean()),
        )
        flops = training_flops(self.shape, setup, work, tower_trained=self.counts(setup).tower_trained)
        if machine.gpu.is_cpu:
            basis = f"{CPU_UTILISATION:.0%} of the nominal rate, as measured with the tiny model"
            return predict_speed(flops, machine, CPU_UTILISATION, basis)
        utilisation, basis = assumed_utilisation(machine, setup.method.name)
        return predict_speed(flops, machine, utilisation, basis)

    def counts(self, setup: TrainSetup) -> Parameters:
        """Parameters of the set-up's method."""
        key = (setup.method.name, setup.precision)
        if key not in self._counts:
            self._counts[key] = self._count(*key)
        return self._counts[key]

    def _count(self, name: MethodName, precision: str) -> Parameters:
        method = replace(self.config.method, name=name)
        adapters = name in ("lora", "qlora")
        key = ("lora" if adapters else name, precision)
        if key not in self._models:
            self._models[key] = meta_model(self.model_config, method, precision)
        return count_model(self._models[key], method)

    def _recommend(self, options: Sequence[Option], machine: Machine) -> tuple[Option | None, str]:
        wanted = self.config.method.name
        runnable = [option for option in options if option.fits and option.offered]
        for name in (wanted, *(method for method in BY_SCORE if method != wanted)):
            own = [option for option in runnable if option.setup.method.name == name]
            if not own:
                continue
            chosen = self._faster(min(own, key=lambda option: len(option.changes)), machine)
            if name == wanted:
                with_what = f" with {', '.join(chosen.changes)}" if chosen.changes else " as it is"
                return chosen, f"{name}, the recipe's method, fits {machine.label}{with_what}"
            return chosen, (
                f"{name}: {self._why_not(options, machine)}; of what fits, {name} has the best published score"
            )
        return None, f"nothing fits {machine.label}: take a larger GPU, or a smaller num_crops"

    def _why_not(self, options: Sequence[Option], machine: Machine) -> str:
        """Why the recipe's own method cannot run here, and what a later version would need for it."""
        name = self.config.method.name
        own = [option for option in options if option.setup.method.name == name]
        if not any(option.fits for option in own):
            return f"{name} does not fit {machine.label} ({own[0].reason})"
        first = next(option for option in own if option.setup.engine == OFFERED.engines[0])
        as_is = self.memory(replace(first.setup, optimizer=OFFERED.optimizers[0], num_crops=self.num_crops), machine)
        later = min((o for o in own if o.fits), key=lambda o: (len(o.changes), o.setup.engine != "zero2"))
        needs = " and ".join([later.setup.engine, *later.changes] if machine.gpus > 1 else later.changes)
        return (
            f"{name} needs {_gib(as_is.peak)} of {_gib(machine.gpu.memory_bytes)} with what this version has "
            f"(it would fit with {needs})"
        )

    def _faster(self, option: Option, machine: Machine) -> Option:
        """The same with the rest of the memory put to use: no recomputing where that fits, larger micro-batches."""
        limit = int(machine.gpu.memory_bytes * MARGIN)
        setup = option.setup
        share = self.config.training.batch_size // machine.gpus
        if setup.checkpointing == "full" and not option.changes:
            spared = replace(setup, checkpointing="none")
            if spared.is_offered and self.memory(spared, machine).peak <= limit:
                setup = spared
        best = setup
        while best.micro_batch * 2 <= 8 and share and share % (best.micro_batch * 2) == 0:
            larger = replace(best, micro_batch=best.micro_batch * 2, accumulates=share > best.micro_batch * 2)
            if self.memory(larger, machine).peak > limit:
                break
            best = larger
        if best == option.setup:
            return option
        memory = self.memory(best, machine)
        reason = f"{_gib(memory.peak)} of {_gib(machine.gpu.memory_bytes)} ({memory.moment})"
        return replace(option, setup=best, memory=memory, speed=self.speed(best, machine), reason=reason)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.0f} MiB"


def _obstacle(setup: TrainSetup, machine: Machine) -> str | None:
    """What rules a set-up out, whatever its memory."""
    if setup.method.name == "qlora":
        if not machine.gpu.four_bit:
            return f"4-bit weights need Turing or newer, {machine.gpu.name} is older"
        if setup.engine == "zero3":
            return "4-bit weights are not divided by zero3; fsdp2 does that, and ddp needs little anyway"
    return None


def _relaxations(setup: TrainSetup) -> Iterator[tuple[TrainSetup, tuple[str, ...]]]:
    """A set-up as it is, then with ever more changes that save memory.

    What costs only time comes before what costs detail, and what this version offers before what it does not.
    """
    yield setup, ()
    current = setup
    words: tuple[str, ...] = ()
    if setup.micro_batch > 1:
        current, words = replace(current, micro_batch=1, accumulates=True), (*words, "micro_batch_size 1")
        yield current, words
    if setup.checkpointing != "full":
        current, words = replace(current, checkpointing="full"), (*words, "everything recomputed")
        yield current, words
    fewer = [crops for crops in (9, 4) if crops < setup.num_crops]
    for crops in fewer:
        yield replace(current, num_crops=crops), (*words, f"num_crops {crops}")
    # Weights in bf16 want a card that computes in it.
    smaller: tuple[Optimizer, ...] = ("adamw_8bit", "adamw_bf16") if setup.precision == "bf16" else ("adamw_8bit",)
    for optimizer in smaller:
        if optimizer != setup.optimizer:
            yield replace(current, optimizer=optimizer), (*words, optimizer)
    for crops in fewer if "adamw_bf16" in smaller else ():
        yield replace(current, optimizer="adamw_bf16", num_crops=crops), (*words, "adamw_bf16", f"num_crops {crops}")


def _splittable(config: RunConfig, machine: Machine) -> RunConfig:
    """The configuration with a micro-batch that the machine's ranks can share, where the recipe's cannot be."""
    batch = config.training.batch_size
    if batch % machine.gpus:
        raise UserError(
            f"{batch} samples a step cannot be split over {machine.gpus} GPUs",
            where="training.batch_size",
            hint=f"use a multiple of {machine.gpus}",
        )
    adjusted = copy.deepcopy(config)
    adjusted.training.micro_batch_size = math.gcd(config.training.micro_batch_size, batch // machine.gpus)
    return adjusted


def _processor(config: RunConfig) -> Phi3VProcessor | None:
    """The model's processor where it lies on the disk; a plan never downloads."""
    if not Path(config.model.path).is_dir():
        return None
    try:
        return Phi3VProcessor.from_pretrained(config.model.path, num_crops=config.model.num_crops)
    except (OSError, KeyError):
        return None


def _workload(config: RunConfig, processor: Phi3VProcessor | None, *, progress: bool) -> Workload:
    if config.data.train is None or not Path(config.data.train).is_file():
        return assumed_workload()
    return read_workload(Path(config.data.train), config.data, processor, progress=progress)


def planned_recipe(plan: Plan) -> str:
    """The recipe as recommended, YAML with the reason at its head.

    Raises:
        UserError: nothing fits.
    """
    if plan.recommended is None:
        raise UserError(plan.reason, where="--write")
    config = copy.deepcopy(plan.config)
    for key, value in recipe_changes(plan.recommended.setup).items():
        group, name = key.split(".")
        setattr(getattr(config, group), name, value)
    lines = [
        f"Planned for {plan.machine.label}: {plan.reason}.",
        f"num_crops: {plan.crops_reason}.",
        plan.machine.quota,
    ]
    head = "".join(f"# {line}\n" for line in lines if line)
    return head + config.to_yaml()
