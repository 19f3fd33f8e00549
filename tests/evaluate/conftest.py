"""All of easy-vqa, converted once."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3v.data.collate import QuestionDataset
from phi3v.data.sources.easy_vqa import convert_easy_vqa
from phi3v.data.table import open_table
from phi3v.processing.processor import Phi3VProcessor


@pytest.fixture(scope="session")
def easy_vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("easy-vqa")
    convert_easy_vqa(folder, progress=False)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path_factory.getbasetemp() / "phi3v-cache"))


@pytest.fixture
def pages(easy_vqa: Path, tiny_model_dir: Path) -> QuestionDataset:
    """Real questions, about ten in a row on the same picture."""
    return QuestionDataset(open_table(easy_vqa / "test.jsonl"), Phi3VProcessor.from_pretrained(tiny_model_dir))
