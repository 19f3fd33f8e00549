"""The learning rate of short runs and of runs that go on for longer than they were planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from run_helpers import Train
from safetensors.torch import load_file
from transformers import get_scheduler

from phi3v.cli import main
from phi3v.config import RunConfig, TrainingConfig
from phi3v.train.run import run_training
from phi3v.train.schedule import describe_schedule, total_steps, warmup_steps
from phi3v.train.state import Observer, TrainState


@pytest.mark.parametrize(
    ("wanted", "total", "warmup"),
    [(None, 1, 0), (None, 9, 0), (None, 10, 1), (None, 499, 49), (None, 5000, 50), (5, 1, 0), (5, 2, 5), (5, 20, 5)],
)
def test_the_warm_up(wanted: int | None, total: int, warmup: int) -> None:
    assert warmup_steps(TrainingConfig(warmup_steps=wanted), total) == warmup


@pytest.mark.parametrize(
    ("wanted", "total", "verdict", "words"),
    [
        (None, 20, "pass", "rises over 2 steps (a tenth; the public recipe's 50 are for longer runs)"),
        (None, 5000, "pass", "rises over 50 steps"),
        (5, 20, "pass", "rises over 5 steps"),
        (5, 1, "warn", "that step's learning rate would be 0"),
        (50, 20, "warn", "takes 50 steps and the run has 20, so the learning rate only gets to 38% of its peak"),
    ],
)
def test_the_warm_up_in_words(wanted: int | None, total: int, verdict: str, words: str) -> None:
    finding = describe_schedule(TrainingConfig(warmup_steps=wanted), total)
    assert finding.verdict == verdict
    assert words in finding.what


def test_a_run_of_one_step_learns(
    train: Train, easy_vqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five records and the defaults, LoRA: one step, in which every adapter leaves its start."""
    (tmp_path / "images").symlink_to(easy_vqa / "images")
    lines = (easy_vqa / "train.jsonl").read_text().splitlines()[:5]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    settings = {"model.num_crops": 1, "method.name": "lora", "method.lora.rank": 4, "data.eval": "null"}
    settings |= {"data.train": tmp_path / "train.jsonl", "training.micro_batch_size": 1}
    settings |= dict.fromkeys(("training.max_steps", "training.warmup_steps"), "null")
    shown = (("null", "steps: 1, 1.00 epochs; no warm-up of the learning rate"), (3, "the run has one step"))
    for wanted, words in shown:
        settings |= {"training.batch_size": 16, "training.warmup_steps": wanted}
        code, folder = train(*(part for pair in settings.items() for part in pair), out=f"run-{wanted}")
        assert code == 0
        assert words in " ".join(capsys.readouterr().out.split())
        adapter = load_file(folder / "final" / "adapter_model.safetensors")
        moved = [bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name]
        assert moved
        assert all(moved)


class Rates(Observer):
    """The learning rate of every step, as the optimizer takes it."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_log(self, state: TrainState, values: dict[str, float]) -> None:
        self.found[state.step] = values["learning_rate"]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_finished_run_goes_on_by_the_longer_schedule(
    small_model_dir: Path, easy_vqa: Path, tmp_path: Path, schedule: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs, then four: from the first step on, the rate is that of a run of four."""
    (tmp_path / "images").symlink_to(easy_vqa / "images")
    lines = (easy_vqa / "train.jsonl").read_text().splitlines()[:6]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    config = RunConfig()
    config.model.path, config.data.train = str(small_model_dir), str(tmp_path / "train.jsonl")
    config.data.num_workers, config.checkpoint.save_steps = 0, 2
    config.method.name, config.method.lora.rank = "lora", 2
    training = config.training
    training.output_dir, training.schedule, training.learning_rate = str(tmp_path / "run"), schedule, 1e-3
    training.batch_size, training.epochs, training.warmup_steps, training.logging_steps = 1, 2.0, 2, 1
    assert total_steps(training, 6) == 12
    run_training(config, Console(quiet=True))
    training.epochs = 4.0
    rates = Rates()
    run_training(config, Console(), "auto", observers=[rates])
    assert "rate is that of a run planned for so many" in " ".join(capsys.readouterr().out.split())

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    whole = get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=24)
    expected = {}
    for step in range(1, 25):
        expected[step] = whole.get_last_lr()[0]
        optimizer.step()
        whole.step()
    assert rates.found == {step: expected[step] for step in range(13, 25)}


def test_the_doctor_says_it(
    small_model_dir: Path, easy_vqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"model.path": small_model_dir, "data.train": easy_vqa / "train.jsonl", "training.warmup_steps": 200}
    keys |= {"training.output_dir": tmp_path / "run", "method.name": "lora"}
    command = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    main(["doctor", "--json", *command])
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["schedule"]["verdict"] == "warn"
    assert "the warm-up takes 200 steps" in findings["schedule"]["what"]
