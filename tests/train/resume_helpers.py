"""What the tests of checkpoints share: a part of a run to go on from, and what two runs must have in common."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from run_helpers import read_metrics
from safetensors.torch import load_file

# Of a line of metrics.jsonl; these are measured.
MEASURED = ("seconds", "eval_seconds", "peak_memory_gb")


def interrupted_copy(run: Path, step: int, target: Path) -> Path:
    """A run folder as it was when the process was killed some time after the checkpoint of ``step``."""
    target.mkdir()
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "log.txt"):
        shutil.copy2(run / name, target / name)
    shutil.copytree(run / f"checkpoint-{step}", target / f"checkpoint-{step}")
    return target


def lines(run: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what the clock and the machine say."""
    return [
        {key: value for key, value in line.items() if key not in MEASURED and not key.endswith("_per_second")}
        for line in read_metrics(run)
    ]


def assert_same(one: Any, two: Any, where: str = "") -> None:
    """Nested values that are equal bit by bit."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype, where
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert one == two, where


def assert_same_weights(one: Path, two: Path) -> None:
    """Two folders of safetensors files that are equal bit by bit."""
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files
    assert files == sorted(path.name for path in two.glob("*.safetensors"))
    for name in files:
        assert_same(load_file(one / name), load_file(two / name), name)


def assert_same_run(one: Path, two: Path, last: int) -> None:
    """Two runs that came to the same, bit by bit: weights, optimizer, schedule, random numbers, losses, counts."""
    assert lines(one) == lines(two)
    assert_same_weights(one / "final", two / "final")
    a, b = (run / f"checkpoint-{last}" for run in (one, two))
    files = {path.relative_to(a).as_posix() for path in a.rglob("*") if path.is_file()}
    assert files == {path.relative_to(b).as_posix() for path in b.rglob("*") if path.is_file()}
    for name in sorted(files - {"manifest.json", "metrics.jsonl"}):
        if name.endswith(".safetensors"):
            assert_same(load_file(a / name), load_file(b / name), name)
        elif name.endswith(".pt"):
            assert_same(*(torch.load(folder / name, weights_only=True) for folder in (a, b)), name)
        elif name == "state.json":
            states = [json.loads((folder / name).read_text()) for folder in (a, b)]
            for state in states:
                del state["config"], state["progress"], state["versions"]
            assert_same(*states)
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
