"""The sizes that a recipe fits, in order, with what a quota request must say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3v.azure.skus import FittedSku, fitted_skus
from phi3v.cli import main
from phi3v.config import ModelConfig, RunConfig
from phi3v.plan.hardware import azure_skus
from phi3v.plan.planner import Planner


@pytest.fixture(scope="module")
def full() -> list[FittedSku]:
    config = RunConfig()
    config.model.num_crops, config.training.batch_size = 16, 64
    return fitted_skus(Planner(config, progress=False))


def test_every_size_once_and_what_fits_first(full: list[FittedSku]) -> None:
    assert {entry.sku.name for entry in full} == set(azure_skus())
    fits = [entry.fits for entry in full]
    assert fits == sorted(fits, reverse=True)
    gpus = [entry.sku.gpus for entry in full if entry.fits]
    assert gpus == sorted(gpus)
    assert full[0].sku.gpus == 1
    for entry in full:
        assert entry.reason
        if entry.fits:
            assert entry.verdict.startswith("fits")
            assert entry.to_json_dict()["samples_per_second"] > 0


def test_full_fine_tuning_needs_a_large_card(full: list[FittedSku]) -> None:
    by_name = {entry.sku.name: entry for entry in full}
    assert by_name["Standard_NC40ads_H100_v5"].verdict == "fits"
    assert by_name["Standard_NC24ads_A100_v4"].verdict == "fits"
    assert not by_name["Standard_NC4as_T4_v3"].fits
    assert by_name["Standard_ND96amsr_A100_v4"].fits


def test_a_precision_that_a_card_lacks_is_its_reason(tiny_model_dir: Path) -> None:
    config = RunConfig(model=ModelConfig(path=str(tiny_model_dir)))
    config.training.precision = "bf16"
    found = {entry.sku.name: entry for entry in fitted_skus(Planner(config, progress=False))}
    assert "has no bf16" in found["Standard_ND40rs_v2"].reason
    assert found["Standard_ND40rs_v2"].verdict == "does not fit"


def test_the_command(tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model:\n  path: {tiny_model_dir}\n")
    command = ["azure", "skus", str(tmp_path / "recipe.yaml"), "--method.name", "lora"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "quota family 'Standard NCASv3_T4 Family', 4 vCPUs a node, 4 in all" in shown
    assert "phi3v azure quota --region REGION --sku Standard_NC4as_T4_v3 --request 4" in shown
    assert main([*command, "--nodes", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["method"] == "lora"
    assert all(entry["vcpus"] == 2 * entry["vcpus_a_node"] for entry in answer["skus"])
