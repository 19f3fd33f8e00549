"""A run on shards in a bucket: killed in the middle of an epoch and gone on with, while the server fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
from bucket import BUCKET, Server
from PIL import Image
from resume_helpers import assert_same_run
from run_helpers import read_metrics

from phi3v.cli import main

RANKS = 2
PAGES = 24


@pytest.fixture
def in_bucket(tmp_path: Path, server: Server) -> str:
    """The URL of shards that the command made, each with two questions to each of its pages."""
    (tmp_path / "images").mkdir()
    lines = []
    for page in range(PAGES):
        pixels = np.random.default_rng(page).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{page}.png")
        for question in ("Which page?", "Which number?"):
            turn = {"images": [f"{page}.png"], "user": question, "assistant": str(page)}
            lines.append({"id": f"{page} {question}", "conversations": [turn]})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["data", "shard", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "shards"), "--shard-size", "22KB"]
    assert main(words) == 0
    for file in (tmp_path / "shards").iterdir():
        boto3.client("s3").upload_file(str(file), BUCKET, f"train/{file.name}")
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 6
    return f"s3://{BUCKET}/train"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    assert main(["model", "init", "--preset", "tiny", "--out", str(tmp_path / "model")]) == 0
    return tmp_path / "model"


def train(model: Path, data: str, out: Path, disk: Path, *more: str, kill_at: int | None = None) -> list[int]:
    """``phi3v train`` on two ranks, each with two readers and a disk of its own; their exit codes.

    Args:
        kill_at: the step at which all processes get SIGKILL, as when their machine dies.
    """
    settings = {
        "model.path": model,
        "data.train": data,
        "data.num_workers": 2,
        "data.shuffle_window": 4,
        "training.output_dir": out,
        "training.epochs": 2,
        "training.batch_size": 4,
        "training.learning_rate": 2e-3,
        "training.logging_steps": 1,
        "checkpoint.save_steps": 2,
        "checkpoint.keep_last": 100,
    }
    words = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    disk.mkdir()
    ranks = []
    for rank in range(RANKS):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PHI3V_CACHE": f"{disk}/{rank}", "OMP_NUM_THREADS": "1"}
        with (disk / f"printed-{rank}").open("w") as printed:
            command = [sys.executable, "-m", "phi3v", "train", *words, *more]
            ranks.append(
                subprocess.Popen(
                    command, env=os.environ | group | own, stdout=printed, stderr=printed, start_new_session=True
                )
            )
    end = time.monotonic() + 500
    metrics = out / "metrics.jsonl"
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if kill_at is not None and metrics.is_file() and metrics.read_text().count("\n") >= kill_at:
                break
            time.sleep(0.005)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)  # its readers too
    return [rank.wait() for rank in ranks]


def test_a_run_on_a_bucket_that_was_killed_goes_on_bit_for_bit(
    tmp_path: Path, model: Path, in_bucket: str, server: Server
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(model, in_bucket, whole, tmp_path / "disk-1") == [0] * RANKS
    steps = read_metrics(whole)[-1]["step"]
    assert steps == 2 * (2 * PAGES // 4)

    def faults(path: str, times: int) -> tuple[int, str] | float | None:
        """Each shard is away, the bucket is gone, the server is busy, and then it is slow."""
        if path.endswith(".tar"):
            return {1: (404, "NoSuchBucket"), 2: (503, "SlowDown"), 3: (500, "InternalError")}.get(times, 0.1)
        return None

    server.requests.clear()
    server.faults = faults
    assert train(model, in_bucket, killed, tmp_path / "disk-2", kill_at=7) == [-signal.SIGKILL] * RANKS
    assert not (killed / "final").exists()
    done = len(read_metrics(killed))
    assert 7 <= done < steps // 2, "in the middle of an epoch"
    server.requests.clear()
    again = train(model, in_bucket, killed, tmp_path / "disk-3", "--resume", "auto")
    assert again == [0] * RANKS, (tmp_path / "disk-3" / "printed-0").read_text()[-3000:]
    assert max(times for path, times in server.requests.items() if path.endswith(".tar")) > 3
    assert_same_run(whole, killed, steps)


def test_an_index_made_here_of_tars_in_a_bucket_trains_as_theirs_does(
    tmp_path: Path, model: Path, in_bucket: str
) -> None:
    assert main(["data", "shard", in_bucket, "--index-only", "--out", str(tmp_path / "index")]) == 0
    assert main(["data", "check", in_bucket]) == 0
    assert main(["data", "check", str(tmp_path / "index")]) == 0
    more = ("--training.max_steps", "4")
    losses = []
    for place, data in enumerate((in_bucket, str(tmp_path / "index"))):
        out = tmp_path / f"out-{place}"
        assert train(model, data, out, tmp_path / f"disk-{place}", *more) == [0] * RANKS
        losses.append([line["loss"] for line in read_metrics(out)])
    assert losses[0] == losses[1]
