"""Runs of the real command line on a little of easy-vqa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_helpers import Train

from phi3v.cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path_factory.getbasetemp() / "phi3v-cache"))


@pytest.fixture
def train(tmp_path: Path, easy_vqa: Path, small_model_dir: Path) -> Train:
    """Run ``phi3v train`` on the small files in this process; returns its exit code and the run folder."""

    def run(*overrides: Any, out: str = "run", resume: str | None = None) -> tuple[int, Path]:
        folder = tmp_path / out
        settings: dict[str, Any] = {
            "model.path": small_model_dir,
            "data.train": easy_vqa / "train.jsonl",
            "data.eval": easy_vqa / "test.jsonl",
            "data.num_workers": 0,
            "training.output_dir": folder,
            "training.max_steps": 3,
            "training.batch_size": 2,
            "training.micro_batch_size": 2,
            "training.learning_rate": 2e-3,
            "training.warmup_steps": 1,
            "training.logging_steps": 1,
            "evaluation.max_questions": 4,
            "evaluation.max_new_tokens": 4,
        }
        for name, value in zip(overrides[::2], overrides[1::2], strict=True):
            settings[name] = value
        arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return main(["train", *(["--resume", resume] if resume is not None else []), *arguments]), folder

    return run
