"""What the rest of ``train/`` knows of the way several processes train one model.

`Engine` itself is a single process or DDP, where every rank holds the whole model; `sharded.ShardedEngine` is the
other kind. Names of tensors are always those of the unwrapped model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from torch.nn.parallel import DistributedDataParallel

from phi3v.config import RunConfig
from phi3v.train.device import Compute
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.saving import in_stored_dtype, round_to_stored_dtype

if TYPE_CHECKING:
    from phi3v.train.trainer import Phi3VTrainer


class WrongEngineError(RuntimeError):
    """Another engine runs than the one that was chosen."""


class Engine:
    """A single process, or DDP.

    Args:
        model: as loaded, not wrapped yet.
    """

    # Whether all ranks have to run the same number of rows a step, because they meet in each of them.
    meets_in_every_row = False

    def __init__(self, model: Any, choice: EngineChoice, config: RunConfig, compute: Compute) -> None:
        self.choice = choice
        self.config = config
        self.compute = compute

    def shard(self, model: Any) -> None:
        """Divide the weights before the optimizer is made, where the engine wants that."""

    def adopt(self, trainer: Phi3VTrainer) -> None:
        """Take over what the library's ``Accelerator`` does for a trainer, where the engine does it itself."""

    def check(self, trainer: Phi3VTrainer) -> None:
        """Look whether this engine is what runs; called when training begins.

        Raises:
            WrongEngineError: it is not.
        """
        is_ddp = isinstance(trainer.model_wrapped, DistributedDataParallel)
        if is_ddp != (self.choice.name == "ddp"):
            raise wrong_engine(self.choice.name, type(trainer.model_wrapped).__name__)

    def whole_tensors(self, model: Any, *, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, whole and in the precision it is trained in, on every rank; all ranks must ask."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or not trained_only:
                yield name, parameter.detach()

    @torch.no_grad()
    def put_whole(self, model: Any, tensors: dict[str, torch.Tensor] | None) -> None:
        """The reverse: trained parameters become ``tensors``, which rank 0 has; all ranks must call."""
        for name, parameter in self._trained(model):
            self._put(parameter, self._from_rank_0(parameter, tensors, name))

    def optimizer_tensors(self, trainer: Phi3VTrainer) -> Iterator[tuple[str, torch.Tensor]]:
        """The optimizer's state, whole, as ``parameter/key``, on every rank; all ranks must ask."""
        state = raw_optimizer(trainer).state
        for name, parameter in self._trained(trainer.model):
            for key, value in sorted(state.get(parameter, {}).items()):
                yield f"{name}/{key}", self._whole(value)

    @contextlib.contextmanager
    def as_saved(self, model: Any, dtype: torch.dtype) -> Iterator[Any]:
        """A whole model on every rank with the weights as they would be saved; the trained one stays as it is."""
        with in_stored_dtype(model, dtype):
            yield model

    def finished(self, model: Any, dtype: torch.dtype) -> Any:
        """As `as_saved`, for good: training is over."""
        round_to_stored_dtype(model, dtype)
        return model

    def _trained(self, model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)

    def _from_rank_0(self, like: torch.Tensor, tensors: dict[str, torch.Tensor] | None, name: str) -> torch.Tensor:
        """Tensor ``name`` of rank 0 on every rank."""
        if self.compute.rank == 0:
            assert tensors is not None
            value = tensors[name].to(self.compute.device, torch.float32)
        else:
            value = torch.empty(self._shape(like), device=self.compute.device)
        return broadcast(value, from_process=0) if self.compute.world_size > 1 else value

    def _shape(self, parameter: torch.Tensor) -> torch.Size:
        return parameter.shape

    def _put(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        parameter.copy_(value)

    def _whole(self, value: Any) -> torch.Tensor:
        return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def wrong_engine(wanted: str, found: str) -> WrongEngineError:
    """The error for it; a run must not go on as something else than it says."""
    return WrongEngineError(f"the engine is {wanted}, but what trains is {found}")


def raw_optimizer(trainer: Phi3VTrainer) -> torch.optim.Optimizer:
    """The optimizer below the library's wrapper."""
    optimizer: Any = trainer.optimizer
    return getattr(optimizer, "optimizer", optimizer)
