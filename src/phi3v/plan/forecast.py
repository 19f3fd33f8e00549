"""What a run will take, in the line that it says before it begins."""

from __future__ import annotations

import logging
import math

from phi3v.config import RunConfig
from phi3v.plan.hardware import GIB, this_machine
from phi3v.plan.inputs import setup_from_config
from phi3v.plan.planner import Planner

logger = logging.getLogger("phi3v")

MANY_RECORDS = 20_000  # reading the headers of more takes longer than a line is worth


def forecast(config: RunConfig, records: int, world_size: int) -> str | None:
    """Steps, tokens, peak memory and time of a run on this machine; ``None`` where they are not known.

    Args:
        records: in the file to learn from.
        world_size: ranks of the run.
    """
    machine = this_machine()
    if records > MANY_RECORDS or world_size != machine.gpus:
        return None
    try:
        planner = Planner(config, progress=False)
        setup = setup_from_config(config, machine, planner.num_crops)
        memory, speed = planner.memory(setup, machine), planner.speed(setup, machine)
    except Exception:  # a line less is no reason to stop a run
        logger.warning("no forecast", exc_info=True)
        return None
    training = config.training
    samples = training.max_steps * training.batch_size if training.max_steps else math.ceil(records * training.epochs)
    tokens = samples * float(planner.workload.at(planner.num_crops).lengths.separate.mean())
    parts = [
        f"{samples:,} samples, about {tokens / 1e6:,.1f} million tokens",
        f"peak {memory.peak / GIB:.1f} of {machine.gpu.memory_bytes / GIB:.0f} GiB",
    ]
    if speed.samples_per_second:
        passes = samples + (records * speed.forward_share if config.objective.needs_reference else 0)
        parts.append(_duration(passes / speed.samples_per_second))
    return "; ".join(parts) + " (predicted)"


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"about {max(1, round(seconds / 60))} min"
    return f"about {seconds / 3600:.1f} h"
