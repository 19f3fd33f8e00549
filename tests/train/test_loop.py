"""The training loop itself: what a step waits for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from device_reads import DeviceReads
from rich.console import Console
from torch.utils._python_dispatch import _disable_current_modes

from phi3v.config import load_config
from phi3v.data.readers import Readers
from phi3v.train.collectives import HostCollectives
from phi3v.train.device import choose_device
from phi3v.train.loop import TrainingLoop
from phi3v.train.observers.faults import StepFaults
from phi3v.train.prepare import prepare
from phi3v.train.state import Observer, TrainState


class ReadsByStep(Observer):
    def __init__(self, counted: DeviceReads) -> None:
        self.counted = counted
        self.of_step: dict[int, Counter[str]] = {}

    def on_step(self, state: TrainState) -> None:
        self.of_step[state.step], self.counted.found = self.counted.found, Counter()


@pytest.mark.parametrize("packing", ["none", "samples", "shared-image"])
def test_a_step_reads_nothing_from_the_device(
    small_model_dir: Path, easy_vqa: Path, tmp_path: Path, packing: str
) -> None:
    """But for logging, at the first step."""
    keys = {
        "model.path": small_model_dir,
        "data.train": easy_vqa / "train.jsonl",
        "data.packing": packing,
        "data.num_workers": 0,
        "data.pack_tokens": 700,
        "training.output_dir": tmp_path / "run",
        "training.batch_size": 4,
        "training.micro_batch_size": 2 if packing == "none" else 1,
        "training.max_steps": 4,
        "training.logging_steps": 100,
        "training.activation_checkpointing": "full",
    }
    config = load_config(None, [part for key, value in keys.items() for part in (f"--{key}", str(value))])
    setup = prepare(config, Console(quiet=True), choose_device("fp32"), HostCollectives(1))
    dataset = setup.dataset()

    def read(plan: Any) -> Any:
        with _disable_current_modes():  # data is read on the host
            return dataset[plan]

    counted = DeviceReads()
    reads = ReadsByStep(counted)
    loop = TrainingLoop(setup, Readers(read), StepFaults(setup), observers=[reads])
    with counted:
        loop.run()
    assert reads.of_step[1]  # the mode sees what is read
    assert [reads.of_step[step] for step in (2, 3, 4)] == [Counter()] * 3
