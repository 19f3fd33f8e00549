"""LongRoPE, chosen per sample.

Shapes: ``B`` rows, ``T`` positions, ``D`` head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from phi3v.model.configuration import Phi3VConfig


class Phi3VRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding with LongRoPE's short and long factors.

    ``inv_freq[i] = 1 / (factor[i] * theta ** (2i / D))`` and both tables are scaled by
    ``sqrt(1 + ln(max / original) / ln(original))`` (LongRoPE, arXiv 2402.13753; `Phi3SuScaledRotaryEmbedding` of
    the official ``modeling_phi3_v.py``). The official code picks the factors from the largest position of the
    batch; here each row picks by its own length, so a neighbour never changes a sample's result.

    The frequencies are not buffers: they stay float32 whatever dtype the model is cast to.
    """

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        rope = config.rope_parameters
        dim = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
        base = rope["rope_theta"] ** exponents
        self.long_context_start = config.long_context_start
        if rope["rope_type"] == "longrope":
            factors = torch.tensor([rope["short_factor"], rope["long_factor"]], dtype=torch.float32, device="cpu")
            scale = config.max_position_embeddings / self.long_context_start
            self.attention_scaling = (
                math.sqrt(1 + math.log(scale) / math.log(self.long_context_start)) if scale > 1 else 1.0
            )
        else:
            factors = torch.ones(2, dim // 2, device="cpu")
            self.attention_scaling = 1.0
        self._inv_freq = 1.0 / (factors * base)  # [2 = short, long; D / 2]

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """The short and the long frequencies on ``device``, float32 of shape (2, D / 2)."""
        if self._inv_freq.device != device:
            self._inv_freq = self._inv_freq.to(device)
        return self._inv_freq

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, is_long: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables for ``position_ids`` (B, T).

        Args:
            is_long: (B, T) bool, whether a token's sample uses the long factors; by default a row is one sample and
                its largest position tells.

        Returns:
            cos and sin, each (B, T, D), in the dtype of ``x``.
        """
        short, long = self.frequencies(position_ids.device)
        if is_long is None:
            is_long = position_ids.amax(dim=-1, keepdim=True) >= self.long_context_start  # [B, 1]
        inv_freq = torch.where(is_long[..., None], long, short)  # [B, 1 or T, D / 2]
        angles = position_ids[..., None].float() * inv_freq  # [B, T, D / 2]
        angles = torch.cat((angles, angles), dim=-1)  # [B, T, D]
        return (
            (angles.cos() * self.attention_scaling).to(x.dtype),
            (angles.sin() * self.attention_scaling).to(x.dtype),
        )
