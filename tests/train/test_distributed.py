"""A run on two real processes comes to what one process comes to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks
from run_helpers import read_metrics

from phi3v.cli import main


def launch(ranks: int, method: str, model: Path, data: Path, out: Path, **others: object) -> str:
    settings = {
        "model.path": model,
        "data.train": data / "train.jsonl",
        "data.eval": data / "test.jsonl",
        "data.num_workers": 0,
        "method.name": method,
        "method.lora.rank": 8,
        "training.output_dir": out,
        "training.max_steps": 3,
        "training.batch_size": 4,
        "training.micro_batch_size": 1,
        "training.learning_rate": 2e-3,
        "training.warmup_steps": 1,
        "training.logging_steps": 1,
        "evaluation.max_questions": 5,  # does not divide by two
        "evaluation.max_new_tokens": 3,
        "evaluation.batch_size": 2,
    } | {name.replace("__", "."): value for name, value in others.items()}
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return run_ranks(ranks, main, ["train", *arguments], folder=out.with_name(f"{out.name}-printed"))


@pytest.mark.parametrize("method", ["full", "frozen-vision", "lora"])
def test_two_ranks_agree_with_one(tmp_path: Path, small_model_dir: Path, easy_vqa: Path, method: str) -> None:
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path / f"ranks-{ranks}"
        launch(ranks, method, small_model_dir, easy_vqa, folders[ranks])
    assert json.loads((folders[2] / "environment.json").read_text())["world_size"] == 2
    one, two = (read_metrics(folders[ranks]) for ranks in (1, 2))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        # Float32 sums in another order, carried through three optimizer steps.
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert (b["samples"], b["questions"], b["tokens"]) == (a["samples"], a["questions"], a["tokens"])
    scored = [json.loads((folders[ranks] / "eval_before.json").read_text()) for ranks in (1, 2)]
    # Before training the weights are equal, so the answers are, and every question is answered once.
    assert scored[0]["ids"] == scored[1]["ids"]
    assert len(set(scored[0]["ids"])) == 5
    assert scored[0]["generated_texts"] == scored[1]["generated_texts"]


def test_ranks_keep_and_stop_together(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    """Nothing an untrained model says in two steps is right, so the second and third measurement stop every rank."""
    shown = launch(
        *(2, "full", small_model_dir, easy_vqa, tmp_path / "run"),
        training__max_steps=30,
        training__learning_rate=1e-6,
        evaluation__eval_steps=1,
        evaluation__keep_best="true",
        evaluation__early_stopping_patience=2,
        evaluation__metrics="[accuracy, anls]",
    )
    lines = [line for line in read_metrics(tmp_path / "run") if "eval" in line]
    assert [(line["step"], line["best"]) for line in lines] == [(1, True), (2, False), (3, False)]
    assert lines[0]["eval"]["accuracy"]["n"] == 5
    assert shown.count("stopping at step 3") == 1
    assert "final/ holds the weights of step 1" in shown
    after = json.loads((tmp_path / "run" / "eval_after.json").read_text())
    assert after["scores"]["anls"]["value"] == lines[0]["eval"]["anls"]["value"]
    assert (tmp_path / "run" / "best" / "manifest.json").is_file()


@pytest.mark.parametrize("count", [5, 1])
def test_ranks_share_an_evaluation(tmp_path: Path, small_model_dir: Path, easy_vqa: Path, count: int) -> None:
    """Shares that are uneven, and fewer questions than ranks."""
    results = []
    for ranks in (1, 2):
        out = tmp_path / f"ranks-{ranks}"
        arguments = [str(small_model_dir), "--data", str(easy_vqa / "test.jsonl"), "--max-questions", str(count)]
        metrics = ["--metrics", "anls", "consistency", "--max-new-tokens", "3", "--batch-size", "2"]
        command = ["eval", *arguments, *metrics, "--out", str(out), "--json"]
        printed = json.loads(run_ranks(ranks, main, command, folder=tmp_path / f"printed-{ranks}"))
        written = json.loads((out / "eval.json").read_text())
        assert printed["scores"] == written["scores"]
        results.append(
            {key: written[key] for key in ("ids", "generated_texts", "scores")}
            | {"lines": (out / "predictions.jsonl").read_text()}
        )
    assert results[0] == results[1]
    assert len(set(results[0]["ids"])) == count


def test_a_wrong_configuration_ends_every_rank(tmp_path: Path, small_model_dir: Path) -> None:
    """Under ``torchrun``, which ends the others: one message, and no rank left waiting."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        "phi3v",
        "train",
    ]
    command += ["--model.path", str(small_model_dir), "--data.train", str(tmp_path / "nowhere.jsonl")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode != 0
    # On a busy machine another rank may be asked to end so late that it has spoken too, as "error on rank 1".
    assert len(re.findall(r"^error: .*nowhere\.jsonl: ", result.stderr, re.MULTILINE)) == 1
    assert "exitcode  : 2" in result.stderr
