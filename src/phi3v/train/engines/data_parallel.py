"""One process, or torch's DistributedDataParallel: every rank holds everything."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from phi3v.train.engines.base import DeferredWrite, Engine, no_op
from phi3v.train.methods.optimizers import start_moments, takes_found_inf
from phi3v.train.methods.weights import in_stored_dtype, round_to_stored_dtype, saved_tensors
from phi3v.train.pieces import WEIGHTS, Piece
from phi3v.train.schedule import resume_schedule


class DataParallel(Engine):
    """Every rank holds everything."""

    wrapped: Any
    scaler: torch.amp.GradScaler | None = None

    def wrap(self) -> None:
        device = self.runtime.device
        if self.runtime.precision == "fp16":
            self.scaler = torch.amp.GradScaler(device.type)
        self.wrapped = self.model
        if self.runtime.world_size > 1:
            self.wrapped = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,  # needs two cards, and NCCL
                broadcast_buffers=False,  # they are constants
            )
            if self.config.distributed.reduce_dtype == "bf16":
                self.wrapped.register_comm_hook(None, _sum_in_bf16)

    def mismatch(self) -> str | None:
        is_ddp = isinstance(self.wrapped, DistributedDataParallel)
        return type(self.wrapped).__name__ if is_ddp != (self.name == "ddp") else None

    def forward(self, inputs: Mapping[str, Any], *, last: bool) -> Any:
        if self.wrapped is not self.model:
            # As in DDP's no_sync: ranks meet once a step, however many rows each has.
            self.wrapped.require_backward_grad_sync = last
        with self.autocast():
            return self.wrapped(**inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        (self.scaler.scale(loss) if self.scaler is not None else loss).backward()

    def grad_norm(self) -> torch.Tensor:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return clip_gradients(self.model, self.config.training.max_grad_norm)

    def step(self, norm: torch.Tensor) -> None:
        if self.scaler is not None:
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() >= scale:  # else the step was left out
                self.schedule.step()
        else:
            step_if_finite(self.optimizer, norm)
            self.schedule.step()
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def whole_model(self, dtype: torch.dtype) -> Iterator[Any]:
        with in_stored_dtype(self.model, dtype):
            yield self.model

    def final_model(self, dtype: torch.dtype) -> Any:
        round_to_stored_dtype(self.model, dtype)
        return self.model

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        return saved_tensors(self.model) if self.runtime.rank == 0 else None

    def load_full_state_dict(self, tensors: dict[str, torch.Tensor] | None) -> None:
        load_whole(self.model, tensors, self.runtime.world_size)

    def save_optimizer(self, folder: Path, *, copy: bool = True) -> DeferredWrite:
        if self.runtime.rank > 0:
            return no_op
        facts = {"schedule": self.schedule.state_dict(), "scaler": self.scaler_state()}
        state = to_host(self.optimizer.state_dict(), copy=copy)

        def write() -> None:
            torch.save(state, folder / "optimizer.pt")
            (folder / "schedule.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

        return write

    def load_optimizer(self, folder: Path | None) -> None:
        loaded: list[Any] = [None, None]
        if self.runtime.rank == 0:
            assert folder is not None
            loaded[0] = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            loaded[1] = json.loads((folder / "schedule.json").read_text(encoding="utf-8"))
        if self.runtime.world_size > 1:
            _send_tensors(loaded, self.runtime.device)
        state, facts = loaded
        self.optimizer.load_state_dict(state)
        resume_schedule(self.schedule, facts["schedule"])
        if facts["scaler"] is not None:
            self.put_scaler_state(facts["scaler"])

    def own_pieces(self, name: str, parameter: Any, kinds: Iterable[str]) -> Iterator[Piece]:
        for kind in kinds:
            values = parameter.detach() if kind == WEIGHTS else self.optimizer.state[parameter][kind]
            yield Piece(f"{kind}/{name}", values.view(-1), 0, values.numel())

    def start_moments(self, steps: float) -> None:
        start_moments(self.optimizer, steps)

    def scaler_state(self) -> dict[str, Any] | None:
        return self.scaler.state_dict() if self.scaler is not None else None

    def put_scaler_state(self, state: Mapping[str, Any]) -> None:
        if self.scaler is not None:
            own = self.scaler.state_dict()
            scale = {"scale": state["cur_scale"]} if "cur_scale" in state else {}
            self.scaler.load_state_dict(own | {key: state[key] for key in own if key in state} | scale)


def _sum_in_bf16(state, bucket):  # type: ignore[no-untyped-def] # DDP takes no annotations that are strings
    """torch's hook by another name: by its own DDP refuses it where NCCL is missing."""
    return bf16_compress_hook(state, bucket)


def clip_gradients(model: Any, max_norm: float) -> torch.Tensor:
    """The norm of all gradients, which are then scaled down to ``max_norm`` if it is above 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in parameters])
    if max_norm > 0:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def step_if_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Update the weights unless the norm of their gradient is not finite; the host need not know of it."""
    if takes_found_inf(optimizer):
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif norm.isfinite():  # these optimizers cannot be told on the device
        optimizer.step()


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
