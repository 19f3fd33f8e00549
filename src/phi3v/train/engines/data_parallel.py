"""One process, or torch's DistributedDataParallel: every rank holds everything."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch.nn.parallel import DistributedDataParallel

from phi3v.train.checkpoints.weights import in_stored_dtype, round_to_stored_dtype, saved_tensors
from phi3v.train.engines.base import DeferredWrite, Engine, no_op, wrong_engine
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.schedule import resume_schedule

if TYPE_CHECKING:
    from phi3v.train.loop import Phi3VTrainer


class DataParallel(Engine):
    """Every rank holds everything."""

    def __init__(self, rank: int, world_size: int, choice: EngineChoice | None = None) -> None:
        super().__init__(rank, world_size, choice or EngineChoice("ddp" if world_size > 1 else "none", "the default"))

    def check(self, trainer: Phi3VTrainer) -> None:
        is_ddp = isinstance(trainer.model_wrapped, DistributedDataParallel)
        if is_ddp != (self.choice.name == "ddp"):
            raise wrong_engine(self.choice.name, type(trainer.model_wrapped).__name__)

    @contextlib.contextmanager
    def as_saved(self, model: Any, dtype: torch.dtype) -> Iterator[Any]:
        with in_stored_dtype(model, dtype):
            yield model

    def finished(self, model: Any, dtype: torch.dtype) -> Any:
        round_to_stored_dtype(model, dtype)
        return model

    def full_state_dict(self, model: Any) -> dict[str, torch.Tensor] | None:
        return saved_tensors(model) if self.rank == 0 else None

    def load_full_state_dict(self, model: Any, tensors: dict[str, torch.Tensor] | None) -> None:
        load_whole(model, tensors, self.world_size)

    def save_optimizer(self, trainer: Phi3VTrainer, folder: Path, *, copy: bool = True) -> DeferredWrite:
        if self.rank > 0:
            return no_op
        scaler = trainer.accelerator.scaler
        facts = {
            "schedule": trainer.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        state = to_host(trainer.optimizer.state_dict(), copy=copy)

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
        resume_schedule(trainer.lr_scheduler, trainer.optimizer, facts["schedule"])
        if facts["scaler"] is not None and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(facts["scaler"])


def load_whole(model: Any, tensors: dict[str, torch.Tensor] | None, world_size: int) -> None:
    """As ``Engine.load_full_state_dict``, into a model that is whole on every rank."""
    own = model.state_dict()
    names: list[Any] = [sorted(tensors) if tensors is not None else None]
    if world_size > 1:
        broadcast_object_list(names)
    for name in names[0]:
        if tensors is not None:
            own[name].copy_(tensors[name])
        if world_size > 1:
            broadcast(own[name], from_process=0)


def to_host(value: Any, *, copy: bool = True) -> Any:
    """Nested dictionaries and lists with their tensors in host memory; as a copy, later steps leave them alone."""
    return _replaced(value, torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=copy))


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
