"""Which engine a run gets and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phi3v.config import RunConfig
from phi3v.train.device import RuntimeDevice

Name = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp2"]

DIVIDED_OPTIMIZER = "adamw"  # whose state the engines that divide one know how to divide


@dataclass(frozen=True)
class EngineChoice:
    """An engine, and the reason for it.

    Attributes:
        replicas: of the model, each of them divided over an equal part of the ranks.
    """

    name: Name
    reason: str
    replicas: int = 1

    @property
    def is_zero(self) -> bool:
        return self.name.startswith("zero")

    @property
    def divides_state(self) -> bool:
        """Whether no rank holds all moments."""
        return self.is_zero or self.name == "fsdp2"

    @property
    def divides_weights(self) -> bool:
        return self.name in ("zero3", "fsdp2")

    def state_bytes(self, whole: int, ranks: int) -> int:
        """Bytes that a trained parameter's gradient and moments take on a rank.

        Args:
            whole: where nothing is divided.
        """
        if self.name in ("none", "ddp"):
            return whole
        gradient = 4 if self.name == "zero1" else 0
        return gradient + -(-(whole - gradient) // (ranks // self.replicas))


def choose_engine(config: RunConfig, runtime: RuntimeDevice) -> EngineChoice:
    """The engine for this configuration on these ranks; whether it can run is for `phi3v.train.checks` to say."""
    wanted = config.distributed.engine
    if runtime.world_size == 1:
        return EngineChoice("none", "one process")
    if wanted == "auto":
        return _auto(config, runtime)
    if wanted == "fsdp2":
        return _fsdp(config.distributed.replicas, runtime)
    return EngineChoice(wanted, "as configured")


def _fsdp(replicas: int, runtime: RuntimeDevice) -> EngineChoice:
    shards, nodes = runtime.world_size // replicas, -(-runtime.world_size // runtime.node_ranks)
    reason = "as configured"
    if replicas > 1:
        reason += f"; {replicas} replicas, each sharded over {shards} rank{'s' * (shards > 1)}"
    if nodes > 1 and runtime.node_ranks % max(1, shards):
        reason += "; every layer is gathered over the network between machines"
        if runtime.world_size % nodes == 0:
            reason += f", which distributed.replicas {nodes} would keep within one if a copy fits"
    return EngineChoice("fsdp2", reason, replicas)


def _auto(config: RunConfig, runtime: RuntimeDevice) -> EngineChoice:
    if config.method.uses_adapters:
        return EngineChoice("ddp", "adapters are small; as the public recipe")
    if not runtime.gpu.has("deepspeed"):
        return EngineChoice("ddp", "the public recipe takes zero2, but DeepSpeed is not installed")
    if config.training.optimizer != DIVIDED_OPTIMIZER:
        return EngineChoice("ddp", f"zero2, as the public recipe, does not go with {config.training.optimizer}")
    return EngineChoice("zero2", "as the public recipe")
