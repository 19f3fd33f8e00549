"""What the tests of runs share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi3v.config import MethodConfig, ModelConfig, Precision, RunConfig
from phi3v.train.device import choose_device
from phi3v.train.methods.loading import inspect_model, load_for_training

# Runs `phi3v train` with `name, value, name, value, …` over small defaults; gives the exit code and the run folder.
Train = Callable[..., tuple[int, Path]]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def load(folder: Path, method: MethodConfig, precision: Precision = "fp32"):  # type: ignore[no-untyped-def]
    """The model as a run would get it."""
    config = RunConfig(model=ModelConfig(path=str(folder)), method=method)
    runtime = choose_device(precision)
    return load_for_training(config, inspect_model(config, runtime), runtime)
