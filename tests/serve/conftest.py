"""A small tuned model to ask."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phi3v.cli import main
from phi3v.serve.conversation import Chat
from phi3v.train.device import choose_device
from phi3v.train.finetuned import resolve_model


@pytest.fixture(scope="session")
def tuned_run(tmp_path_factory: pytest.TempPathFactory, easy_vqa: Path, small_model_dir: Path) -> Path:
    """The folder of a short LoRA run on easy-vqa, evaluated on four questions."""
    folder = tmp_path_factory.mktemp("chat") / "run"
    settings = {
        "model.path": small_model_dir,
        "data.train": easy_vqa / "train.jsonl",
        "data.eval": easy_vqa / "test.jsonl",
        "data.num_workers": 0,
        "method.name": "lora",
        "method.lora.rank": 8,
        "training.output_dir": folder,
        "training.max_steps": 4,
        "training.batch_size": 2,
        "training.micro_batch_size": 2,
        "training.learning_rate": 5e-3,
        "training.warmup_steps": 1,
        "evaluation.max_questions": 4,
        "evaluation.max_new_tokens": 6,
    }
    before = os.environ.get("PHI3V_CACHE")
    os.environ["PHI3V_CACHE"] = str(tmp_path_factory.getbasetemp() / "phi3v-cache")
    try:
        assert main(["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]) == 0
    finally:
        if before is None:
            del os.environ["PHI3V_CACHE"]
        else:
            os.environ["PHI3V_CACHE"] = before
    return folder


@pytest.fixture(scope="session")
def chat(tuned_run: Path) -> Chat:
    """The run, loaded to be asked."""
    return Chat(resolve_model(str(tuned_run)), choose_device("fp32"))
