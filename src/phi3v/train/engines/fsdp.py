"""FSDP2, by torch's own ``fully_shard``: weights, gradients and optimizer state are divided over the ranks.

With ``distributed.replicas`` (HSDP), ranks are a grid of replicas and shards, the shards of a replica next to each
other, so that they are on one machine where it has as many: weights are gathered within a replica, gradients are summed
within it and, once a step, over the replicas.

Not by way of accelerate, which applies FSDP to process groups of GPUs only and otherwise trains with DDP without a
word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from phi3v.config import torch_dtype
from phi3v.train.engines.base import MOMENTS, base_of
from phi3v.train.engines.data_parallel import clip_gradients, step_if_finite
from phi3v.train.engines.sharded import ShardedEngine
from phi3v.train.methods.optimizers import start_moments
from phi3v.train.pieces import WEIGHTS, Piece


class FsdpEngine(ShardedEngine):
    """Every layer is gathered when it runs; what is not in a layer stays gathered from forward to backward."""

    def wrap(self) -> None:
        # Layers run in autocast's dtype, so they can be sent in it; not on the CPU, whose layer norm takes no half-
        # precision weights with float32 input. The rest may be needed in float32.
        # Needs two cards: with one nothing is divided.
        dtype = self.runtime.autocast_dtype if self.runtime.device.type == "cuda" else None
        wanted = self.config.distributed.reduce_dtype
        reduce = torch.float32 if wanted == "auto" else torch_dtype(wanted)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce, cast_forward_inputs=False)
        mesh, replicas = None, self.choice.replicas
        if replicas > 1:
            grid = (replicas, self.runtime.world_size // replicas)
            mesh = init_device_mesh(self.runtime.device.type, grid, mesh_dim_names=("replicate", "shard"))
        for layer in [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        rest = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
        fully_shard(self.model, mesh=mesh, reshard_after_forward=False, mp_policy=rest)
        base_of(self.model).model.always_runs_vision = True

    def mismatch(self) -> str | None:
        if not isinstance(self.model, FSDPModule):
            return type(self.model).__name__
        model: Any = self.model
        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if whole:
            return f"a model with {len(whole)} undivided tensors, first {whole[0]}"
        meshes = {parameter.device_mesh for parameter in model.parameters()}
        found = {mesh.size(0) if mesh.ndim > 1 else 1 for mesh in meshes}
        return f"fsdp2 with {sorted(found)} replicas" if found != {self.choice.replicas} else None

    def forward(self, inputs: Mapping[str, Any], *, last: bool) -> Any:
        if self.choice.replicas > 1:
            self.model.set_requires_all_reduce(last)
        with self.autocast():
            return self.model(**inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def grad_norm(self) -> torch.Tensor:
        return whole_tensor(clip_gradients(self.model, self.config.training.max_grad_norm))

    def step(self, norm: torch.Tensor) -> None:
        step_if_finite(self.optimizer, norm)
        self.schedule.step()
        self.optimizer.zero_grad()

    def whole_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, whole_tensor(parameter.detach())

    def whole_moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        state = self.optimizer.state
        for name, parameter in self.model.named_parameters():
            for key in MOMENTS if parameter in state else ():
                yield f"{key}/{name}", whole_tensor(state[parameter][key])

    def own_pieces(self, name: str, parameter: Any, kinds: Iterable[str]) -> Iterator[Piece]:
        # Whole rows, so one contiguous piece; none on the last ranks where there are fewer rows than ranks.
        own: Any = parameter.to_local()
        if own.numel() == 0:
            return
        [chunk] = parameter.__create_chunk_list__()
        start = chunk.offsets[0] * (parameter.numel() // parameter.shape[0])
        for kind in kinds:
            values = own if kind == WEIGHTS else self.optimizer.state[parameter][kind].to_local()
            yield Piece(f"{kind}/{name}", values.detach().view(-1), start, parameter.numel())

    def start_moments(self, steps: float) -> None:
        start_moments(self.optimizer, steps)


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    """A divided tensor, gathered; another as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value
