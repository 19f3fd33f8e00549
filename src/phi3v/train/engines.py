"""Engines: how the ranks of a run hold its model and its optimizer, and how these are saved and taken up again.

Every method is a collective: all ranks call it, in the same order. Nothing assumes that ranks share a disk: where an
engine is not sharded, rank 0 alone reads and writes, and the others get what they need from it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import broadcast, broadcast_object_list

from phi3v.train.saving import saved_names

if TYPE_CHECKING:
    from phi3v.train.trainer import Phi3VTrainer

# What is left to write of a save. It touches host memory and files only, so a thread may do it.
Rest = Callable[[], None]


def write_nothing() -> None:
    """What is left where all is written, or where another rank writes."""


class Engine(ABC):
    """How the ranks hold model and optimizer.

    Attributes:
        name: as it is configured.
        sharded: every rank writes its part of the optimizer; otherwise rank 0 writes all.
        asynchronous: `save_optimizer` may leave the writing to a thread.
        can_drop_step: gradients that are set to None before the optimizer's step leave the weights as they are.
    """

    name: ClassVar[str]
    sharded: ClassVar[bool] = False
    asynchronous: ClassVar[bool] = False
    can_drop_step: ClassVar[bool] = False

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    @abstractmethod
    def full_state_dict(self, model: Any) -> dict[str, torch.Tensor] | None:
        """Whole tensors of the unwrapped model by the names of its ``state_dict``, as ``save_pretrained`` takes them.

        Of an adapter only what its save needs. They may be the model's own tensors. ``None`` on all ranks but the
        first.
        """

    @abstractmethod
    def load_full_state_dict(self, model: Any, tensors: dict[str, torch.Tensor] | None) -> None:
        """Put whole tensors into the unwrapped model, on every rank.

        Args:
            tensors: all that is trained, by the names of ``full_state_dict``, on rank 0; ``None`` on the others.
        """

    @abstractmethod
    def save_optimizer(self, trainer: Phi3VTrainer, folder: Path) -> Rest:
        """Save optimizer, gradient scaler and schedule to ``folder``, which exists.

        Returns:
            What is left to do, which touches neither model nor optimizer. Files are complete once it has run.
        """

    @abstractmethod
    def load_optimizer(self, trainer: Phi3VTrainer, folder: Path | None) -> None:
        """Take up what `save_optimizer` saved.

        Args:
            folder: ``None`` on a rank that has no files, which where nothing is sharded is any but the first.
        """


class DataParallel(Engine):
    """Every rank holds everything: one process, or torch's DistributedDataParallel."""

    name = "ddp"
    asynchronous = True
    can_drop_step = True

    def full_state_dict(self, model: Any) -> dict[str, torch.Tensor] | None:
        if self.rank > 0:
            return None
        state = model.state_dict()
        return {name: state[name] for name in saved_names(model).values()}

    def load_full_state_dict(self, model: Any, tensors: dict[str, torch.Tensor] | None) -> None:
        own = model.state_dict()
        names: list[Any] = [sorted(tensors) if tensors is not None else None]
        if self.world_size > 1:
            broadcast_object_list(names)
        for name in names[0]:
            if tensors is not None:
                own[name].copy_(tensors[name])
            if self.world_size > 1:
                broadcast(own[name], from_process=0)

    def save_optimizer(self, trainer: Phi3VTrainer, folder: Path) -> Rest:
        if self.rank > 0:
            return write_nothing
        scaler = trainer.accelerator.scaler
        facts = {
            "schedule": trainer.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        state = to_host(trainer.optimizer.state_dict())

        def write() -> None:
            torch.save(state, folder / "optimizer.pt")
            (folder / "schedule.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

        return write

    def load_optimizer(self, trainer: Phi3VTrainer, folder: Path | None) -> None:
        loaded: list[Any] = [None, None]
        if self.rank == 0:
            assert folder is not None
            loaded[0] = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            loaded[1] = json.loads((folder / "schedule.json").read_text(encoding="utf-8"))
        if self.world_size > 1:
            _send_tensors(loaded, trainer.args.device)
        state, facts = loaded
        trainer.optimizer.load_state_dict(state)
        trainer.lr_scheduler.load_state_dict(facts["schedule"])
        if facts["scaler"] is not None and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(facts["scaler"])


def to_host(value: Any) -> Any:
    """A copy of nested dictionaries and lists with their tensors in host memory, which later steps leave alone."""
    return _replaced(value, torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))


def _send_tensors(values: list[Any], device: torch.device) -> None:
    """Give every rank the nested values of rank 0: the structure at once, then tensor after tensor."""
    tensors: list[torch.Tensor] = []

    def take_out(tensor: torch.Tensor) -> _Place:
        tensors.append(tensor)
        return _Place(len(tensors) - 1, tensor.shape, tensor.dtype)

    message = [_replaced(values, torch.Tensor, take_out)]
    broadcast_object_list(message)

    def put_in(place: _Place) -> torch.Tensor:
        tensor = tensors[place.index] if tensors else torch.empty(place.shape, dtype=place.dtype)
        return broadcast(tensor.to(device), from_process=0).cpu()

    values[:] = _replaced(message[0], _Place, put_in)


def _replaced(value: Any, kind: type, replace: Callable[[Any], Any]) -> Any:
    """Nested dictionaries and lists with every ``kind`` in them replaced, in their order."""
    if isinstance(value, kind):
        return replace(value)
    if isinstance(value, dict):
        return {key: _replaced(item, kind, replace) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, kind, replace) for item in value)
    return value


@dataclass(frozen=True)
class _Place:
    """Where a tensor was in a structure that is sent without its tensors."""

    index: int
    shape: torch.Size
    dtype: torch.dtype
