"""Model inputs of one sample, and of several padded into one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

PAD = 0  # of the reference checkpoint; masked, so any id would do


@dataclass
class Sample:
    """One row of model inputs, without padding."""

    input_ids: torch.Tensor  # [1, T]
    pixel_values: torch.Tensor | None = None  # [N, C + 1, 3, 336, 336]
    image_sizes: torch.Tensor | None = None  # [N, 2]
    labels: torch.Tensor | None = None  # [1, T]

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def inputs(self) -> dict[str, torch.Tensor]:
        """Arguments of the model for this sample alone."""
        given = {"input_ids": self.input_ids, "attention_mask": torch.ones_like(self.input_ids)}
        if self.pixel_values is not None and self.image_sizes is not None:
            given |= {"pixel_values": self.pixel_values, "image_sizes": self.image_sizes}
        return given


def pad_batch(samples: list[Sample], side: str) -> dict[str, torch.Tensor]:
    """Arguments of the model for ``samples`` in one batch, padded ``left`` or ``right``."""
    width = max(sample.length for sample in samples)

    def padded(row: torch.Tensor, value: int) -> torch.Tensor:
        missing = width - row.shape[1]
        return functional.pad(row, (missing, 0) if side == "left" else (0, missing), value=value)

    given = {
        "input_ids": torch.cat([padded(sample.input_ids, PAD) for sample in samples]),
        "attention_mask": torch.cat([padded(torch.ones_like(sample.input_ids), 0) for sample in samples]),
    }
    images = [sample for sample in samples if sample.pixel_values is not None]
    if images:
        crops = max(sample.pixel_values.shape[1] for sample in images)
        given["pixel_values"] = torch.cat(
            [functional.pad(s.pixel_values, (0, 0) * 3 + (0, crops - s.pixel_values.shape[1])) for s in images]
        )
        given["image_sizes"] = torch.cat([sample.image_sizes for sample in images])
    return given
