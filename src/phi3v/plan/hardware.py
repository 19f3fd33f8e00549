"""The hardware table: GPUs, Azure sizes, and the machine this runs on (`hardware.yaml` holds every figure)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from phi3v.config import read_yaml
from phi3v.errors import UserError
from phi3v.grammar import suggestion
from phi3v.machine import CPU, Accelerator, abilities, accelerator_of, available_cores

GIB = 2**30
# 16 lanes, one way, by generation: 8, 16 and 32 GT/s a lane with 128b/130b coding.
PCIE_GB_S = {3: 15.75, 4: 31.5, 5: 63.0}


@dataclass(frozen=True, kw_only=True)
class Gpu(Accelerator):
    """One accelerator, with what memory and speed depend on.

    Attributes:
        key: its name on the command line.
        memory_bytes: what a process may have of it.
        bandwidth_gb_s: memory bandwidth in 10**9 bytes a second; 0 where unknown.
        tflops: dense rate of half-precision products, in 10**12 operations a second (of a CPU: float32).
        host_gb_s: nominal rate of copies to the host, one way, in 10**9 bytes a second; 0 where unknown.
        source: where the figures are from.
    """

    key: str
    memory_bytes: int
    bandwidth_gb_s: float
    tflops: float
    source: str
    host_gb_s: float = 0.0

    @property
    def is_cpu(self) -> bool:
        return self.type == "cpu"


@dataclass(frozen=True)
class AzureSku:
    """An Azure size: what a node of it has, and what a quota request must name."""

    name: str
    series: str
    gpu: str
    gpus: int
    vcpus: int
    memory_gib: int
    family: str
    infiniband: bool = False
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for.

    Attributes:
        gpu: the accelerator, or a CPU standing as one.
        gpus: how many, over all nodes.
        nodes: of an Azure size.
        sku: the Azure size, if it was named.
    """

    gpu: Gpu
    gpus: int
    nodes: int = 1
    sku: AzureSku | None = None

    @property
    def label(self) -> str:
        """``8x NVIDIA A100 80 GB``."""
        return f"{self.gpus}x {self.gpu.name}"

    @property
    def quota(self) -> str | None:
        """What to ask Azure for, in a sentence."""
        if self.sku is None:
            return None
        text = (
            f"quota family {self.sku.family!r}: {self.sku.vcpus} vCPUs a node, {self.sku.vcpus * self.nodes} for "
            f"{self.nodes} node{'s' if self.nodes > 1 else ''} of {self.sku.name}"
        )
        return f"{text} ({self.sku.note})" if self.sku.note else text


@cache
def _table() -> dict[str, Any]:
    text = resources.files("phi3v.plan").joinpath("hardware.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = read_yaml(text)
    return table


@cache
def known_gpus() -> dict[str, Gpu]:
    """Every GPU of the table by its key."""
    return {key: _gpu(key, entry) for key, entry in _table()["gpus"].items()}


def _gpu(key: str, entry: dict[str, Any]) -> Gpu:
    capability = entry["capability"]
    able = abilities(tuple(int(part) for part in capability.split(".")) if capability else ())
    return Gpu(
        key=key,
        type="cuda",
        name=entry["name"],
        is_here=False,
        memory_bytes=int(entry["memory_gib"] * GIB),
        bandwidth_gb_s=float(entry["bandwidth_gb_s"]),
        tflops=float(entry["tflops"]),
        source=entry["source"],
        host_gb_s=PCIE_GB_S[entry["pcie"]],
        **{ability: entry.get(ability, value) for ability, value in able.items()},
    )


@cache
def azure_skus() -> dict[str, AzureSku]:
    """Every Azure size of the table by its name."""
    return {name: AzureSku(name=name, **entry) for name, entry in _table()["azure"].items()}


def cpu_machine() -> Machine:
    """The CPU of this machine."""
    entry = _table()["cpu"]
    cores = available_cores()
    memory = _memory_limit()
    gpu = Gpu(
        **vars(CPU) | {"name": f"CPU, {cores} cores"},
        key="cpu",
        memory_bytes=memory,
        bandwidth_gb_s=0.0,
        tflops=entry["tflops_per_core"] * cores,
        source=entry["source"],
    )
    return Machine(gpu, 1)


def _memory_limit() -> int:
    """Memory of this machine in bytes, or the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def this_machine() -> Machine:
    """The machine this runs on, as far as torch sees it."""
    import torch

    if not torch.cuda.is_available():
        return cpu_machine()
    found = torch.cuda.get_device_properties(0)
    known = _nearest(found.name, found.total_memory)
    gpu = Gpu(
        **vars(accelerator_of(torch.device("cuda", 0))),
        key=known.key if known else "unknown",
        memory_bytes=found.total_memory,
        bandwidth_gb_s=known.bandwidth_gb_s if known else 0.0,
        tflops=known.tflops if known else 0.0,
        host_gb_s=known.host_gb_s if known else 0.0,
        source=f"this machine; rates: {known.source}" if known else "this machine; its rates are not in the table",
    )
    return Machine(gpu, torch.cuda.device_count())


def _nearest(name: str, memory: int) -> Gpu | None:
    """The table's entry for a device name such as ``NVIDIA A100-SXM4-80GB``."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    fitting = [gpu for gpu in known_gpus().values() if gpu.key.split("-")[-1 if "rtx" in gpu.key else 0] in words]
    return min(fitting, key=lambda gpu: abs(gpu.memory_bytes - memory), default=None)


def find_gpu(name: str) -> Gpu:
    """The GPU called ``name``.

    Raises:
        UserError: the table has none of that name.
    """
    key = name.lower().replace("_", "-")
    if key == "cpu":
        return cpu_machine().gpu
    if key in known_gpus():
        return known_gpus()[key]
    known = [*known_gpus(), "cpu"]
    hint = suggestion(key, known, f"known are {', '.join(known)}")
    raise UserError(f"there is no GPU {name!r} in the table", where="--gpu", hint=hint)


def find_machine(gpu: str | None, gpus: int | None, sku: str | None = None, nodes: int = 1) -> Machine:
    """The machine that the command line names; by default this one.

    Args:
        gpu: a key of the table, also as ``8xa100-80gb``.
        gpus: how many.
        sku: an Azure size, in place of ``gpu``.
        nodes: how many of that size.

    Raises:
        UserError: the name is unknown, or the two ways are mixed.
    """
    if sku is not None:
        if gpu is not None or gpus is not None:
            raise UserError("an Azure size names its GPUs itself", where="--sku", hint="leave out --gpu and --gpus")
        found = {name.lower(): entry for name, entry in azure_skus().items()}.get(sku.lower())
        if found is None:
            hint = suggestion(sku, azure_skus(), f"known are {', '.join(azure_skus())}")
            raise UserError(f"there is no size {sku!r} in the table", where="--sku", hint=hint)
        return Machine(known_gpus()[found.gpu], found.gpus * nodes, nodes, found)
    if gpu is None:
        machine = this_machine()
        return machine if gpus is None else Machine(machine.gpu, gpus)
    counted = re.fullmatch(r"(\d+)x(.+)", gpu.lower())
    if counted and gpus is not None:
        raise UserError(f"{gpu} says how many already", where="--gpus", hint="leave it out")
    count = int(counted.group(1)) if counted else (gpus or 1)
    if count < 1:
        raise UserError("at least one GPU is needed", where="--gpus")
    return Machine(find_gpu(counted.group(2) if counted else gpu), count)
