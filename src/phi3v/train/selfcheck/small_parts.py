"""What is examined without the model: the optimizer's steps, and a product with 4-bit weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from phi3v.config import LearningRates, RunConfig
from phi3v.train.device import RuntimeDevice
from phi3v.train.methods.loading import keep_trainable_layout
from phi3v.train.methods.optimizers import keeps_bf16_weights, make_optimizer

STEPS = 4
RATE = 0.01  # large beside the weights, so that an update is many of their units of rounding
# By how much an update may be off: in float32 by 100 units; bf16 rounds to 1/256, and 8 bits have as many values.
UPDATE_OFF = {"adamw": 1.2e-5, "adamw_bf16": 4 / 256, "adamw_8bit": 8 / 256}
TOKENS = 64


def updates(config: RunConfig, device: torch.device) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """What a few steps of the run's optimizer do to a matrix and a vector, and what AdamW does in float64.

    Their sizes are multiples of no block of 8-bit moments; each is updated in the backward pass where the run does so.
    """
    training = config.training
    # A recipe's own numbers could make updates that vanish beside the rounding of weights.
    rates = replace(training, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-7, weight_decay=0.01)
    rates = replace(rates, learning_rate=RATE, learning_rates=LearningRates())
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(130, 513)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 50
    gradients = [
        [torch.randn(parameter.shape, generator=generator).bfloat16() for parameter in layer.parameters()]
        for _ in range(STEPS)
    ]
    layer = layer.to(device, torch.bfloat16 if keeps_bf16_weights(training) else torch.float32)
    own, exact, before = layer, copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    plain = replace(rates, optimizer="adamw", lean=False)
    pairs = ((own, rates, True), (exact, plain, False))
    for model, settings, fused in pairs:
        optimizer = make_optimizer(model, replace(config, training=settings), fused=fused)
        for step in gradients:
            losses = [
                (parameter * gradient.to(parameter)).sum()
                for parameter, gradient in zip(model.parameters(), step, strict=True)
            ]
            torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [
        (name, parameter.detach().double() - start, exact.get_parameter(name).detach() - start)
        for name, parameter in own.named_parameters()
        for start in (before.get_parameter(name).detach(),)
    ]


def four_bit_products(config: RunConfig, runtime: RuntimeDevice, width: int) -> dict[str, list[torch.Tensor]]:
    """A product with 4-bit weights on the device, and its gradient; and both from the same weights, rounded on the CPU.

    Returns:
        Of ``the product`` and ``its gradient``: the kernel's, the plain one in the run's precision, the exact one.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(width, width, generator=generator) * width**-0.5
    inputs = torch.randn(TOKENS, width, generator=generator).to(runtime.dtype)

    def quantised(device: torch.device) -> nn.Module:
        layer = Linear4bit(
            width,
            width,
            bias=False,
            compute_dtype=runtime.dtype,
            compress_statistics=config.method.lora.double_quant,
            quant_type="nf4",
        )
        layer.load_state_dict({"weight": weights.to(runtime.dtype)})
        layer = layer.to(device)
        keep_trainable_layout(layer)
        return layer.train()

    on_host: Any = quantised(torch.device("cpu")).weight
    known = dequantize_4bit(on_host.data, on_host.quant_state).float()
    layer = quantised(runtime.device)
    found: dict[str, list[torch.Tensor]] = {"the product": [], "its gradient": []}
    for how in ("kernel", "plain", "exact"):
        dtype = torch.float32 if how == "exact" else runtime.dtype
        x = inputs.to(runtime.device, dtype).requires_grad_()
        y = layer(x) if how == "kernel" else functional.linear(x, known.to(x))
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        found["the product"].append(y.detach().float())
        found["its gradient"].append(gradient.float())
    return found
