"""Attention over packed rows: several samples in one row, none sees another, and some share their beginning.

A row is a chain of groups. A group is a prefix (the pages that its samples have in common; it may be empty) and one
or more branches (the rest of each sample). With two groups, of a prefix P and the branches a, b, and of c alone:

        P P P a a b b c c          position   0 1 2 3 4 3 4 0 1
      P x
      P x x
      P x x x
      a x x x x                    A row of this drawing is a query, an x a key that it sees.
      a x x x x x                  Positions go on from the prefix in every branch, so each
      b x x x     x                branch has what the sample would have alone.
      b x x x     x x
      c               x
      c               x x

Every backend here computes this one function; ``packed_mask`` is its plain form, which the others are tested against.
They are registered with transformers under the names in ``BACKENDS``. A model with such an implementation takes
ordinary rows too (generation), by SDPA.

`Phi3VRotaryEmbedding` gives the positions their angles: LongRoPE, with factors chosen per sample.

Shapes: ``B`` rows, ``T`` tokens of the row, ``D`` head size, ``h`` heads.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from phi3v.model.configuration import Phi3VConfig

# A group as (tokens of the prefix, tokens of each branch …). Plain numbers: nobody waits for the device to read them.
Layout = tuple[tuple[int, ...], ...]

HALF = (torch.float16, torch.bfloat16)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on ``device``, without waiting for what that computes."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Backend(Protocol):
    """Attention of one packed row, prepared once and called by every layer."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, dropout: float
    ) -> torch.Tensor:
        """(1, T, h, D) of a ``query`` (1, h, T, D) and a ``key`` and a ``value`` (1, h or fewer, T, D)."""


