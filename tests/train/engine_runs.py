"""What the ranks of the engines' tests run."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from rich.console import Console
from safetensors.torch import load_file

from phi3v.config import RunConfig, load_config
from phi3v.train import prepare as preparation
from phi3v.train.engines.base import WrongEngineError
from phi3v.train.engines.fsdp import FsdpEngine
from phi3v.train.run import run_training
from phi3v.train.state import Observer, TrainState


def settings(engine: str, model: Path, data: Path, out: Path, *, replicas: int = 1) -> RunConfig:
    values = {
        "model.path": model,
        "data.train": data / "train.jsonl",
        "data.num_workers": 0,
        "training.output_dir": out,
        "training.max_steps": 3,
        "training.batch_size": 2 * replicas,
        "training.learning_rate": 2e-3,
        "distributed.engine": engine,
        "distributed.replicas": replicas,
    }
    return load_config(None, [part for name, value in values.items() for part in (f"--{name}", str(value))])


class SaveAndLoad(Observer):
    """Saves after two steps and, after a third, loads what was saved."""

    def __init__(self, folder: Path) -> None:
        self.engine: Any = None
        self.folder = folder
        self.weights: dict[str, torch.Tensor] | None = None
        self.compared = 0

    def on_step(self, state: TrainState) -> None:
        engine = self.engine
        is_first = PartialState().is_main_process
        early, late = self.folder / "early", self.folder / "late"
        if state.step == 2:
            self.weights = engine.full_state_dict()
            assert (self.weights is not None) == is_first
            early.mkdir(parents=True, exist_ok=True)
            engine.save_optimizer(early)()
        if state.step == 3:
            moved = engine.full_state_dict()
            engine.load_full_state_dict(self.weights)
            engine.load_optimizer(early if is_first else None)
            back = engine.full_state_dict()
            late.mkdir(parents=True, exist_ok=True)
            engine.save_optimizer(late)()
            if is_first:
                assert self.weights is not None
                assert moved is not None
                assert back is not None
                assert any(not torch.equal(moved[name], back[name]) for name in back)
                assert all(torch.equal(self.weights[name], back[name]) for name in back)
                one, two = (load_file(folder / "optimizer.safetensors") for folder in (early, late))
                assert one.keys() == two.keys()
                assert len(one) == 2 * sum(p.requires_grad for p in engine.model.parameters())
                assert all(torch.equal(one[name], two[name]) for name in one)
                assert (early / "schedule.json").read_text() == (late / "schedule.json").read_text()
            self.compared += 1


def save_and_load(engine: str, replicas: int, model: Path, data: Path, out: Path) -> None:
    observer = SaveAndLoad(out.with_name("state"))
    make = preparation.make_engine

    def make_and_keep(*args: Any) -> Any:
        observer.engine = make(*args)
        return observer.engine

    with mock.patch.object(preparation, "make_engine", make_and_keep):
        config = settings(engine, model, data, out, replicas=replicas)
        run_training(config, Console(quiet=True), observers=[observer])
    assert observer.compared == 1


def train_undivided(model: Path, data: Path, out: Path) -> None:
    """FSDP that silently does nothing, as accelerate's on the CPU."""
    with (
        mock.patch.object(FsdpEngine, "wrap"),
        pytest.raises(WrongEngineError, match="the engine is fsdp2, but what trains is"),
    ):
        run_training(settings("fsdp2", model, data, out), Console(quiet=True))
