"""Real questions to answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3v.data.collate import QuestionDataset
from phi3v.data.table import open_table
from phi3v.processing.processor import Phi3VProcessor


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path_factory.getbasetemp() / "phi3v-cache"))


@pytest.fixture
def pages(easy_vqa: Path, tiny_model_dir: Path) -> QuestionDataset:
    """Real questions, about ten in a row on the same image."""
    return QuestionDataset(open_table(easy_vqa / "test.jsonl"), Phi3VProcessor.from_pretrained(tiny_model_dir))