def segments(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """(group, branch, tokens) of every part of a row in order; branch 0 is the group's prefix, if it has one."""
    for group, (prefix, *branches) in enumerate(layout):
        if prefix:
            yield group, 0, prefix
        for branch, length in enumerate(branches, start=1):
            yield group, branch, length


def position_ids(layout: Layout) -> torch.Tensor:
    """(1, T) int64 on the host: the place of each token in its own sample."""
    starts = [0 if branch == 0 else layout[group][0] for group, branch, _ in segments(layout)]
    parts = zip(starts, segments(layout), strict=True)
    return torch.cat([torch.arange(start, start + length) for start, (_, _, length) in parts])[None]


def uses_long_factors(layout: Layout, long_context_start: int) -> torch.Tensor:
    """(1, T) bool on the host: whether a token's sample is longer than LongRoPE's short factors reach.

    Raises:
        ValueError: a prefix belongs to samples on both sides; its keys can be rotated one way only.
    """
    is_long = []
    for prefix, *branches in layout:
        sides = {prefix + branch > long_context_start for branch in branches}
        if len(sides) > 1:
            raise ValueError(
                f"samples of {prefix} + {branches} tokens share a prefix across LongRoPE's switch at "
                f"{long_context_start}"
            )
        is_long.append(torch.full((prefix + sum(branches),), sides.pop()))
    return torch.cat(is_long)[None]


def _ids(layout: Layout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The group and the branch of every token, each (T,) int32."""
    *columns, lengths = zip(*segments(layout), strict=True)
    groups, branches = (torch.tensor(np.repeat(np.array(ids, dtype=np.int32), lengths)) for ids in columns)
    return to_device(groups, device), to_device(branches, device)


def visible(layout: Layout, queries: torch.Tensor | None = None) -> torch.Tensor:
    """(T, T) bool on the host: which keys (columns) a query (row) sees; the drawing above, or those rows of it."""
    group, branch = _ids(layout, torch.device("cpu"))
    place = torch.arange(len(group))
    rows = place if queries is None else queries
    causal = rows[:, None] >= place
    return causal & (group[rows, None] == group) & ((branch == 0) | (branch[rows, None] == branch))


class MaskBackend:
    """One SDPA call with the whole mask: the plain form, quadratic in the row."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.mask = to_device(visible(layout), device)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, dropout: float
    ) -> torch.Tensor:
        return _sdpa(query, key, value, scale, dropout, mask=self.mask)


class SegmentBackend:
    """SDPA group by group, on any device: the prefix by itself, then all branches over the group's keys.

    Computes beyond what is seen only each branch against the others of its group, which are short. Of what SDPA can do
    on the CPU this is the fastest (``benchmarks/packing.py --attention`` compares them).
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.groups = [sum(group) for group in layout]
        self.masks: list[torch.Tensor | None] = []
        for prefix, *branches in layout:
            if len(branches) == 1:
                self.masks.append(None)
                continue
            mask = torch.ones(sum(branches), prefix + sum(branches), dtype=torch.bool)
            mask[:, prefix:] = torch.block_diag(*[torch.ones(length, length).tril() for length in branches]).bool()
            self.masks.append(to_device(mask, device))

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, dropout: float
    ) -> torch.Tensor:
        outputs = []
        # split, not slices: its backward joins the parts, where that of a slice fills a whole row with zeros.
        parts = (tensor.split(self.groups, dim=2) for tensor in (query, key, value))
        for (prefix, *branches), mask, q, k, v in zip(self.layout, self.masks, *parts, strict=True):
            if mask is None:
                outputs.append(_sdpa(q, k, v, scale, dropout))
                continue
            if prefix:
                head, q = q.split([prefix, sum(branches)], dim=2)
                outputs.append(_sdpa(head, k[:, :, :prefix], v[:, :, :prefix], scale, dropout))
            outputs.append(_sdpa(q, k, v, scale, dropout, mask=mask))
        return torch.cat(outputs, dim=1)


class OutputBackend:
    """SDPA group by group for the queries whose output is used: the last layer of a row in training.

    Args:
        outputs: their places in the row, ascending. The output of all others is zero.
    """

    def __init__(self, layout: Layout, outputs: Sequence[int], device: torch.device) -> None:
        self.outputs = to_device(torch.tensor(outputs), device)
        self.groups = [sum(group) for group in layout]
        starts = list(accumulate(self.groups, initial=0))
        cuts = [bisect_left(outputs, start) for start in starts]
        self.counts = [end - begin for begin, end in pairwise(cuts)]
        own = [
            torch.tensor([place - start for place in outputs[begin:end]], dtype=torch.int64)
            for start, (begin, end) in zip(starts, pairwise(cuts), strict=False)
        ]
        self.masks = [to_device(visible((group,), places), device) for group, places in zip(layout, own, strict=True)]

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, dropout: float
    ) -> torch.Tensor:
        queries = query.index_select(2, self.outputs).split(self.counts, dim=2)
        keys, values = (tensor.split(self.groups, dim=2) for tensor in (key, value))
        parts = zip(queries, keys, values, self.masks, strict=True)
        used = torch.cat([_sdpa(q, k, v, scale, dropout, mask=mask) for q, k, v, mask in parts if len(mask)], dim=1)
        whole = used.new_zeros(query.shape[0], query.shape[2], *used.shape[2:])
        return whole.index_copy(1, self.outputs, used)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    dropout: float,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """(1, queries, h, D); causal where there is no mask."""
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


class FlexBackend:
    """torch's FlexAttention: computes the blocks of 128 x 128 in which anything is seen. Needs a GPU to train."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        group, branch = _ids(layout, device)

        def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            own = (branch[key] == 0) | (branch[key] == branch[query])
            return (query >= key) & (group[query] == group[key]) & own

        tokens = len(group)
        self.block_mask = create_block_mask(sees, None, None, tokens, tokens, device=str(device))

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, dropout: float
    ) -> torch.Tensor:
        if dropout:
            raise ValueError("FlexAttention has no dropout")
        # Autocast does not know FlexAttention: rotated queries and keys come in float32 beside half values.
        query, key = query.to(value.dtype), key.to(value.dtype)
        output = _flex_attention(query.device.type)(
            query, key, value, block_mask=self.block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return output.transpose(1, 2)


@functools.cache
def _flex_attention(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Rows differ in length. On the CPU it is for comparison only and runs uncompiled. Needs a card: there is no
    # backward pass elsewhere, and the kernel is the compiler's own, in Triton, made for a card that it can ask.
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


# (query, key, value of (tokens, h, D), cu_seqlens of queries and keys, longest query and key, scale, dropout), causal
# with the last query at the last key.
VarlenKernel = Callable[..., torch.Tensor]


class VarlenBackend:
    """Variable-length flash attention: one call for all prefixes and branches.

    A branch needs its prefix's keys before its own, so where prefixes are shared, keys and values are gathered once a
    branch: more memory than FlexAttention, the same arithmetic as separate samples have.
    """

    def __init__(self, layout: Layout, device: torch.device, kernel: VarlenKernel) -> None:
        self.kernel = kernel
        tokens = sum(map(sum, layout))
        place = torch.arange(tokens)
        starts = list(accumulate((sum(group) for group in layout), initial=0))
        keys, queries, at = [], [], 0
        for group, branch, length in segments(layout):
            prefix = layout[group][0] if branch else 0
            keys.append(torch.cat([place[starts[group] : starts[group] + prefix], place[at : at + length]]))
            queries.append(length)
            at += length
        lengths = [len(piece) for piece in keys]
        self.max_query, self.max_key = max(queries), max(lengths)
        self.cu_query, self.cu_key = (
            to_device(torch.tensor(list(accumulate(sizes, initial=0)), dtype=torch.int32), device)
            for sizes in (queries, lengths)
        )
        self.gather = to_device(torch.cat(keys), device) if sum(lengths) > tokens else None  # [keys]

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, dropout: float
    ) -> torch.Tensor:
        # As in FlexBackend: autocast does not know this kernel.
        q, k, v = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))  # [T, h, D]
        if self.gather is not None:
            k, v = k[self.gather], v[self.gather]
        output = self.kernel(
            q, k, v, self.cu_query, self.cu_key, self.max_query, self.max_key, scale=scale, dropout=dropout
        )
        return output[None]


