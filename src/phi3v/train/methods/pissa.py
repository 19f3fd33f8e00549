"""PiSSA adapters (arXiv 2404.02948), saved as the change that training made, so that they fit the model as published.

PEFT moves the principal part B0 A0 of each adapted weight W into the adapter and leaves the rest in the base. Reloaded
on the published base such an adapter would count that part twice. What training changed is the difference to the start,
B A - B0 A0: again a LoRA, of twice the rank, with the factors [A; A0] and [B, -B0].
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from peft import PeftModel

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def remember_start(model: PeftModel) -> None:
    """Keep the factors that the adapters begin with, in host memory."""
    model.pissa_start = {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in model.named_parameters()
        if name.endswith((_A, _B))
    }


def start_of(model: Any) -> dict[str, torch.Tensor]:
    """What `remember_start` kept, by the names of the model's ``state_dict``; empty for another model."""
    return getattr(model, "pissa_start", {})


def as_difference(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors to save, with the factors of the start beside those of PiSSA adapters."""
    joined = dict(tensors)
    for name, start in start_of(model).items():
        own = tensors[name]
        start = start.to(own)
        joined[name] = torch.cat([own, start], 0) if name.endswith(_A) else torch.cat([own, -start], 1)
    return joined


def as_trained(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reverse of `as_difference`."""
    own = dict(tensors)
    for name, start in start_of(model).items():
        if name in tensors:
            own[name] = tensors[name][: len(start)] if name.endswith(_A) else tensors[name][:, : start.shape[1]]
    return own


def difference_config(config: Any) -> Any:
    """The adapter's configuration for what `as_difference` gives; its scale alpha / rank stays."""
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    config.lora_alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
    config.r *= 2
    return config
