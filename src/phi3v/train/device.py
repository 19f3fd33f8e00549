"""Which device and which precision a run uses, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata

import torch
from accelerate import PartialState
from accelerate.utils.environment import get_int_from_env
from torch import distributed

from phi3v.config import Precision, torch_dtype
from phi3v.errors import UserError
from phi3v.machine import CPU, Accelerator, accelerator_of, available_cores

# Where launchers tell how many ranks a machine has: torchrun and accelerate, MPI's three, Slurm.
LOCAL_RANKS = (
    "LOCAL_WORLD_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "SLURM_NTASKS_PER_NODE",
)


@dataclass(frozen=True)
class RuntimeDevice:
    """Where and in what a rank computes.

    Attributes:
        precision: bf16, fp16 or fp32.
        node_ranks: of this machine, this one among them; they share its cores and its memory.
    """

    device: torch.device
    precision: str
    reason: str
    rank: int
    world_size: int
    node_ranks: int = 1
    gpu: Accelerator = CPU

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.precision)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.precision == "fp32" else self.dtype


def choose_precision(wanted: Precision, gpu: Accelerator) -> tuple[str, str]:
    """The arithmetic and the reason for it.

    Raises:
        UserError: the device cannot compute in the precision asked for.
    """
    if gpu.type == "cpu":
        if wanted == "fp16":
            hint = "use fp32, or bf16 on a recent CPU"
            raise UserError("fp16 training needs a GPU, and there is none", where="training.precision", hint=hint)
        return ("fp32", "no GPU") if wanted == "auto" else (wanted, "as configured")
    if wanted == "auto":
        return ("bf16", f"{gpu.name} has it") if gpu.bf16 else ("fp16", f"{gpu.name} has no bf16")
    if wanted == "bf16" and not gpu.bf16:
        raise UserError(f"{gpu.name} has no bf16", where="training.precision", hint="use fp16")
    return wanted, "as configured"


def choose_device(wanted: Precision, *, timeout_minutes: float = 30.0) -> RuntimeDevice:
    """Device and precision of this process; under ``torchrun`` it joins the other ranks here.

    Args:
        timeout_minutes: how long a collective operation waits for the other ranks.

    Raises:
        UserError: the device cannot compute in the precision asked for.
    """
    ignored = _own_environment()
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        choose_precision(wanted, CPU)  # refused before the others are waited for
    told = get_int_from_env(LOCAL_RANKS, 0)  # before accelerate sets it
    state = PartialState(cpu=not has_gpu, timeout=timedelta(minutes=timeout_minutes))
    device = torch.device("cuda", state.local_process_index) if has_gpu else torch.device("cpu")
    gpu = accelerator_of(device)
    precision, reason = choose_precision(wanted, gpu)
    reason = f"{reason}; {ignored}" if ignored else reason
    ranks = state.num_processes
    node_ranks = min(told, ranks) if told > 0 else ranks
    return RuntimeDevice(device, precision, reason, state.process_index, ranks, node_ranks, gpu)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a device or of the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")  # of the host, CUDA and its libraries
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def default_workers(runtime: RuntimeDevice) -> int:
    """Reading processes of a rank: with a GPU its share of the machine's cores less one, at most 8.

    Without a GPU none: the computation has the cores already, and reading beside it costs more than it hides.
    """
    if runtime.device.type == "cpu":
        return 0
    return max(0, min(8, available_cores() // runtime.node_ranks - 1))


LIBRARIES = ("phi3v", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "tokenizers", "Pillow")


def library_versions() -> dict[str, str | None]:
    """The versions of this package and of those that it builds on; ``None`` of one that is not installed."""
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__  # with its build, which the package's metadata may lack
    return versions
