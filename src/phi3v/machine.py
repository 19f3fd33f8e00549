"""What a machine offers a process: this one, or one from the planner's hardware table."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A GPU or the CPU.

    Attributes:
        type: torch's device type.
        flash_attention, four_bit, float8: whether there are kernels for it.
        is_here: it is in this machine, whose installed packages count; other machines are assumed to have all.
    """

    type: Literal["cuda", "cpu"]
    name: str
    bf16: bool
    flash_attention: bool
    four_bit: bool
    float8: bool
    is_here: bool = True

    def has(self, module: str) -> bool:
        """Whether a package is installed there."""
        return not self.is_here or importlib.util.find_spec(module) is not None


CPU = Accelerator(type="cpu", name="the CPU", bf16=True, flash_attention=False, four_bit=True, float8=False)


def abilities(capability: tuple[int, ...], *, is_amd: bool = False) -> dict[str, bool]:
    """What a GPU of this CUDA compute capability supports; FP8 has not been tried on AMD GPUs and is refused there.

    bf16 and flash attention: Ampere (8.0) and newer; 4-bit weights: Turing (7.5), as Microsoft's recipe recommends;
    float8 products: Ada (8.9), Hopper, Blackwell.
    """
    return {
        "bf16": capability >= (8, 0),
        "flash_attention": capability >= (8, 0),
        "four_bit": capability >= (7, 5),
        "float8": capability >= (8, 9) and not is_amd,
    }


def accelerator_of(device: Any) -> Accelerator:
    """The accelerator of a ``torch.device`` of this machine."""
    if device.type == "cpu":
        return CPU
    import torch

    capability = torch.cuda.get_device_capability(device)  # needs a card: the driver tells
    able = abilities(capability, is_amd=torch.version.hip is not None)
    return Accelerator(type="cuda", name=torch.cuda.get_device_name(device), **able)


def available_cores() -> int:
    """Number of cores that this process may use, which in a container may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
