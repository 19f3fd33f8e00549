"""Parameters and their bytes, counted on the real model without a byte of weights.

The model is made on torch's meta device and the method applied to it by the code that training runs, so the counts are
those of a run.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import nn

from phi3v.config import LoraConfig, MethodConfig, torch_dtype
from phi3v.model.configuration import Phi3VConfig
from phi3v.plan.inputs import Optimizer
from phi3v.train.compute.activations import Gradients
from phi3v.train.methods.loading import loaded_dtype, make_skeleton
from phi3v.train.methods.strategies import PART_MODULES, VISION, TrainablePart, apply_method, summarize

NF4_BLOCK = 64  # weights that share a scale (bitsandbytes' 4-bit block)
NF4_OUTER_BLOCK = 256  # scales that share a scale, with double quantisation
EIGHT_BIT_BLOCK = 256  # moments that share a scale (bitsandbytes' 8-bit AdamW)
EIGHT_BIT_MINIMUM = 4096  # smaller tensors keep 32-bit moments


@dataclass(frozen=True)
class Parameters:
    """What a method makes of a model.

    Attributes:
        parts: counts by part, as a run prints them.
        trainable_sizes: elements of each trainable tensor → how many have so many.
        frozen_bytes: frozen weights as they are stored, quantisation scales included.
        cast_elements: elements of trainable matrices that half-precision products cast.
        decoder_layer_cast: those of one decoder layer.
        largest_matrix: elements of the largest trainable matrix.
        gradients: how far back they go.
    """

    parts: tuple[TrainablePart, ...]
    trainable_sizes: Counter[int]
    frozen_bytes: int
    cast_elements: int
    decoder_layer_cast: int
    largest_matrix: int
    gradients: Gradients

    @property
    def trainable(self) -> int:
        """Trainable elements."""
        return sum(size * count for size, count in self.trainable_sizes.items())

    def trainable_but(self, *parts: str) -> float:
        """Share of the trainable elements that lie in other parts."""
        inside = sum(part.trainable for part in self.parts if part.part in parts)
        return 1 - inside / self.trainable

    @property
    def total(self) -> int:
        """All elements, frozen and trainable."""
        return sum(part.total for part in self.parts)

    @property
    def weight_bytes(self) -> int:
        """Weights on one device, trainable ones in float32."""
        return self.frozen_bytes + 4 * self.trainable

    def optimizer_bytes(self, optimizer: Optimizer) -> int:
        """The optimizer's moments: two float32, bfloat16 or 8-bit numbers a trainable parameter."""
        if optimizer == "adamw":
            return 8 * self.trainable + 4 * sum(self.trainable_sizes.values())  # and a step count a tensor
        if optimizer == "adamw_bf16":
            return 4 * self.trainable
        return sum(
            count * (2 * (size + 4 * math.ceil(size / EIGHT_BIT_BLOCK)) if size >= EIGHT_BIT_MINIMUM else 8 * size)
            for size, count in self.trainable_sizes.items()
        )


def meta_model(config: Phi3VConfig, method: MethodConfig, precision: str) -> nn.Module:
    """The model as a run would train it, without storage; LoRA's and QLoRA's are the same.

    Args:
        precision: bf16, fp16 or fp32, the arithmetic of the run (decides what frozen weights are stored in).

    Raises:
        UserError: a LoRA target matches nothing.
    """
    # PiSSA starts from the weights' values, which there are none of here; it has as many parameters as any start.
    method = replace(method, lora=replace(method.lora, init="gaussian"))
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    model = make_skeleton(config)
    with torch.device("meta"):
        dtype = loaded_dtype(method, stored, torch_dtype(precision))
        wrapped: nn.Module = apply_method(model.to(dtype), method)
    return wrapped


def count_parameters(config: Phi3VConfig, method: MethodConfig, precision: str) -> Parameters:
    """Count what ``method`` makes of the model of ``config``; arguments and errors as of `meta_model`."""
    return count_model(meta_model(config, method, precision), method)


def count_model(wrapped: nn.Module, method: MethodConfig) -> Parameters:
    """Count a model of `meta_model`; for qlora its frozen linear layers as packed."""
    packed = quantised(wrapped, method.lora) if method.name == "qlora" else set()
    frozen = sum(
        nf4_bytes(parameter.numel(), double=method.lora.double_quant)
        if id(parameter) in packed
        else parameter.numel() * parameter.element_size()
        for parameter in wrapped.parameters()
        if not parameter.requires_grad
    )
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    matrices = {n: p.numel() for n, p in trained.items() if p.ndim > 1 and "embed_tokens.weight" not in n}
    return Parameters(
        parts=tuple(summarize(wrapped)),
        trainable_sizes=Counter(parameter.numel() for parameter in trained.values()),
        frozen_bytes=frozen,
        cast_elements=sum(matrices.values()),
        decoder_layer_cast=sum(size for name, size in matrices.items() if "model.layers.0." in name),
        largest_matrix=max(matrices.values(), default=0),
        gradients=Gradients.of(wrapped),
    )


def quantised(model: nn.Module, lora: LoraConfig) -> set[int]:
    """The weights that 4-bit loading packs: every linear layer but the head and what is trained in full."""
    kept = ("lm_head", *(VISION + PART_MODULES[part] for part in lora.also_train))
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and not any(part in name for part in kept)
    }


def nf4_bytes(elements: int, *, double: bool) -> int:
    """A packed weight with its scales and code books (bitsandbytes' ``QuantState``)."""
    blocks = math.ceil(elements / NF4_BLOCK)
    packed = math.ceil(elements / 2) + 16 * 4
    if not double:
        return packed + 4 * blocks
    return packed + blocks + 4 * math.ceil(blocks / NF4_OUTER_BLOCK) + 256 * 4 + 4
