"""The rows of `phi3v bench train` and the settings that they share; read by the command line, so nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from phi3v.config import MethodName, Precision

Variant = Literal["recipe", "recipe-flash", "padded", "samples", "shared-image", "lean"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
BASELINES: tuple[Variant, ...] = ("recipe", "recipe-flash")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        variant: ``recipe`` (eager attention) and ``recipe-flash`` (flash-attn, or torch's own flash kernel where that
            is not installed) as the public recipe trains; ``padded`` batches; packed rows of ``samples`` or
            ``shared-image``; ``lean``: padded in lean mode.
    """

    method: MethodName
    variant: Variant

    @property
    def name(self) -> str:
        return f"{self.method} {self.variant}"


@dataclass(frozen=True)
class BenchSettings:
    """What all rows of a table have in common.

    Attributes:
        batch_size: samples of an optimizer step over all devices.
        steps: steps that are timed, after one that is not.
        seconds: a row ends after so many, at the end of a step.
        micro_batch: samples at a time of ``padded``.
        lean_batch: samples of a step of ``lean``, which takes them at once.
        optimizer: ``auto``: adamw; for full and frozen-vision on a GPU adamw_8bit, or adamw_bf16 where bitsandbytes is
            not installed. ``lean`` takes adamw_8bit unless this is adamw_bf16.
        compile: our variants compile their layers.
        memory_gb: 10**9 bytes of the GPU that torch may take; None for all.
        profile: one more step is profiled, see `profile.summarize_trace`.
    """

    batch_size: int = 64
    steps: int = 5
    seconds: float = 600.0
    num_crops: int = 16
    micro_batch: int = 2
    lean_batch: int = 2
    pack_tokens: int = 8192
    shared_image_max: int = 8
    rank: int = 64
    precision: Precision = "auto"
    optimizer: Literal["auto", "adamw", "adamw_8bit", "adamw_bf16"] = "auto"
    fp8: bool = False
    kernels: Literal["torch", "liger"] = "torch"
    compile: bool = False
    memory_gb: float | None = None
    profile: bool = False
