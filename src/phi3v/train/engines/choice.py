"""Which engine a run gets and why, and what does not go together with it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from phi3v.config import RunConfig
from phi3v.errors import UserError
from phi3v.train.device import Compute

Name = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp2"]

DEEPSPEED_HINT = 'pip install "phi3v[deepspeed]"'


@dataclass(frozen=True)
class EngineChoice:
    """An engine, and the reason for it."""

    name: Name
    reason: str

    @property
    def is_zero(self) -> bool:
        return self.name.startswith("zero")

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
        return gradient + -(-(whole - gradient) // ranks)


def choose_engine(config: RunConfig, compute: Compute) -> EngineChoice:
    """The engine for this configuration on these ranks.

    Raises:
        UserError: what is asked for cannot run, with what comes nearest.
    """
    wanted = config.distributed.engine
    if compute.world_size == 1:
        if wanted not in ("auto", "ddp"):
            raise UserError(
                f"{wanted} divides a model over several processes, and there is one",
                where="distributed.engine",
                hint="start it with torchrun --nproc_per_node N, or leave the engine at auto",
            )
        choice = EngineChoice("none", "one process")
    elif wanted == "auto":
        choice = _auto(config)
    else:
        choice = EngineChoice(wanted, "as configured")
    _check(config, compute, choice)
    return choice


def _auto(config: RunConfig) -> EngineChoice:
    if config.method.name in ("lora", "qlora"):
        return EngineChoice("ddp", "adapters are small; as the public recipe")
    if _deepspeed_obstacle() is not None:
        return EngineChoice("ddp", "the public recipe takes zero2, but DeepSpeed is not installed")
    if _zero_obstacle(config, EngineChoice("zero2", "")) is not None:
        return EngineChoice("ddp", f"zero2, as the public recipe, does not go with {config.training.optimizer}")
    return EngineChoice("zero2", "as the public recipe")


def _check(config: RunConfig, compute: Compute, choice: EngineChoice) -> None:
    where = "distributed.engine"
    if config.distributed.offload_optimizer and not choice.is_zero:
        raise UserError(
            f"only zero1, zero2 and zero3 keep the optimizer's state in the host's memory, not {choice.name}",
            where="distributed.offload_optimizer",
            hint="set distributed.engine to zero2, or leave it out",
        )
    if choice.is_zero:
        if (obstacle := _deepspeed_obstacle()) is not None:
            raise UserError(f"{choice.name} needs DeepSpeed, {obstacle}", where=where, hint=DEEPSPEED_HINT)
        if (refusal := _zero_obstacle(config, choice)) is not None:
            raise refusal
    if choice.name == "fsdp2" and (refusal := _fsdp_obstacle(config, compute)) is not None:
        raise refusal
    if choice.divides_weights and config.training.feature_cache != "off":
        raise UserError(
            f"with {choice.name} all ranks run every layer together, and with cached features some skip the tower's",
            where="training.feature_cache",
            hint="set distributed.engine to zero2, or training.feature_cache to off",
        )


def _deepspeed_obstacle() -> str | None:
    return None if importlib.util.find_spec("deepspeed") is not None else "which is not installed"


def _zero_obstacle(config: RunConfig, choice: EngineChoice) -> UserError | None:
    where = "distributed.engine"
    training = config.training
    if choice.name == "zero3" and config.method.name == "qlora":
        return UserError("zero3 does not divide 4-bit weights", where=where, hint="use fsdp2, which does, or ddp")
    if training.optimizer != "adamw":
        return UserError(
            f"{choice.name} lays tensors end to end and cuts them up; the moments of {training.optimizer} could not "
            "be told apart again when they are saved",
            where="training.optimizer",
            hint="use adamw, whose state is divided over the ranks; or set distributed.engine to ddp",
        )
    if choice.name == "zero3" and training.compile:
        return UserError(
            "zero3 gathers weights in hooks that torch.compile would break up",
            where="training.compile",
            hint="set distributed.engine to zero2, or training.compile to false",
        )
    if choice.name == "zero3" and training.kernels == "liger":
        return UserError(
            "Liger's loss reads the head's weight itself, which zero3 has divided by then",
            where="training.kernels",
            hint="set distributed.engine to zero2, or training.kernels to torch",
        )
    return None


def _fsdp_obstacle(config: RunConfig, compute: Compute) -> UserError | None:
    training = config.training
    if training.optimizer != "adamw":
        return UserError(
            f"fsdp2 divides every weight over the ranks, and {training.optimizer} updates whole ones",
            where="training.optimizer",
            hint="use adamw, whose state is divided over the ranks; or set distributed.engine to ddp",
        )
    if compute.precision == "fp16":
        return UserError(
            "fsdp2 is not proven with fp16's loss scale",
            where="distributed.engine",
            hint="use zero3, or training.precision bf16 or fp32",
        )
    return None
