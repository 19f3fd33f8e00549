"""What the configuration says reaches what runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Train, read_metrics

from phi3v.train import prepare as preparation
from phi3v.train import prepare as prepare_module
from phi3v.train import run as run_module
from phi3v.train.loop import TrainingLoop


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[TrainingLoop]:
    """The loops that runs make."""
    made: list[TrainingLoop] = []

    class Spy(TrainingLoop):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(run_module, "TrainingLoop", Spy)
    return made


def test_settings_reach_optimizer_schedule_and_loss(train: Train, loops: list[TrainingLoop]) -> None:
    code, folder = train(
        *("training.adam_beta1", 0.8, "training.adam_beta2", 0.97, "training.adam_epsilon", 1e-6),
        *("training.weight_decay", 0.3, "training.learning_rate", 0.004, "training.warmup_steps", 2),
        *("training.max_steps", 6, "training.batch_size", 1, "training.micro_batch_size", 1),
        *("training.max_grad_norm", 0.25, "training.loss_weighting", "token"),
        *("training.activation_checkpointing", "full", "evaluation.before", "false", "evaluation.after", "false"),
    )
    assert code == 0
    loop = loops[0]
    optimizer = loop.engine.optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.97), 1e-6, 0.3)
    # Linear: up over two steps, then down to zero over four.
    rates = [line["learning_rate"] for line in read_metrics(folder)]
    assert rates == pytest.approx([0.0, 0.002, 0.004, 0.003, 0.002, 0.001])
    assert min(line["grad_norm"] for line in read_metrics(folder)) > 0.25  # so that it is clipped
    dataset: Any = loop.readers.fetch.__self__  # type: ignore[attr-defined]
    assert dataset.loss_weighting == "token"
    layers = loop.engine.model.model.layers
    assert all(layer.gradient_checkpointing for layer in layers)
    assert not (folder / "eval_before.json").exists()
    assert not (folder / "eval_after.json").exists()


def test_checkpointing_is_chosen_by_memory_and_the_reason_is_said(
    train: Train, loops: list[TrainingLoop], capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model fits anywhere."""
    assert train("training.max_steps", 1, "data.eval", "null")[0] == 0
    assert not any(layer.gradient_checkpointing for layer in loops[0].engine.model.model.layers)
    shown = capsys.readouterr().out
    assert re.search(
        r"activation checkpointing: none \(\d[\d,]* tokens and 2 crops at a time need about .* GB are free\)", shown
    )
    # Of packed rows, a full one, of records with the most crops for their tokens: one in about 400.
    settings = ("data.packing", "samples", "data.pack_tokens", 2000, "training.micro_batch_size", 1)
    assert train("training.max_steps", 1, "data.eval", "null", *settings, out="packed")[0] == 0
    shown = capsys.readouterr().out
    assert "none (2,000 tokens and 5 crops at a time need about" in shown


def test_every_run_checks_its_gradients(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model with a detached decoder must not start, and must not touch the run folder."""
    load = preparation.load_for_training

    def detached(*args: Any) -> Any:
        model = load(*args)
        model.model.layers[2].register_forward_hook(lambda module, args, output: output.detach())
        return model

    monkeypatch.setattr(preparation, "load_for_training", detached)
    code, folder = train()
    assert code == 2
    assert "gradient check" in capsys.readouterr().err
    assert not folder.exists()


def test_reading_in_worker_processes_changes_nothing(train: Train) -> None:
    runs = [train("data.num_workers", count, "training.max_steps", 3, out=str(count)) for count in (0, 2)]
    assert [code for code, _ in runs] == [0, 0]
    losses = [[line["loss"] for line in read_metrics(folder)] for _, folder in runs]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("when", ["before the start", "before it is read"])
def test_an_image_that_vanishes_is_named(
    train: Train,
    tmp_path: Path,
    easy_vqa: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """Where lengths are counted, and by a process that reads ahead."""
    images = tmp_path / "data" / "images" / "train"
    images.mkdir(parents=True)
    lines = (easy_vqa / "train.jsonl").read_text().splitlines()[:4]
    for line in lines:
        name = json.loads(line)["conversations"][0]["images"][0]
        (images / Path(name).name).write_bytes((easy_vqa / "images" / name).read_bytes())
    file = images.parents[1] / "data.jsonl"
    file.write_text("\n".join(lines) + "\n")
    settings = ("data.train", file, "data.eval", "null", "data.image_check", "off", "data.num_workers", 1)
    last = Path(json.loads(lines[-1])["conversations"][0]["images"][0]).name
    if when == "before the start":
        (images / last).unlink()
    else:
        monkeypatch.setattr(prepare_module, "check_gradients", lambda *_, **__: (images / last).unlink() or 1)
    code, _ = train(*settings)
    assert code == 2
    error = capsys.readouterr().err
    assert "data.jsonl:4: conversations[0].images[0]" in error
    assert "Traceback" not in error


def test_special_text_can_be_escaped(train: Train, easy_vqa: Path) -> None:
    lines = [json.loads(line) for line in (easy_vqa / "train.jsonl").read_text().splitlines()[:8]]
    lines[3]["conversations"][1]["user"] = "what does <|end|> mean?"
    file = easy_vqa / "special.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ("data.train", file, "data.eval", "null", "training.max_steps", 1)
    assert train(*settings)[0] == 2
    assert train(*settings, "data.special_text", "escape")[0] == 0
