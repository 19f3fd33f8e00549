"""What the engines that divide weights, gradients or optimizer state have in common."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from phi3v.config import RunConfig
from phi3v.train.device import Compute
from phi3v.train.engines.base import Engine
from phi3v.train.engines.choice import EngineChoice


class ShardedEngine(Engine):
    """Measures and saves with a whole copy of the model.

    Ranks answer different questions, of different lengths, so their forward passes cannot meet; a copy needs no
    meeting. It takes the size of the model in the dtype of its checkpoint, on each device, while it is measured.
    """

    meets_in_every_row = True

    def __init__(self, model: Any, choice: EngineChoice, config: RunConfig, compute: Compute) -> None:
        super().__init__(model, choice, config, compute)
        self._skeleton = without_weights(model)

    @contextlib.contextmanager
    def as_saved(self, model: Any, dtype: torch.dtype) -> Iterator[Any]:
        yield self._copy(model, dtype)

    def finished(self, model: Any, dtype: torch.dtype) -> Any:
        return self._copy(model, dtype)

    @torch.no_grad()
    def _copy(self, model: Any, dtype: torch.dtype) -> Any:
        whole = copy.deepcopy(self._skeleton)
        keep = isinstance(whole, PeftModel)  # adapters stay float32
        own = {name: parameter.dtype for name, parameter in whole.named_parameters()}
        for name, tensor in self.whole_tensors(model):
            wanted = own[name] if keep or not tensor.is_floating_point() else dtype
            module, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(tensor.to(wanted, copy=True), requires_grad=whole.get_parameter(name).requires_grad)
            setattr(whole.get_submodule(module), leaf, parameter)
        return whole


def without_weights(model: Any) -> Any:
    """A copy of a model whose parameters have shapes and dtypes but no values (torch's meta device)."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
