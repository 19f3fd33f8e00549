"""The job files of jobs/: their syntax and their commands; and that what they start goes on after it was killed."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import command, run_ranks
from run_helpers import read_metrics
from test_elastic import free_port
from torch.distributed.run import get_args_parser

from phi3v.config import load_config
from phi3v.grammar import find_recipe
from phi3v.train.checkpoint_folder import checkpoints, find_checkpoint

JOBS = Path(__file__).parents[2] / "jobs"
FILES = sorted(JOBS.iterdir())
STEPS = 24


def options_of(settings: dict[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def commands(text: str) -> list[list[str]]:
    """The words of every line of a script, joined where they go on, without comments."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if "phi3v train" in line]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_job_file_is_right(path: Path) -> None:
    """For the shell, for torchrun and for our own parser: the commands, and those that the comments show."""
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    (words,) = commands(text)
    if words[1] == "torchrun":
        own = [re.sub(r"\$\w+", "1", word) for word in words[2 : words.index("-m")]]
        known = get_args_parser().parse_args([*own, "script"])
        assert known.rdzv_backend == "c10d"
        words = words[words.index("train") :]
    else:
        inner = words[words.index("-c") + 1]
        words = shlex.split(inner.split("exec phi3v ")[1])
    assert words == ["train", "$@", "--resume", "auto"]
    shown = re.findall(rf"jobs/{path.name} RECIPE (.*?)\n#\n", text.replace("\\\n#", ""), re.DOTALL)
    assert shown
    for example in shown:
        config = load_config(find_recipe("docvqa_full"), shlex.split(example))
        assert (config.distributed.engine, config.distributed.replicas) == ("fsdp2", 2)


def test_options_of_sbatch_stand_where_it_reads_them() -> None:
    """Before the first command; the time for a save is shorter than the job."""
    lines = (JOBS / "slurm.sh").read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH --")]
    assert directives == list(range(1, len(directives) + 1))
    options = dict(lines[number].removeprefix("#SBATCH --").partition("=")[::2] for number in directives)
    assert options["signal"] == "USR1@300"
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "requeue" in options


def run_settings(model: Path, data: Path, out: Path) -> dict[str, object]:
    return {
        "model.path": model,
        "data.train": data / "train.jsonl",
        "data.num_workers": 0,
        "training.output_dir": out,
        "training.max_steps": STEPS,
        "training.batch_size": 2,
        "training.learning_rate": 2e-3,
        "training.logging_steps": 1,
        "checkpoint.save_steps": 4,
        "distributed.engine": "fsdp2",
    }


def descendants(pid: int) -> list[int]:
    """A process and all below it; torchrun's have sessions of their own."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid, *(each for child in below for each in descendants(int(child)))]


@contextlib.contextmanager
def started(words: list[Any], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A job in a process group of its own, which is taken away afterwards with all below it, as with its machine."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with log.open("ab") as file:
        job = subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        yield job
    finally:
        for pid in descendants(job.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait()


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert job.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.02)


def logged(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").is_file() else 0


@pytest.mark.slow
def test_a_job_of_torchrun_that_was_taken_away_twice(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    """Both times without a warning, as a machine: before there is a checkpoint, and after.

    The run folder is there and empty at first, as a mounted datastore. The newest checkpoint is damaged besides, and
    one is half written. The end is bit-equal to that of a run that was left alone.
    """
    run, log = tmp_path / "store" / "run", tmp_path / "log"
    run.mkdir(parents=True)
    settings = run_settings(small_model_dir, easy_vqa, run)
    words = ["bash", JOBS / "torchrun.sh", *options_of(settings)]
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # Two processes of this machine, each attempt with a store of its own.
    environment = {"GPUS": "2", "PATH": tools, "RESTARTS": "0"}

    with started(words, log, environment | {"PORT": str(free_port())}) as job:
        wait_until(lambda: logged(run) > 0, job, log)
    assert not checkpoints(run)
    with started(words, log, environment | {"PORT": str(free_port())}) as job:
        wait_until(lambda: len(checkpoints(run)) == 2, job, log)
    assert "no valid checkpoint in" in log.read_text()
    newest, older = checkpoints(run)[:2]
    damaged = next(newest.rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (run / ".checkpoint-99.new").mkdir()
    with started(words, log, environment | {"PORT": str(free_port())}) as job:
        assert job.wait(timeout=300) == 0, log.read_text()[-3000:]
    said = " ".join(log.read_text().split())
    assert f"skipped {newest}: {damaged.relative_to(newest)} is not what was written" in said
    assert f"resume: {older} (the newest valid checkpoint)" in said
    assert "removed a half-written checkpoint of step 99" in said
    assert [line["step"] for line in read_metrics(run)] == list(range(1, STEPS + 1))

    whole = tmp_path / "whole"
    alone = options_of(run_settings(small_model_dir, easy_vqa, whole))
    run_ranks(2, command, "train", *alone, folder=tmp_path / "printed")
    assert [line["loss"] for line in read_metrics(run)] == [line["loss"] for line in read_metrics(whole)]
    one, two = (sorted((folder / "final").glob("*.safetensors")) for folder in (run, whole))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


SRUN = """#!/usr/bin/env bash
trap 'kill -USR1 $tasks' USR1
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks="${tasks:-} $!"; done
highest=0
for task in $tasks; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; code=$?; done
    [ "$code" -gt "$highest" ] && highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) echo 127.0.0.1 ;; *) echo "$@" >> "$QUEUE" ;; esac
"""


@pytest.mark.slow
def test_a_job_of_slurm_is_queued_again(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    """Slurm's part is played by two scripts: two tasks, a USR1 to each ahead of the time limit."""
    tools, run, log, queue = tmp_path / "bin", tmp_path / "run", tmp_path / "log", tmp_path / "queue"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    assert shutil.which("phi3v", path=str(Path(sys.executable).parent))
    environment = {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "QUEUE": str(queue),
        "SLURM_JOB_NODELIST": "node0",
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    settings = run_settings(small_model_dir, easy_vqa, run) | {"checkpoint.save_steps": "null"}
    words = ["bash", JOBS / "slurm.sh", *options_of(settings)]
    with started(words, log, environment) as job:
        wait_until(lambda: logged(run) > 1, job, log)
        os.killpg(job.pid, signal.SIGUSR1)  # to the shell and srun too, which have to outlive it
        assert job.wait(timeout=200) == 3, log.read_text()[-3000:]
    assert queue.read_text().split() == ["requeue", environment["SLURM_JOB_ID"]]
    saved = find_checkpoint(run).folder
    assert saved is not None
    with started(words, log, environment) as job:
        assert job.wait(timeout=300) == 0, log.read_text()[-3000:]
    assert f"resume: {saved} (the newest valid checkpoint)" in " ".join(log.read_text().split())
    assert [line["step"] for line in read_metrics(run)] == list(range(1, STEPS + 1))
    assert len(queue.read_text().split()) == 2
