"""What a plan says of a machine: every method on every engine, the changes that make one fit, the recommendation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from phi3v.config import MethodName, RunConfig
from phi3v.errors import UserError
from phi3v.plan.hardware import GIB, Machine
from phi3v.plan.inputs import Engine, Optimizer, TrainSetup, engine_of, recipe_changes
from phi3v.plan.memory import Memory
from phi3v.plan.published import PublishedRow
from phi3v.plan.rows import PackedRows
from phi3v.plan.throughput import Speed
from phi3v.plan.workload import Workload
from phi3v.train.compute.activations import RECOMPUTES_ALL

# Settings of a setup that ``--json`` shows under their own names.
_SETUP_KEYS = (
    "engine",
    "precision",
    "attention",
    "checkpointing",
    "optimizer",
    "lean",
    "offload_optimizer",
    "replicas",
    "packing",
    "num_crops",
)


@dataclass(frozen=True)
class Option:
    """One method on one engine.

    Attributes:
        setup: as planned, with the changes that make it fit.
        changes: what differs from the recipe, in words; empty if it fits as it is.
        fits: with those changes.
        reason: why, in a sentence.
        rows: of a packed set-up.
        refusal: why `phi3v train` would not begin, whatever the memory.
    """

    setup: TrainSetup
    fits: bool
    changes: tuple[str, ...]
    reason: str
    memory: Memory | None
    speed: Speed | None
    rows: PackedRows | None = None
    refusal: UserError | None = None

    @property
    def verdict(self) -> str:
        """``fits``, ``fits with …`` or ``does not fit``."""
        if not self.fits:
            return "does not fit"
        return f"fits with {', '.join(self.changes)}" if self.changes else "fits"

    def to_json_dict(self) -> dict[str, Any]:
        setup, rows, memory, speed = self.setup, self.rows, self.memory, self.speed
        return {
            "method": setup.method.name,
            "verdict": self.verdict,
            "fits": self.fits,
            "changes": list(self.changes),
            "reason": self.reason,
            **{name: getattr(setup, name) for name in _SETUP_KEYS},
            "pack_tokens": setup.pack_tokens if setup.packing != "none" else None,
            "micro_batch_size": setup.micro_batch,
            "rows_a_step": round(rows.row_count, 2) if rows else None,
            "rows_filled": round(rows.filled, 3) if rows else None,
            "peak_gib": round(memory.peak / GIB, 2) if memory else None,
            "peak_at": memory.moment if memory else None,
            "memory_bytes": memory.parts if memory else None,
            "pinned_host_bytes": memory.pinned if memory else None,
            "samples_per_second": round(speed.samples_per_second, 3) if speed else None,
            "speed_basis": speed.basis if speed else None,
        }


@dataclass(frozen=True)
class Plan:
    """Everything that `phi3v plan` says about one machine.

    Attributes:
        own: the recipe as it is, on the engine that `phi3v train` would take.
        options: every method on every engine, with what else of the recipe has to change for it.
    """

    machine: Machine
    config: RunConfig
    model_basis: str
    workload: Workload
    num_crops: int
    crops_reason: str
    own: Option
    options: tuple[Option, ...]
    recommended: Option | None
    reason: str
    steps: int
    samples: int
    published: dict[str, PublishedRow]

    @property
    def shown_crops(self) -> list[int]:
        """Values of ``num_crops`` that are compared."""
        return sorted({self.num_crops, 1, 4, 9, 16})

    @property
    def hours(self) -> float | None:
        """Of training, for what is recommended, the reference's pass included."""
        if self.recommended is None or not self.recommended.speed or not self.recommended.speed.samples_per_second:
            return None
        return self.samples / self.recommended.speed.samples_per_second / 3600 + self.reference_hours

    @property
    def reference_hours(self) -> float:
        """Of the forward pass over all records before training, where the objective needs a reference."""
        speed = self.recommended.speed if self.recommended is not None else None
        if not self.config.objective.needs_reference or speed is None or not speed.samples_per_second:
            return 0.0
        return len(self.workload) * speed.forward_share / speed.samples_per_second / 3600

    def best(self, method: MethodName) -> Option:
        """The option of a method that needs the fewest changes; of several, that on the engine of `phi3v train`."""
        own = [option for option in self.options if option.setup.method.name == method]
        usual = engine_of(self.config, self.machine, method)
        return min(own, key=lambda option: (not option.fits, len(option.changes), option.setup.engine != usual))

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine.label,
            "memory_gib": round(self.machine.gpu.memory_bytes / GIB, 1),
            "hardware_source": self.machine.gpu.source,
            "quota": self.machine.quota,
            "model": self.model_basis,
            "data": self.workload.basis,
            "records": len(self.workload),
            "tokens": [self.workload.at(crops).summary() for crops in self.shown_crops],
            "recommended_num_crops": self.num_crops,
            "num_crops_reason": self.crops_reason,
            "shared_image_factor": round(self.workload.shared_image_factor, 2),
            "steps": self.steps,
            "hours": round(self.hours, 3) if self.hours is not None else None,
            "reference_hours": round(self.reference_hours, 3),
            "objective": self.config.objective.name,
            "options": [option.to_json_dict() for option in self.options],
            "recommended": self.recommended.to_json_dict() if self.recommended else None,
            "reason": self.reason,
            "published": {
                name: {"images_per_second": row.images_per_second, "gb": row.gigabytes}
                for name, row in self.published.items()
            },
        }


def gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.0f} MiB"


def refused(setup: TrainSetup, why: UserError) -> Option:
    return Option(setup, False, (), f"{why.where}: {why.what}" if why.where else why.what, None, None, refusal=why)


def on_engine(setup: TrainSetup, engine: Engine) -> TrainSetup:
    """The same on another engine: only ZeRO keeps the optimizer's state on the host, and only fsdp2 has replicas."""
    offload_optimizer = setup.offload_optimizer and engine.startswith("zero")
    replicas = setup.replicas if engine == "fsdp2" else 1
    return replace(setup, engine=engine, offload_optimizer=offload_optimizer, replicas=replicas)


def relaxations(setup: TrainSetup, *, on_host: bool) -> Iterator[tuple[TrainSetup, tuple[str, ...]]]:
    """A set-up as it is, then with ever more changes that save memory.

    What costs only time comes before what costs detail. Not every one of them can run.

    Args:
        on_host: it is computed in the host's memory, so that nothing can be moved there.
    """
    yield setup, ()
    current = setup
    words: tuple[str, ...] = ()
    if setup.micro_batch > 1 and not setup.lean:  # whose micro-batch is the step
        current, words = replace(current, micro_batch=1, accumulates=True), (*words, "micro_batch_size 1")
        yield current, words
    if setup.packing != "none" and setup.pack_tokens > 4096:
        current, words = replace(current, pack_tokens=4096), (*words, "pack_tokens 4096")
        yield current, words
    if setup.checkpointing not in RECOMPUTES_ALL:
        current, words = replace(current, checkpointing="full"), (*words, "everything recomputed")
        yield current, words
    ways = [(current, words)]
    if setup.checkpointing != "offload" and not on_host:
        ways.append((replace(current, checkpointing="offload"), (*words, "activation_checkpointing offload")))
        yield ways[-1]

    def also(*more: str, **changes: Any) -> Iterator[tuple[TrainSetup, tuple[str, ...]]]:
        return ((replace(changed, **changes), (*said, *more)) for changed, said in ways)

    fewer = [crops for crops in (9, 4) if crops < setup.num_crops]
    for crops in fewer:
        yield from also(f"num_crops {crops}", num_crops=crops)
    if not setup.offload_optimizer:
        yield from also("offload_optimizer", offload_optimizer=True)
    smaller: tuple[Optimizer, ...] = ("adamw_8bit", "adamw_bf16")
    for optimizer in smaller:
        if optimizer != setup.optimizer:
            yield from also(optimizer, optimizer=optimizer)
    for crops in fewer:
        yield from also("adamw_bf16", f"num_crops {crops}", optimizer="adamw_bf16", num_crops=crops)


def planned_recipe(plan: Plan) -> str:
    """The recipe as recommended, YAML with the reason at its head.

    Raises:
        UserError: nothing fits.
    """
    if plan.recommended is None:
        raise UserError(plan.reason, where="--write")
    config = plan.config.with_keys(recipe_changes(plan.recommended.setup))
    lines = [
        f"Planned for {plan.machine.label}: {plan.reason}.",
        f"num_crops: {plan.crops_reason}.",
        plan.machine.quota,
    ]
    head = "".join(f"# {line}\n" for line in lines if line)
    return head + config.to_yaml()
