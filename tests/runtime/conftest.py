"""Graphs of a small model, made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3v.model.presets import copy_pretrained

LONG = 480  # tokens from which on the model uses LongRoPE's long factors: few, so that the tests are cheap


@pytest.fixture(scope="session")
def trained_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny base, whose answers depend on its images, so that a wrong graph does not go unnoticed."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    copy_pretrained("tiny", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["original_max_position_embeddings"] = LONG
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def openvino_dir(trained_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its graphs for OpenVINO with weights as they are."""
    pytest.importorskip("openvino", reason="needs the extra openvino")
    from phi3v.export.formats.openvino import write

    folder = tmp_path_factory.mktemp("openvino")
    write(trained_dir, folder, None)
    return folder
