"""How a run computes where that should change its speed and memory alone: the one list, with the plain way of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from peft import PeftModel

from phi3v.config import Checkpointing, RunConfig, TrainingConfig
from phi3v.model.attention import BACKENDS
from phi3v.model.loss import LossKernel
from phi3v.train.compute.activations import Policy
from phi3v.train.compute.checkpointing import apply_checkpointing
from phi3v.train.compute.float8 import apply_float8
from phi3v.train.compute.kernels import apply_kernels


@dataclass(frozen=True)
class FastPaths:
    """What is chosen; every field's plain value is the last of its `alternatives`.

    Attributes:
        attention: as transformers knows it; the model is loaded with it.
        checkpointing: ``auto`` until the memory is known, which then may choose what is looked at of ``recomputing``.
        kernels: ``liger`` brings its own loss.
    """

    attention: str
    loss: LossKernel = "chunked"
    kernels: str = "torch"
    checkpointing: Checkpointing = "auto"
    compile: bool = False
    fp8: bool = False
    recomputing: tuple[Policy, ...] = ()

    @classmethod
    def of(cls, config: RunConfig, attention: str) -> FastPaths:
        """Those that a run asks for, with the attention that was chosen for it."""
        training = config.training
        recomputed, recomputing = training.activation_checkpointing, list[Policy]()
        if recomputed == "auto":
            recomputing += [] if training.compile else ["offload"]
            recomputing += [] if training.lean else ["selective"]
        elif recomputed in ("selective", "offload"):
            recomputing = [recomputed]
        how = (training.kernels, recomputed, training.compile, training.fp8)
        return cls(attention, "chunked", *how, recomputing=tuple(recomputing))

    def alternatives(self) -> dict[str, list[Any]]:
        """By the name of each field that is not plain already, what may be used, the plain value last.

        In the order in which they are added to each other: what rounds most comes last. The first that is right is
        used; of ``checkpointing``, each may be.
        """
        exact = ["packed_segments", "packed_mask"] if self.attention in BACKENDS else ["sdpa", "eager"]
        if self.attention in exact:
            exact = exact[exact.index(self.attention) + 1 :]
        values: dict[str, list[Any]] = {
            "attention": [self.attention, *exact],
            "loss": [self.loss, "whole"],
            "kernels": [self.kernels, "torch"],
            "checkpointing": [*self.recomputing, "full"],
            "compile": [self.compile, False],
            "fp8": [self.fp8, False],
        }
        return {name: each for name, each in values.items() if each[0] != each[-1]}

    def plain(self) -> FastPaths:
        """The plain way to compute the same."""
        values: dict[str, Any] = {name: values[-1] for name, values in self.alternatives().items()}
        return replace(self, **values)


def apply_fast_paths(model: Any, paths: FastPaths) -> None:
    """Have a loaded model compute so; it has its attention already. Weights and names stay.

    On the CPU, which has no products of float8, these are emulated.
    """
    apply_checkpointing(model, "none" if paths.checkpointing == "auto" else paths.checkpointing)
    if paths.fp8:
        apply_float8(model, emulate=next(model.parameters()).device.type == "cpu")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.loss_kernel = paths.loss
    training = TrainingConfig(compile=paths.compile)
    training.kernels = "liger" if paths.kernels == "liger" else "torch"
    apply_kernels(model, training)
