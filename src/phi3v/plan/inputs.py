"""What the planner plans: one set-up of method, engine and the settings that memory and time depend on.

Both sides of the mapping, from a configuration and back to its keys, are in this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from phi3v.config import MethodConfig, Packing, RunConfig
from phi3v.errors import UserError
from phi3v.plan.hardware import Machine

MethodName = Literal["full", "frozen-vision", "lora", "qlora"]
Engine = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
Checkpointing = Literal["none", "vision", "selective", "full"]
Optimizer = Literal["adamw", "adamw_8bit", "adamw_bf16"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]

METHODS: tuple[MethodName, ...] = get_args(MethodName)
ENGINES: tuple[Engine, ...] = get_args(Engine)


@dataclass(frozen=True)
class TrainSetup:
    """One way to train.

    Attributes:
        gpus: data-parallel ranks.
        offload_optimizer: the optimizer's state lies in the host's memory (ZeRO).
        pack_tokens: tokens of a packed row at most, which a rank computes at a time.
        micro_batch: samples that a rank computes at a time, where they are not packed.
        accumulates: gradients are kept over several micro-batches.
        num_crops: crops of a page at most.
        fused_optimizer: no temporary copy of the second moments in a step (the library's plain AdamW makes one on a
            GPU).
        float8: the decoder multiplies in float8; what it keeps is as large as without.
    """

    method: MethodConfig = field(default_factory=MethodConfig)
    engine: Engine = "ddp"
    gpus: int = 1
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    attention: Attention = "sdpa"
    checkpointing: Checkpointing = "full"
    optimizer: Optimizer = "adamw"
    offload_optimizer: bool = False
    packing: Packing = "none"
    pack_tokens: int = 8192
    micro_batch: int = 1
    accumulates: bool = True
    num_crops: int = 16
    fused_optimizer: bool = False
    float8: bool = False

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number that products are computed in."""
        return 4 if self.precision == "fp32" else 2

    @property
    def is_adapter(self) -> bool:
        return self.method.name in ("lora", "qlora")

    @property
    def is_sharded(self) -> bool:
        """Several ranks divide something of the model."""
        return self.engine != "ddp" and self.gpus > 1

    def with_method(self, name: MethodName) -> TrainSetup:
        """The same with another method; the adapters' settings stay."""
        return replace(self, method=replace(self.method, name=name))


def setup_from_config(config: RunConfig, machine: Machine, num_crops: int) -> TrainSetup:
    """What `phi3v train` would do with a configuration on a machine.

    Raises:
        UserError: the machine cannot compute in the precision, or lacks the attention, that is asked for; or the batch
            cannot be split over its devices.
    """
    training = config.training
    return TrainSetup(
        method=config.method,
        engine=_engine(config, machine),
        offload_optimizer=config.distributed.offload_optimizer,
        gpus=machine.gpus,
        precision=_precision(config, machine),
        attention=_attention(config, machine),
        # `auto` recomputes all where memory is short.
        checkpointing="full" if training.activation_checkpointing == "auto" else training.activation_checkpointing,
        optimizer=training.optimizer,
        packing=config.data.packing,
        pack_tokens=config.data.pack_tokens,
        micro_batch=training.micro_batch_size,
        accumulates=config.accumulation_steps(machine.gpus) > 1,
        num_crops=num_crops,
        fused_optimizer=machine.gpu.is_cpu,  # there the plain one works tensor by tensor
        float8=_float8(config, machine),
    )


def _engine(config: RunConfig, machine: Machine) -> Engine:
    """As `phi3v train` chooses it."""
    wanted = config.distributed.engine
    if wanted != "auto" and machine.gpus > 1:
        return wanted
    return usual_engine(config.method.name, machine.gpus) if config.training.optimizer == "adamw" else "ddp"


def usual_engine(method: MethodName, gpus: int) -> Engine:
    """That of the public recipe: ZeRO-2 where whole weights are trained on several GPUs."""
    return "zero2" if method in ("full", "frozen-vision") and gpus > 1 else "ddp"


def _precision(config: RunConfig, machine: Machine) -> Literal["bf16", "fp16", "fp32"]:
    wanted, gpu = config.training.precision, machine.gpu
    if wanted == "auto":
        return gpu.precision  # type: ignore[return-value]
    if wanted == "bf16" and not gpu.bf16 and not gpu.is_cpu:
        raise UserError(f"{gpu.name} has no bf16", where="training.precision", hint="use fp16, or leave it at auto")
    if wanted == "fp16" and gpu.is_cpu:
        raise UserError("fp16 training needs a GPU", where="training.precision", hint="use fp32, or leave it at auto")
    return wanted


def _float8(config: RunConfig, machine: Machine) -> bool:
    if config.training.fp8 and not machine.gpu.float8:
        raise UserError(f"{machine.gpu.name} has no products of float8", where="training.fp8", hint="set it to false")
    return config.training.fp8


def _attention(config: RunConfig, machine: Machine) -> Attention:
    wanted = config.model.attention
    if wanted == "flash_attention_2" and not machine.gpu.flash_attention:
        raise UserError(
            f"flash attention has no kernels for {machine.gpu.name}",
            where="model.attention",
            hint="leave it at auto, or use sdpa",
        )
    if wanted == "auto":
        return "flash_attention_2" if machine.gpu.flash_attention else "sdpa"
    if wanted == "eager" or wanted == "sdpa":
        return wanted
    return "flash_attention_2"  # nor do flex and varlen, which are for packed rows, keep a matrix of all pairs


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
    }
