"""What the planner plans: one set-up of method, engine and the settings that memory and time depend on.

Both sides of the mapping, from a configuration and back to its keys, are in this file.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from phi3v.config import MethodConfig, MethodName, Packing, RunConfig
from phi3v.plan.hardware import Machine
from phi3v.train.compute.activations import AttentionKind, kind_of_attention
from phi3v.train.compute.activations import Policy as Checkpointing
from phi3v.train.device import RuntimeDevice, choose_precision
from phi3v.train.engines.choice import choose_engine
from phi3v.train.methods.loading import choose_attention

Engine = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
Optimizer = Literal["adamw", "adamw_8bit", "adamw_bf16"]

ENGINES: tuple[Engine, ...] = get_args(Engine)


@dataclass(frozen=True)
class TrainSetup:
    """One way to train.

    Attributes:
        gpus: data-parallel ranks.
        offload_optimizer: the optimizer's state lies in the host's memory (ZeRO).
        replicas: of the model that fsdp2 shards, each over an equal part of the ranks.
        reduces_bf16: gradients are summed over the ranks in bf16.
        pack_tokens: tokens of a packed row at most, which a rank computes at a time.
        micro_batch: samples that a rank computes at a time, where they are not packed.
        accumulates: gradients are kept over several micro-batches.
        num_crops: crops of a page at most.
        float8: the decoder multiplies in float8; what it keeps is as large as without.
        lean: bf16 weights, and each gradient used up as soon as it is there.
    """

    method: MethodConfig = field(default_factory=MethodConfig)
    engine: Engine = "ddp"
    gpus: int = 1
    precision: str = "bf16"
    attention: AttentionKind = "sdpa"
    checkpointing: Checkpointing = "full"
    optimizer: Optimizer = "adamw"
    offload_optimizer: bool = False
    replicas: int = 1
    reduces_bf16: bool = False
    packing: Packing = "none"
    pack_tokens: int = 8192
    micro_batch: int = 1
    accumulates: bool = True
    num_crops: int = 16
    float8: bool = False
    lean: bool = False

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number that products are computed in."""
        return 4 if self.precision == "fp32" else 2

    @property
    def keeps_bf16_weights(self) -> bool:
        return self.lean or self.optimizer == "adamw_bf16"

    @property
    def is_adapter(self) -> bool:
        return self.method.uses_adapters

    @property
    def is_sharded(self) -> bool:
        """Several ranks divide something of the model."""
        return self.engine != "ddp" and self.gpus > 1

    def with_method(self, name: MethodName) -> TrainSetup:
        """The same with another method. The adapters' settings stay but for PiSSA's start, which costs no memory and
        does not go with every method.
        """
        return replace(self, method=replace(self.method, name=name, lora=replace(self.method.lora, init="gaussian")))


def planned_runtime(config: RunConfig, machine: Machine) -> RuntimeDevice:
    """What a rank of ``machine`` would compute in.

    Raises:
        UserError: it lacks the precision that is asked for.
    """
    precision, reason = choose_precision(config.training.precision, machine.gpu)
    ranks = machine.gpus // machine.nodes
    return RuntimeDevice(torch.device(machine.gpu.type), precision, reason, 0, machine.gpus, ranks, machine.gpu)


def engine_of(config: RunConfig, machine: Machine, method: MethodName) -> Engine:
    """That `phi3v train` would take for a method; a single process has what each rank of ddp has."""
    asked = copy.copy(config)
    asked.method = copy.copy(config.method)
    asked.method.name = method
    name = choose_engine(asked, planned_runtime(config, machine)).name
    return "ddp" if name == "none" else name


def setup_from_config(config: RunConfig, machine: Machine, num_crops: int) -> TrainSetup:
    """What `phi3v train` would do with a configuration on a machine.

    Raises:
        UserError: the machine cannot compute in the precision, or lacks the attention, that is asked for.
    """
    training, runtime = config.training, planned_runtime(config, machine)
    wanted = training.activation_checkpointing
    return TrainSetup(
        method=config.method,
        engine=engine_of(config, machine, config.method.name),
        offload_optimizer=config.distributed.offload_optimizer,
        replicas=config.distributed.replicas,
        reduces_bf16=config.distributed.reduce_dtype == "bf16",
        gpus=machine.gpus,
        precision=runtime.precision,
        attention=kind_of_attention(choose_attention(config, runtime)[0]),
        # `auto` recomputes all where memory is short.
        checkpointing="full" if wanted == "auto" else wanted,
        optimizer=training.optimizer,
        packing=config.data.packing,
        pack_tokens=config.data.pack_tokens,
        micro_batch=training.micro_batch_size,
        accumulates=config.data.packing == "none" and training.batch_size > machine.gpus * training.micro_batch_size,
        num_crops=num_crops,
        float8=training.fp8,
        lean=training.lean,
    )


def recipe_changes(setup: TrainSetup) -> dict[str, Any]:
    """The configuration's keys that make `phi3v train` do what a set-up says."""
    return {
        "model.num_crops": setup.num_crops,
        "data.packing": setup.packing,
        "data.pack_tokens": setup.pack_tokens,
        "method.name": setup.method.name,
        "training.precision": setup.precision,
        "training.micro_batch_size": setup.micro_batch,
        "training.activation_checkpointing": setup.checkpointing,
        "training.optimizer": setup.optimizer,
        "distributed.engine": setup.engine if setup.gpus > 1 else "auto",
        "distributed.offload_optimizer": setup.offload_optimizer,
        "distributed.replicas": setup.replicas,
    }
