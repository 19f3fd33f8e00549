"""Runs with packing, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from run_helpers import Train, read_metrics


@pytest.fixture
def questions(easy_vqa: Path) -> Path:
    """48 questions about a handful of pictures, a record each."""
    path = easy_vqa / "questions-48.jsonl"
    lines = (easy_vqa / "test.jsonl").read_text(encoding="utf-8").splitlines()[:48]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_packed_run(train: Train, questions: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    """Two epochs of three steps; learns, counts every sample, computes far fewer tokens, saves and measures."""
    code, folder = train(
        *("data.train", questions, "data.packing", "shared-image", "training.batch_size", 16, "training.epochs", 2),
        *("training.micro_batch_size", 1, "training.max_steps", 6, "method.name", method, "method.lora.rank", 8),
    )
    assert code == 0
    shown = capsys.readouterr().out
    assert "attention: packed_segments (" in shown
    assert "16 samples on 1 ranks in rows of at most 8192 tokens, shared-image packing (" in shown
    assert "3 steps an epoch" in shown
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["samples"] for line in lines] == [16, 32, 48, 64, 80, 96]
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-3)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["tokens"] < 96 * 330 / 2  # apart, each has 330 and more
    assert (folder / "eval_after.json").is_file()
    saved = folder / "final" / ("adapter_config.json" if method == "lora" else "config.json")
    assert "packed" not in saved.read_text()  # how it was trained is no property of what was


def test_tokens_a_step(train: Train, questions: Path) -> None:
    code, folder = train(
        *("data.train", questions, "data.packing", "samples", "training.batch_tokens", 1500),
        *("training.micro_batch_size", 1, "training.max_steps", 2, "evaluation.before", "false"),
        *("evaluation.after", "false"),
    )
    assert code == 0
    tokens = [line["tokens"] for line in read_metrics(folder)]
    assert 1100 < tokens[0] < 1900
    assert 2500 < tokens[1] < 3500


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.packing", "samples"], "training.micro_batch_size: packed rows are filled by tokens"),
        (["training.batch_tokens", "5000"], "training.batch_tokens: only packed rows can be counted in tokens"),
        (["data.packing", "pages"], "packing"),
        (["model.attention", "varlen"], "varlen is for packed rows only"),
        (
            ["model.attention", "varlen", "data.packing", "samples", "training.micro_batch_size", "1"],
            "varlen cannot run: flash and flex attention need a GPU",
        ),
    ],
)
def test_settings_that_do_not_fit(
    train: Train, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    code, folder = train(*overrides)
    assert code == 2
    assert not folder.exists()
    assert message in capsys.readouterr().err


def test_packing_keeps_the_order_of_padded_batches(train: Train, questions: Path) -> None:
    """Where no picture is shared the runs are the same, but for rounding; eight steps an epoch, twelve in all."""
    runs = []
    for packing, micro in (("none", 3), ("samples", 1)):
        code, folder = train(
            *("data.train", questions, "data.packing", packing, "training.batch_size", 6, "training.max_steps", 12),
            *("training.micro_batch_size", micro, "evaluation.before", "false", "evaluation.after", "false"),
            out=packing,
        )
        assert code == 0
        runs.append(read_metrics(folder))
    padded, packed = ([(line["questions"], line["loss"]) for line in run] for run in runs)
    assert len(padded) == 12
    # Losses are logged with four decimals; twelve steps of Adam let float32's rounding grow a little.
    assert np.array(packed) == pytest.approx(np.array(padded), abs=5e-4)


def test_packing_learns_what_padded_batches_learn(train: Train, questions: Path) -> None:
    """The same records in a step give the same first loss and gradient norm: one step over all 48."""
    first = {}
    for packing, micro in (("none", 8), ("shared-image", 1)):
        code, folder = train(
            *("data.train", questions, "data.packing", packing, "training.batch_size", 48, "training.max_steps", 1),
            *("training.micro_batch_size", micro, "evaluation.before", "false", "evaluation.after", "false"),
            out=packing,
        )
        assert code == 0
        (first[packing],) = read_metrics(folder)
    for name in ("loss", "grad_norm", "samples", "questions"):
        # Losses are logged with four decimals.
        assert first["shared-image"][name] == pytest.approx(first["none"][name], abs=1e-4, rel=1e-5)
    assert json.dumps(first["none"]) != json.dumps(first["shared-image"])