def _torch_varlen(*arguments: Any, scale: float | None, dropout: float) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError("torch's variable-length attention has no dropout")
    query, key, *_ = arguments
    fewer: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    # A window without a right side is torch's way to say causal. Needs a card: there is no kernel for the CPU.
    output: Any = varlen_attn(*arguments, window_size=(-1, 0), scale=scale, **fewer)
    return output  # a tensor, as nothing else is asked for


def _flash_attn_varlen(*arguments: Any, scale: float | None, dropout: float) -> torch.Tensor:
    # Needs a card: the package has no kernel for the CPU, and cannot be installed without CUDA.
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func(*arguments, softmax_scale=scale, dropout_p=dropout, causal=True)


# By the name that transformers knows each under.
BACKENDS: dict[str, Callable[[Layout, torch.device], Backend]] = {
    "packed_mask": MaskBackend,
    "packed_segments": SegmentBackend,
    "packed_flex": FlexBackend,
    "packed_varlen": functools.partial(VarlenBackend, kernel=_torch_varlen),
    "packed_fa2": functools.partial(VarlenBackend, kernel=_flash_attn_varlen),
}


@dataclass(frozen=True)
class PackedRow:
    """What the layers need to know of a packed row, made once a step."""

    backend: Backend
    position_ids: torch.Tensor  # [1, T] int64
    is_long: torch.Tensor  # [1, T] bool, see `uses_long_factors`


def prepare_row(layout: Layout, implementation: str, device: torch.device, long_context_start: int) -> PackedRow:
    """A row as the layers of a model with the attention ``implementation`` want it.

    Raises:
        ValueError: the implementation is not made for packed rows, or a group lies on both sides of LongRoPE's switch.
    """
    if implementation not in BACKENDS:
        raise ValueError(
            f"{implementation!r} attention cannot take packed rows: load the model with one of {[*BACKENDS]}"
        )
    is_long = uses_long_factors(layout, long_context_start)
    positions = to_device(position_ids(layout), device)
    return PackedRow(BACKENDS[implementation](layout, device), positions, to_device(is_long, device))


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_row: PackedRow | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' layers call: a packed row by its backend, any other by SDPA."""
    if packed_row is None:
        outputs: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return outputs
    return packed_row.backend(query, key, value, scaling, dropout), None


for _name in BACKENDS:
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)


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
