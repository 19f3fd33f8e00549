"""Each rank saves its own part, and any engine on any number of ranks goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from resume_helpers import assert_same, assert_same_weights, interrupted_copy, lines
from run_helpers import read_metrics
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_runs import command

from phi3v.cli import main
from phi3v.train.checkpoint_folder import damage

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def run(ranks: int, model: Path, data: Path, out: Path, engine: str, *flags: str, **others: object) -> str:
    arguments = [*command(model, data, out, engine, **others), *flags]
    return run_ranks(ranks, main, arguments, folder=out.with_name(f"{out.name}-printed-{ranks}"))


def assert_same_sharded_run(one: Path, two: Path, last: int) -> None:
    """Two runs on the same ranks that came to the same, bit by bit."""
    assert lines(one) == lines(two)
    assert_same_weights(one / "final", two / "final")
    a, b = (folder / f"checkpoint-{last}" for folder in (one, two))
    assert_same_weights(a / "shards", b / "shards")
    assert_same_weights(a, b)  # random.safetensors
    states = [json.loads((folder / "state.json").read_text()) for folder in (a, b)]
    for state in states:
        del state["config"], state["progress"], state["versions"]
    assert states[0] == states[1]


def test_an_engine_goes_on_bit_by_bit(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    for engine in ENGINES:
        whole = tmp_path / engine
        shown = run(2, small_model_dir, easy_vqa, whole, engine)
        assert "checkpoints: sharded" in shown
        part = interrupted_copy(whole, 2, tmp_path / f"{engine}-part")
        shown = run(2, small_model_dir, easy_vqa, part, engine, "--resume")
        assert "after step 2" in shown
        assert_same_sharded_run(whole, part, last=4)


def test_engines_go_on_from_each_other(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    """A chain of engines and numbers of ranks against one process that was never interrupted.

    Float32 sums in another order: losses within 1e-5, as `test_engines` has it for other numbers of ranks.
    """
    run(1, small_model_dir, easy_vqa, tmp_path / "one", "auto", **{"training.max_steps": 7})
    out = tmp_path / "chain"
    chain = [("ddp", 2), ("zero2", 2), ("fsdp2", 3), ("zero3", 2), ("zero1", 3), ("auto", 1), ("fsdp2", 2)]
    for step, (engine, ranks) in enumerate(chain, 1):
        settings = {"training.max_steps": step, "checkpoint.save_steps": 1}
        shown = run(ranks, small_model_dir, easy_vqa, out, engine, "--resume", **settings)
        assert ("going on on" in shown) == (step > 1), shown
        state = json.loads((out / f"checkpoint-{step}" / "state.json").read_text())
        assert (state["engine"], state["optimizer"]["steps"]) == ("none" if ranks == 1 else engine, step)
    one, more = read_metrics(tmp_path / "one"), read_metrics(out)
    assert [line["step"] for line in more] == list(range(1, 8))
    assert [line["loss"] for line in more] == pytest.approx([line["loss"] for line in one], abs=1e-5)
