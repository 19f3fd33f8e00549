"""What a process takes from its environment, and what it does not."""

from __future__ import annotations

import os

import pytest
from run_helpers import Train, read_metrics

from phi3v.train.device import LAUNCHER, choose_compute


def test_accelerates_variables_change_nothing_unsaid(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, plain = train("data.eval", "null", out="plain")
    assert code == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    code, folder = train("data.eval", "null")
    assert code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "ACCELERATE_MIXED_PRECISION=bf16 in the environment is ignored" in shown
    assert "NVIDIA_TF32_OVERRIDE=1 in the environment rounds fp32 to TF32" in shown
    assert "DYNAMO" not in shown
    assert [line["loss"] for line in read_metrics(folder)] == [line["loss"] for line in read_metrics(plain)]


def test_a_launcher_of_one_process_launches_just_that(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.setenv(name, "1" if name.endswith("SIZE") else "0")
    compute = choose_compute("fp32")
    assert (compute.rank, compute.world_size) == (0, 1)
    assert not set(LAUNCHER) & set(os.environ)
