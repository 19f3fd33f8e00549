"""FSDP2, by torch's own ``fully_shard``: weights, gradients and optimizer state are divided over the ranks.

Not by way of accelerate, which applies FSDP to process groups of GPUs only and otherwise trains with DDP without a
word.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from phi3v.train.engines.base import base_of, wrong_engine
from phi3v.train.engines.sharded import ShardedEngine

if TYPE_CHECKING:
    from phi3v.train.loop import Phi3VTrainer


class FsdpEngine(ShardedEngine):
    """Every layer is gathered when it runs; what is not in a layer stays gathered from forward to backward."""

    def shard(self, model: Any) -> None:
        if isinstance(model, FSDPModule):
            return
        # Layers run in autocast's dtype, so they can be sent in it; not on the CPU, whose layer norm takes no half-
        # precision weights with float32 input. The rest may be needed in float32.
        dtype = self.compute.autocast_dtype if self.compute.device.type == "cuda" else None
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32, cast_forward_inputs=False
        )
        for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, reshard_after_forward=False)
        base_of(model).model.meets_in_vision = True

    def adopt(self, trainer: Phi3VTrainer) -> None:
        accelerator = trainer.accelerator
        clip = accelerator.clip_grad_norm_

        def clip_grad_norm(*args: Any, **kwargs: Any) -> Any:
            norm = clip(*args, **kwargs)
            return norm.full_tensor() if isinstance(norm, DTensor) else norm

        # Mixed precision only: no DDP around what is divided already.
        accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
        accelerator.clip_grad_norm_ = clip_grad_norm

    def check(self, trainer: Phi3VTrainer) -> None:
        model: Any = trainer.model_wrapped
        if not isinstance(model, FSDPModule):
            raise wrong_engine("fsdp2", type(model).__name__)
        parameters: Iterator[tuple[str, Any]] = trainer.model.named_parameters()
        whole = [name for name, parameter in parameters if not isinstance(parameter, DTensor)]
        if whole:
            raise wrong_engine("fsdp2", f"a model with {len(whole)} undivided tensors, first {whole[0]}")

    def whole_tensors(self, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in model.named_parameters():
            yield name, whole_tensor(parameter.detach())

    def put_whole(self, parameter: Any, value: torch.Tensor) -> None:
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))

    def whole_moments(self, trainer: Phi3VTrainer) -> Iterator[tuple[str, torch.Tensor]]:
        state = raw_optimizer(trainer).state
        for name, parameter in trainer.model.named_parameters():
            for key in MOMENTS if parameter in state else ():
                yield f"{key}/{name}", whole_tensor(state[parameter][key])

    def steps_taken(self, trainer: Phi3VTrainer) -> float:
        return max((float(entry["step"]) for entry in raw_optimizer(trainer).state.values()), default=0.0)

    def put_moments(self, trainer: Phi3VTrainer, steps: float, moments: Iterator[tuple[str, torch.Tensor]]) -> None:
        state = raw_optimizer(trainer).state
        own: dict[str, Any] = dict(trainer.model.named_parameters())
        for key_and_name, value in moments:
            key, name = key_and_name.split("/", 1)
            parameter = own[name]
            entry = state[parameter]
            entry["step"] = torch.tensor(steps)
            entry[key] = distribute_tensor(value, parameter.device_mesh, parameter.placements)


# AdamW's two moments of each parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    """A divided tensor, gathered; another as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def raw_optimizer(trainer: Phi3VTrainer) -> torch.optim.Optimizer:
    """The optimizer below the library's wrapper."""
    optimizer: Any = trainer.optimizer
    return getattr(optimizer, "optimizer", optimizer)
