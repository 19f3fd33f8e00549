"""Which device and which precision a run uses, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import distributed

from phi3v.config import Precision
from phi3v.errors import UserError
from phi3v.machine import available_cores

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Compute:
    """Where and in what a rank computes."""

    device: torch.device
    precision: str  # bf16, fp16 or fp32
    reason: str
    rank: int
    world_size: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.precision == "fp32" else self.dtype


def choose_compute(wanted: Precision, *, timeout_minutes: float = 30.0) -> Compute:
    """Device and precision of this process; under ``torchrun`` it joins the other ranks here.

    Args:
        timeout_minutes: how long a collective operation waits for the other ranks.

    Raises:
        UserError: the device cannot compute in the precision asked for.
    """
    ignored = _own_environment()
    has_gpu = torch.cuda.is_available()
    if wanted == "fp16" and not has_gpu:
        raise UserError(
            "fp16 training needs a GPU, and there is none",
            where="training.precision",
            hint="use fp32, or bf16 on a recent CPU",
        )
    state = PartialState(cpu=not has_gpu, timeout=timedelta(minutes=timeout_minutes))
    rank, world_size = state.process_index, state.num_processes
    if not has_gpu:
        precision, reason = ("fp32", "no GPU") if wanted == "auto" else (wanted, "as configured")
        return Compute(torch.device("cpu"), precision, _joined(reason, ignored), rank, world_size)
    device = torch.device("cuda", state.local_process_index)
    name = torch.cuda.get_device_name(device)
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "auto":
        precision, reason = ("bf16", f"{name} has it") if has_bf16 else ("fp16", f"{name} has no bf16")
        return Compute(device, precision, _joined(reason, ignored), rank, world_size)
    if wanted == "bf16" and not has_bf16:
        raise UserError(f"{name} has no bf16", where="training.precision", hint="use fp16")
    return Compute(device, wanted, _joined("as configured", ignored), rank, world_size)


def _joined(reason: str, ignored: str) -> str:
    return f"{reason}; {ignored}" if ignored else reason


# What a launcher says to a process of several.
LAUNCHER = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")
# What lets libraries compute otherwise than the configuration says, unless it is 0.
ROUNDING = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


def _own_environment() -> str:
    """Let the configuration alone decide what is computed, and a launcher of one process launch just that.

    accelerate would take its settings out of the environment, and wrap a launcher's only process in DDP.

    Returns:
        What was set and does not count, or cannot be helped, as words; empty if nothing.
    """
    if os.environ.get("WORLD_SIZE") == "1" and not distributed.is_initialized():
        for name in LAUNCHER:
            os.environ.pop(name, None)
    words = []
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        value = os.environ.pop(name)
        if value.lower() not in ("no", "false", "0", ""):
            words.append(f"{name}={value} in the environment is ignored")
    words += [
        f"{name}={os.environ[name]} in the environment rounds fp32 to TF32"
        for name in ROUNDING
        if os.environ.get(name, "0") != "0"
    ]
    return "; ".join(words)


def default_workers(compute: Compute) -> int:
    """Reading processes of a rank: with a GPU the cores less one, shared by the ranks, at most 8.

    Without a GPU none: the computation has the cores already, and reading beside it costs more than it hides.
    """
    if compute.device.type == "cpu":
        return 0
    return max(0, min(8, available_cores() // compute.world_size - 1))
