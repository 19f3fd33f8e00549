"""FP8: the decoder's linear layers multiply in float8 (torchao), with a scale a tensor that is found anew each time.

Inputs and weights are float8 e4m3 (3 bits of mantissa), gradients of outputs e5m2 (2 bits), sums float32; weights,
gradients and names stay as they were. Not exact: a rounded number is off by up to 1/16 or 1/8 of itself.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from phi3v.errors import UserError
from phi3v.train.methods.strategies import PART_TARGETS


def require_torchao() -> None:
    """Say which extra to install where torchao is missing, as a `UserError`."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError("FP8 needs torchao", where="training.fp8", hint='pip install "phi3v[gpu]"')


def apply_float8(model: Any, *, emulate: bool = False) -> int:
    """Exchange the decoder's linear layers, those under adapters too; the adapters themselves stay as they are.

    Args:
        emulate: round to float8 but multiply in float32, on any device; for tests. The products themselves need a card.

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
