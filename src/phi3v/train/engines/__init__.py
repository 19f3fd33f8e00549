"""How several processes train one model: DDP, DeepSpeed's ZeRO, FSDP2, behind one small interface."""

from __future__ import annotations

from typing import Any

from phi3v.config import RunConfig
from phi3v.train.device import RuntimeDevice
from phi3v.train.engines.base import MOMENTS, DeferredWrite, Engine
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.engines.data_parallel import DataParallel, to_host
from phi3v.train.engines.fsdp import FsdpEngine
from phi3v.train.engines.zero import ZeroEngine

__all__ = ["MOMENTS", "DataParallel", "DeferredWrite", "Engine", "FsdpEngine", "ZeroEngine", "make_engine", "to_host"]


def make_engine(model: Any, choice: EngineChoice, config: RunConfig, runtime: RuntimeDevice) -> Engine:
    """The engine for a loaded model that is not wrapped yet."""
    if choice.is_zero:
        return ZeroEngine(model, choice, config, runtime)
    if choice.name == "fsdp2":
        return FsdpEngine(model, choice, config, runtime)
    return DataParallel(model, choice, config, runtime)
