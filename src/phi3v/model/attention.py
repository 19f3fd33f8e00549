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

Shapes: ``T`` tokens of the row, ``D`` head size, ``h`` heads.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from phi3v.config import Attention
from phi3v.errors import UserError
from phi3v.machine import Accelerator

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

    # Rows differ in length. On the CPU it is for comparison only and runs uncompiled.
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
    # A window without a right side is torch's way to say causal.
    output: Any = varlen_attn(*arguments, window_size=(-1, 0), scale=scale, **fewer)
    return output  # a tensor, as nothing else is asked for


def _flash_attn_varlen(*arguments: Any, scale: float | None, dropout: float) -> torch.Tensor:
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


def choose_packed_attention(
    wanted: Attention, gpu: Accelerator, dtype: torch.dtype, *, shares_prefixes: bool
) -> tuple[str, str]:
    """The implementation for packed rows and the reason for it.

    Raises:
        UserError: what is asked for cannot run there.
    """
    names = {
        "eager": "packed_mask",
        "sdpa": "packed_segments",
        "flex": "packed_flex",
        "varlen": "packed_varlen",
        "flash_attention_2": "packed_fa2",
    }
    if wanted != "auto":
        obstacle = packed_obstacle(names[wanted], gpu, dtype)
        if obstacle is None:
            return names[wanted], "as configured"
        raise UserError(
            f"{wanted} cannot run: {obstacle}", where="model.attention", hint="leave it at auto, or use sdpa"
        )
    # FlexAttention reads a shared prefix where it lies; the others would copy its keys for every branch.
    order = ["packed_varlen", "packed_fa2", "packed_flex"]
    if shares_prefixes:
        order.insert(0, order.pop())
    obstacles: list[str] = []
    for name in order:
        obstacle = packed_obstacle(name, gpu, dtype)
        if obstacle is None:
            first = "rows share prefixes" if shares_prefixes else "rows of separate samples"
            return name, "; ".join([f"{first}, {dtype} on {gpu.name}", *obstacles])
        obstacles.append(obstacle)
    return "packed_segments", "; ".join(dict.fromkeys(obstacles))


def packed_obstacle(name: str, gpu: Accelerator, dtype: torch.dtype) -> str | None:
    """Why a backend cannot train on ``gpu`` in ``dtype``, or None."""
    if name in ("packed_mask", "packed_segments"):
        return None
    if gpu.type != "cuda":
        return f"flash and flex attention need a GPU, this is {gpu.type}"
    if name == "packed_flex":
        if not gpu.has("triton"):
            return "FlexAttention needs triton, which is not installed"
        return None if gpu.flash_attention else f"FlexAttention is not used on {gpu.name}"
    return flash_obstacle(gpu, dtype, "flash_attn" if name == "packed_fa2" else "torch.nn.attention.varlen")


def flash_obstacle(gpu: Accelerator, dtype: torch.dtype, module: str) -> str | None:
    """Why flash attention of ``module`` cannot run on ``gpu`` in ``dtype``, or None."""
    if gpu.type != "cuda":
        return f"flash attention needs a GPU, this is {gpu.type}"
    if not gpu.flash_attention:
        return f"flash attention has no kernels for {gpu.name}"
    if not gpu.has(module):
        return (
            "flash-attn is not installed" if module == "flash_attn" else "this torch has no variable-length attention"
        )
    return "flash attention does not compute in fp32" if dtype not in HALF else None
