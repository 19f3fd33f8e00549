"""The commands of the public recipe, as written, on two processes without a GPU and the stand-ins of the datasets.

Added are only the model, the data where there is no hub, and a few flags that make a run small. ``torchrun`` itself
starts one command; the ranks of the others are forked (`ranks`), which saves the seconds of importing.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from ranks import script as run_script

from phi3v.data.check import check_file

RECIPES = Path(__file__).parents[2] / "recipes"
# The smallest that still is the command: one picture is 2 crops in place of 17.
SMALL = ("--num_crops", "1")


def run(command: list[str], cwd: Path, *, code: int = 0) -> str:
    """Run a command and return what it said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def torchrun(script: str, *flags: str, launcher: tuple[str, ...] = ("--standalone",)) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *launcher, script, *flags]


def fork(script: str, *flags: str, folder: Path, ranks: int = 2, cwd: Path = RECIPES) -> str:
    """Run a script of the recipe, or its module, on so many forked ranks and return what it said."""
    arguments = (str(RECIPES / script) if script.endswith(".py") else script, flags, str(cwd))
    return run_ranks(ranks, run_script, *arguments, folder=folder / "ranks", codes=[0] * ranks)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def check_run(folder: Path, metrics: list[str], questions: int, *, method: str, precision: str) -> dict[str, Any]:
    """What every script leaves behind; returns ``eval_after.json``."""
    measured: dict[str, Any] = {}
    for when in ("before", "after"):
        measured = json.loads((folder / f"eval_{when}.json").read_text(encoding="utf-8"))
        assert measured["metric"] == metrics[0]
        assert list(measured["scores"]) == metrics
        assert measured["score"] == measured["scores"][metrics[0]]["value"]
        # Two processes share the questions, and each is asked once.
        assert len(set(measured["ids"])) == len(measured["generated_texts"]) == len(measured["answers"]) == questions
    written = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert written["world_size"] == 2
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    assert f"  name: {method}\n" in config
    assert f"  precision: {precision}\n" in config
    is_adapter = method.endswith("lora")
    assert (folder / "final" / ("adapter_model.safetensors" if is_adapter else "model.safetensors")).is_file()
    assert (folder / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 1  # one step
    return measured


def keep_two_frames(file: Path) -> None:
    """Of the eight, for time."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for record in records:
        turn = record["conversations"][0]
        turn["images"] = turn["images"][::7]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_docvqa_minimal(stand_in_data: Path, small_model_dir: Path, tmp_path: Path) -> None:
    """As of an installed package, from another folder than the scripts', with every default."""
    said = fork(
        "phi3v.recipes.finetune_hf_trainer_docvqa",
        *("--model_name_or_path", str(small_model_dir), "--data_dir", str(stand_in_data / "docvqa"), *SMALL),
        folder=tmp_path,
        cwd=tmp_path,
    )
    assert "fp16, which needs a GPU" in said
    check_run(tmp_path / "output", ["anls"], 2, method="full", precision="fp32")


def test_docvqa_full_train(stand_in_data: Path, small_model_dir: Path, tmp_path: Path) -> None:
    data = str(stand_in_data / "docvqa")
    out = tmp_path / "out"
    said = fork(
        "finetune_hf_trainer_docvqa.py",
        *("--full_train", "--bf16", "--use_flash_attention", "--batch_size", "64", "--output_dir", str(out)),
        *("--learning_rate", "5e-6", "--num_train_epochs", "1"),
        *("--model_name_or_path", str(small_model_dir), "--data_dir", data, *SMALL),
        folder=tmp_path,
    )
    assert "sdpa (flash attention needs a GPU" in said
    check_run(out, ["anls"], 2, method="full", precision="bf16")


def test_nlvr2(stand_in_data: Path, small_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fork(
        "finetune_hf_trainer_nlvr2.py",
        *("--bf16", "--use_flash_attention", "--batch_size", "64", "--output_dir", str(out)),
        *("--model_name_or_path", str(small_model_dir), "--data_dir", str(stand_in_data / "nlvr2"), *SMALL),
        folder=tmp_path,
    )
    check_run(out, ["accuracy", "consistency"], 2, method="full", precision="bf16")


def test_hateful_memes_on_a_named_node(stand_in_data: Path, small_model_dir: Path, tmp_path: Path) -> None:
    command = torchrun(
        "finetune_hf_trainer_hateful_memes.py",
        *("--output_dir", str(tmp_path), "--batch_size", "64", "--use_flash_attention", "--bf16"),
        *("--use_lora", "--use_qlora"),
        launcher=("--nnodes=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}", "--node_rank=0"),
    )
    data = str(stand_in_data / "hateful_memes")
    run([*command, "--model_name_or_path", str(small_model_dir), "--data_dir", data, *SMALL], RECIPES)
    measured = check_run(tmp_path, ["accuracy", "auroc"], 2, method="qlora", precision="bf16")
    assert {answer for answers in measured["answers"] for answer in answers} == {"Yes", "No"}


def test_ucf101_from_clips_to_scores(stand_ins: Path, small_model_dir: Path, tmp_path: Path) -> None:
    clips, data = tmp_path / "clips", tmp_path / "ucf101"
    shutil.copytree(stand_ins / "ucf101" / "clips", clips)
    (clips / "train" / "Still" / "broken.avi").write_bytes(b"no clip")
    said = fork("convert_ucf101.py", "--out_dir", str(data), "--source", str(clips), folder=tmp_path, ranks=1)
    assert "skipped: 1" in said
    assert "broken.avi" in said
    assert {path.name for path in data.glob("*.jsonl")} == {
        f"ucf101_{split}.jsonl" for split in ("train", "val", "test")
    }
    assert (data / "images" / "train" / "Still" / "v_Still_g01_c01.7.jpg").is_file()
    assert check_file(data / "ucf101_train.jsonl").ok

    for file in data.glob("*.jsonl"):
        keep_two_frames(file)
    fork(
        *("finetune_hf_trainer_ucf101.py", "--data_dir", str(data), "--output_dir", str(tmp_path / "out")),
        *("--model_name_or_path", str(small_model_dir), *SMALL),
        folder=tmp_path,
    )
    check_run(tmp_path / "out", ["accuracy", "per_class_accuracy"], 2, method="full", precision="fp32")


@pytest.mark.slow  # the message is tested with the recipe, torchrun with `phi3v train`
def test_what_is_wrong_ends_every_process_with_one_message(tmp_path: Path) -> None:
    said = run(torchrun(str(RECIPES / "finetune_hf_trainer_nlvr2.py"), "--batch_size", "3"), tmp_path, code=1)
    assert said.count("error: ") == 1
    assert "--batch_size: 3 samples per step cannot be split over 2 devices" in said
    assert "exitcode  : 2" in said
