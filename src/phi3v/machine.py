"""What this machine offers a process."""

from __future__ import annotations

import os

# The CUDA compute capability from which on a GPU multiplies in float8: Ada (8.9), Hopper, Blackwell.
FLOAT8_CAPABILITY = (8, 9)


def available_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
