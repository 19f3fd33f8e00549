"""Rows of different lengths made into tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, side: str, length: int | None = None
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` (B, T) int64 of rows of any lengths, padded ``left`` or ``right``.

    Args:
        length: T, where the longest row is shorter.
    """
    length = max(length or 0, *(len(row) for row in rows))
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        input_ids[index, where] = torch.tensor(row, dtype=torch.int64)
        attention_mask[index, where] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def pad_offsets(offsets: list[tuple[int, int]], length: int, side: str) -> list[tuple[int, int]]:
    """Padding has no width, and the starts still ascend."""
    missing = length - len(offsets)
    if side == "left":
        return [(0, 0)] * missing + offsets
    end = offsets[-1][1] if offsets else 0
    return offsets + [(end, end)] * missing
