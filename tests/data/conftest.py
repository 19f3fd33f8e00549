"""Real images and a cache of its own for every test."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PHI3V_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ``datasets`` library keeps stays in the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="session")
def easy_vqa_data() -> Path:
    """The installed package's ``data/``."""
    spec = importlib.util.find_spec("easy_vqa")
    assert spec is not None
    assert spec.origin is not None, 'the tests need `pip install "phi3v[easy-vqa]"`'
    return Path(spec.origin).parent / "data"


@pytest.fixture
def drawing(easy_vqa_data: Path) -> Path:
    """A real 64x64 PNG."""
    return easy_vqa_data / "train" / "images" / "0.png"


@pytest.fixture
def root(tmp_path: Path, drawing: Path) -> Path:
    """A data folder's ``images/`` that holds ``train/0.png``."""
    folder = tmp_path / "data" / "images"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "0.png").write_bytes(drawing.read_bytes())
    return folder


WriteFile = Callable[..., Path]


@pytest.fixture
def write(root: Path) -> WriteFile:
    """Write lines (objects or raw strings) as ``data.jsonl`` beside ``images/``."""

    def write_file(*lines: Any, name: str = "data.jsonl") -> Path:
        path = root.parent / name
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """A good line, as an object; keywords change its only turn."""

    def make(name: str = "a", **turn: Any) -> dict[str, Any]:
        good = {"user": "what color is the shape?", "assistant": "blue", "images": ["train/0.png"]}
        return {"id": name, "source": "easy-vqa", "conversations": [good | turn]}

    return make
