"""What the engines that divide weights, gradients or optimizer state have in common."""

from __future__ import annotations

import contextlib
import copy
import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from phi3v.config import RunConfig
from phi3v.train.device import RuntimeDevice
from phi3v.train.engines.base import DeferredWrite, Engine, no_op
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.methods.weights import saved_names
from phi3v.train.pieces import WEIGHTS

OPTIMIZER_FILE = "optimizer.safetensors"
FACTS_FILE = "schedule.json"


class ShardedEngine(Engine):
    """Evaluates and saves with whole tensors, so that what is written fits any number of ranks.

    Ranks answer different questions, of different lengths, so their forward passes cannot meet. Evaluation uses a copy
    of the model, which takes its size in the dtype of the checkpoint on each device while that lasts.
    """

    meets_in_every_row = True

    def __init__(self, model: Any, choice: EngineChoice, config: RunConfig, runtime: RuntimeDevice) -> None:
        super().__init__(model, choice, config, runtime)
        self._skeleton = without_weights(model)

    @abstractmethod
    def whole_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, whole and in the precision it is trained in, on every rank."""

    @abstractmethod
    def whole_moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The optimizer's moments, whole, as ``key/parameter``, on every rank."""

    @contextlib.contextmanager
    def whole_model(self, dtype: torch.dtype) -> Iterator[Any]:
        yield self._copy(dtype)

    def final_model(self, dtype: torch.dtype) -> Any:
        return self._copy(dtype)

    @torch.no_grad()
    def _copy(self, dtype: torch.dtype) -> Any:
        whole = copy.deepcopy(self._skeleton)
        keep = isinstance(whole, PeftModel)  # adapters stay float32
        for name, tensor in self.whole_tensors():
            own = whole.get_parameter(name)
            wanted = own.dtype if keep else dtype
            module, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(tensor.to(wanted, copy=True), requires_grad=own.requires_grad)
            setattr(whole.get_submodule(module), leaf, parameter)
        return whole

    @torch.no_grad()
    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        wanted = set(saved_names(self._skeleton).values())
        tensors = {}
        for name, tensor in self.whole_tensors():
            if name in wanted and self.runtime.rank == 0:
                tensors[name] = tensor.to("cpu", copy=True)  # the next ones need the device's memory
        return tensors if self.runtime.rank == 0 else None

    @torch.no_grad()
    def load_full_state_dict(self, tensors: dict[str, torch.Tensor] | None) -> None:
        own = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        for name, tensor in self._from_rank_0(tensors):
            if name in own:
                self._put(WEIGHTS, name, own[name], tensor)
        self.refresh()

    def _put(self, kind: str, name: str, parameter: Any, value: torch.Tensor) -> None:
        """Write this rank's piece of a whole tensor."""
        for piece in self.own_pieces(name, parameter, [kind]):
            piece.values.copy_(value.flatten()[piece.start : piece.start + len(piece)])

    @torch.no_grad()
    def save_optimizer(self, folder: Path, *, copy: bool = True) -> DeferredWrite:
        moments = {}
        for name, tensor in self.whole_moments():
            if self.runtime.rank == 0:
                moments[name] = tensor.to("cpu", copy=True)
        if self.runtime.rank > 0:
            return no_op
        facts = self.facts()

        def write() -> None:
            save_file(moments, folder / OPTIMIZER_FILE)
            (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

        return write

    @torch.no_grad()
    def load_optimizer(self, folder: Path | None) -> None:
        facts: list[Any] = [None]
        moments = None
        if folder is not None and self.runtime.rank == 0:
            facts[0] = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
            with safe_open(folder / OPTIMIZER_FILE, framework="pt") as file:
                moments = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        broadcast_object_list(facts)
        self.load_facts(facts[0])
        own = dict(self.model.named_parameters())
        for key_and_name, value in self._from_rank_0(moments):
            key, name = key_and_name.split("/", 1)
            self._put(key, name, own[name], value)

    def _from_rank_0(self, tensors: dict[str, torch.Tensor] | None) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of rank 0, one after the other, in float32 on every rank's device."""
        shapes: list[Any] = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} if tensors else None]
        broadcast_object_list(shapes)
        for name, shape in shapes[0].items():
            if tensors is None:
                value = torch.empty(shape, device=self.runtime.device)
            else:
                value = tensors[name].to(self.runtime.device, torch.float32)
            yield name, broadcast(value, from_process=0)


def without_weights(model: Any) -> Any:
    """A copy of a model whose parameters have shapes and dtypes but no values (torch's meta device)."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
