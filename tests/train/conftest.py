"""A little of easy-vqa, and runs of the real command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_helpers import Train

from phi3v.cli import main
from phi3v.data.convert import ConvertOptions
from phi3v.data.sources.easy_vqa import convert


@pytest.fixture(scope="session")
def easy_vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with all of easy-vqa and the small files ``train-48.jsonl`` and ``test-24.jsonl``."""
    folder = tmp_path_factory.mktemp("easy-vqa")
    files = convert(ConvertOptions(folder, progress=False)).files
    for split, count in (("train", 48), ("test", 24)):
        lines = files[split].read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{split}-{count}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path_factory.getbasetemp() / "phi3v-cache"))


@pytest.fixture
def train(tmp_path: Path, easy_vqa: Path, tiny_model_dir: Path) -> Train:
    """Run ``phi3v train`` on the small files in this process; returns its exit code and the run folder."""

    def run(*overrides: Any, out: str = "run") -> tuple[int, Path]:
        folder = tmp_path / out
        settings: dict[str, Any] = {
            "model.path": tiny_model_dir,
            "data.train": easy_vqa / "train-48.jsonl",
            "data.eval": easy_vqa / "test-24.jsonl",
            "data.num_workers": 0,
            "training.output_dir": folder,
            "training.max_steps": 6,
            "training.batch_size": 8,
            "training.micro_batch_size": 8,
            "training.learning_rate": 2e-3,
            "training.warmup_steps": 1,
            "training.logging_steps": 1,
            "evaluation.max_questions": 4,
            "evaluation.max_new_tokens": 4,
        }
        for name, value in zip(overrides[::2], overrides[1::2], strict=True):
            settings[name] = value
        arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return main(["train", *arguments]), folder

    return run
