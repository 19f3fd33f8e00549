"""LongRoPE's tables against the formula, by sample."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from phi3v import Phi3VConfig
from phi3v.model.attention import Phi3VRotaryEmbedding


@pytest.fixture
def config(golden: Path) -> Phi3VConfig:
    return Phi3VConfig.from_pretrained(golden)


def table(config: Phi3VConfig, positions: torch.Tensor, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (T, D) of the formula, in float64."""
    dim = config.hidden_size // config.num_attention_heads
    factors = torch.tensor(config.rope_parameters[which], dtype=torch.float64)
    inv_freq = 1 / (factors * 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    angles = positions.double()[:, None] * inv_freq
    angles = torch.cat([angles, angles], -1)
    scale = math.sqrt(1 + math.log(131072 / 4096) / math.log(4096))
    return angles.cos() * scale, angles.sin() * scale


def check(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    # An angle of 5000 has 5e-4 of resolution in float32: 1e-3 for rotations of fast, far positions.
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("length", "which"), [(10, "short_factor"), (4096, "short_factor"), (4097, "long_factor")])
def test_factors_switch_behind_the_last_short_position(length: int, which: str, config: Phi3VConfig) -> None:
    rotary = Phi3VRotaryEmbedding(config)
    positions = torch.arange(length)
    cos, sin = rotary(torch.zeros(1), positions[None])
    assert cos.shape == sin.shape == (1, length, 16)
    check((cos[0], sin[0]), table(config, positions, which))


def test_each_row_has_its_own(config: Phi3VConfig) -> None:
    rotary = Phi3VRotaryEmbedding(config)
    positions = torch.stack([torch.arange(5000), torch.arange(5000).clamp(max=3000)])
    cos, sin = rotary(torch.zeros(1), positions)
    check((cos[0], sin[0]), table(config, positions[0], "long_factor"))
    check((cos[1], sin[1]), table(config, positions[1], "short_factor"))


def test_dtype_is_the_inputs(config: Phi3VConfig) -> None:
    cos, sin = Phi3VRotaryEmbedding(config)(torch.zeros(1, dtype=torch.bfloat16), torch.arange(8)[None])
    assert cos.dtype == sin.dtype == torch.bfloat16


def test_made_on_the_meta_device_it_still_holds_numbers(config: Phi3VConfig) -> None:
    """The library builds models there before it loads weights, and these are in no checkpoint."""
    with torch.device("meta"):
        made = Phi3VRotaryEmbedding(config)
    assert torch.equal(
        made.frequencies(torch.device("cpu")), Phi3VRotaryEmbedding(config).frequencies(torch.device("cpu"))
    )
    assert not made.state_dict()
