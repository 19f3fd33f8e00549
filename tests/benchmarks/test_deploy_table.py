"""The tables of docs/deploying.md are those of the committed figures, and computed sizes are what files have."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import deploy

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_tables_of_the_committed_figures() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "deploy.json").read_text(encoding="utf-8"))
    assert deploy.markdown(result) in (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
    # The same computation is within 3 % of the files of the model with the real tower and width.
    for name, row in result["tower"].items():
        assert row["size"] == pytest.approx(result["tower_computed"][name] * 1e9, rel=0.03), name


def test_computed_sizes_are_those_of_files() -> None:
    sizes = deploy.computed_sizes()
    # Measured at full size with random weights: model.safetensors of nf4, the shards of bf16.
    assert sizes["nf4"] * 1e9 == pytest.approx(3_084_070_944, rel=1e-3)
    assert sizes["hf"] * 1e9 == pytest.approx(8_293_242_880, rel=1e-6)


def test_one_format_that_is_refused_takes_no_figures_of_others_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*words: object, threads: int) -> dict[str, Any]:
        proof = tmp_path / "tuned" / "int8" / "proof"
        proof.mkdir(parents=True)
        (proof / "proof.json").write_text(json.dumps({"export": {"format": "int8", "size": 7}}))
        raise subprocess.CalledProcessError(2, "phi3v")

    monkeypatch.setattr(deploy, "phi3v", export)
    rows = deploy.measure_tuned(tmp_path, ["nf4", "int8"], tmp_path)
    assert rows == {"nf4": {"format": "nf4", "refused": True}, "int8": {"format": "int8", "size": 7}}
    monkeypatch.setattr(deploy, "phi3v", lambda *words, threads: {})
    with pytest.raises(SystemExit, match="was made"):
        deploy.measure_tuned(tmp_path, ["nf4"], tmp_path)
