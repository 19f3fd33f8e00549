"""FP8: the decoder's linear layers multiply in float8 (torchao), with a scale a tensor that is found anew each time.

Inputs and weights are float8 e4m3 (3 bits of mantissa), gradients of outputs e5m2 (2 bits), sums float32; weights,
gradients and names stay as they were. Not exact: a rounded number is off by up to 1/16 or 1/8 of itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from phi3v.config import RunConfig
from phi3v.errors import UserError
from phi3v.machine import FLOAT8_CAPABILITY
from phi3v.train.device import Compute
from phi3v.train.strategies import PART_TARGETS


def check_float8(config: RunConfig, compute: Compute) -> None:
    """Refuse FP8 where it cannot run.

    Raises:
        UserError: as said, or torchao is missing.
    """
    if not config.training.fp8:
        return
    where, hint = "training.fp8", "set it to false"
    if config.method.name == "qlora":
        raise UserError("the decoder's weights are in four bits with qlora", where=where, hint=f"use lora, or {hint}")
    if compute.device.type != "cuda":
        raise UserError(f"FP8 needs a GPU, this is {compute.device.type}", where=where, hint=hint)
    if torch.version.hip is not None:
        raise UserError("FP8 has not been tried on AMD GPUs, so it is refused", where=where, hint=hint)
    if torch.cuda.get_device_capability(compute.device) < FLOAT8_CAPABILITY:
        name = torch.cuda.get_device_name(compute.device)
        raise UserError(
            f"{name} has no products of float8; cards of compute capability 8.9 and newer do", where=where, hint=hint
        )
    if compute.precision != "bf16":
        raise UserError(
            f"what is not FP8 must be bf16, and the precision is {compute.precision}",
            where=where,
            hint="set training.precision to bf16",
        )
    require_torchao()


def require_torchao() -> None:
    """Say which extra to install where torchao is missing, as a `UserError`."""
    try:
        import torchao.float8  # noqa: F401
    except ImportError:
        raise UserError("FP8 needs torchao", where="training.fp8", hint='pip install "phi3v[gpu]"') from None


def apply_float8(model: Any, *, emulate: bool = False) -> int:
    """Exchange the decoder's linear layers, those under adapters too; the adapters themselves stay as they are.

    Args:
        emulate: round to float8 but multiply in float32, on any device; for tests.

    Returns:
        How many layers were exchanged.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen: list[str] = []

    def is_decoder(module: nn.Module, name: str) -> bool:
        is_chosen = name.removesuffix(".base_layer").endswith(tuple(f".{leaf}" for leaf in PART_TARGETS["decoder"]))
        chosen.extend([name] if is_chosen else [])
        return is_chosen

    # Products of float8 want multiples of 16; the gradient of a weight is summed over the tokens, of any number.
    convert_to_float8_training(
        model, module_filter_fn=is_decoder, config=Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    )
    return len(chosen)
