"""Runs and exports whose cards are read and which are uploaded; and a hub to upload them to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_in_hub
import torch
from huggingface_hub import constants
from stand_in_hub import StandInHub

from phi3v.cli import main
from phi3v.export import make, proof


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHI3V_CACHE", str(tmp_path_factory.getbasetemp() / "phi3v-cache"))
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, small_model_dir: Path, easy_vqa: Path) -> Path:
    """A LoRA run with scores."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    settings: dict[str, Any] = {
        "model.path": small_model_dir,
        "data.train": easy_vqa / "train.jsonl",
        "data.eval": easy_vqa / "test.jsonl",
        "data.num_workers": 0,
        "method.name": "lora",
        "method.lora.rank": 4,
        "method.lora.also_train": "[projector]",
        "training.output_dir": folder,
        "training.max_steps": 2,
        "training.batch_size": 2,
        "training.micro_batch_size": 2,
        "training.learning_rate": 2e-2,
        "evaluation.metrics": "[accuracy, anls]",
        "evaluation.max_questions": 4,
        "evaluation.max_new_tokens": 2,
    }
    assert main(["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]) == 0
    return folder


def _answer_here(folder: Path, probes: list[proof.Probe], work: Path) -> proof.Answers:
    """A fresh process costs seconds, and tests/test_export.py starts one."""
    return proof.answer_probes(*proof.load_export(folder, torch.device("cpu")), probes)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "answer_in_fresh_process", _answer_here)


@pytest.fixture(scope="session")
def exports(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run merged, and its adapter alone. Read only."""
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "answer_in_fresh_process", _answer_here)
        for name, more in (("merged", []), ("adapter", ["--adapter"])):
            assert main(["export", str(run), "--out", str(folder / name), "--samples", "1", *more]) == 0
    return {name: folder / name for name in ("merged", "adapter")}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    """A hub that this process talks to, with a token that may write."""
    with stand_in_hub.running() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # files go by the LFS interface
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", stand_in_hub.TOKEN)
        yield hub
