"""Processors with the real tokenizer and with the tiny one."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3v import Phi3VImageProcessor, Phi3VProcessor
from phi3v.processing.tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_processor_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the files a processor needs, with the tiny tokenizer and num_crops 4. Read only."""
    folder = tmp_path_factory.mktemp("tiny_processor")
    save_tiny_tokenizer(folder)
    Phi3VImageProcessor(num_crops=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_processor(tiny_processor_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_processor_dir)


@pytest.fixture(scope="session")
def real_processor(real_tokenizer_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(real_tokenizer_dir, num_crops=4)
