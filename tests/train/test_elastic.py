"""Two machines under ``torchrun``: two agents of one process each, in separate folders, that share no files."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from resume_helpers import assert_same_run
from run_helpers import read_metrics

from phi3v.train.checkpoint_folder import find_checkpoint

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def agents(work: Path, launch: list[list[str]], settings: dict[str, object]) -> list[subprocess.Popen[str]]:
    """An agent a machine, each in its own folder ``node-N``."""
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    started = []
    for node, own in enumerate(launch):
        folder = work / f"node-{node}"
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *own]
        command += ["-m", "phi3v", "train", *options, "--resume", "auto"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PHI3V_CACHE": str(folder / "cache")}
        # docs/resume.md says why.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with (work / f"printed-{node}").open("a") as log:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
            )
        started.append(process)
    return started


def run_settings(model: Path, data: Path, steps: int) -> dict[str, object]:
    return {
        "model.path": model,
        "data.train": data / "train.jsonl",
        "data.num_workers": 0,
        "method.name": "lora",
        "method.lora.rank": 4,
        "method.lora.dropout": 0.2,
        "training.output_dir": "run",  # in the folder of each machine
        "training.max_steps": steps,
        "training.batch_size": 2,
        "training.micro_batch_size": 1,
        "training.learning_rate": 2e-3,
        "training.logging_steps": 1,
        "checkpoint.save_steps": 2,
        "checkpoint.keep_last": 3,
    }


def worker_of(agent: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return int(children[0])


def wait_for(condition: object, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.05)


def wait_for_all(started: list[subprocess.Popen[str]], work: Path) -> None:
    try:
        codes = [agent.wait(timeout=400) for agent in started]
    finally:
        for agent in started:
            agent.kill()
    assert codes == [0, 0], "\n".join((work / f"printed-{node}").read_text()[-3000:] for node in range(2))


def test_a_worker_is_killed_and_the_group_goes_on(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    steps = 30
    settings = run_settings(small_model_dir, easy_vqa, steps)
    endpoint = f"127.0.0.1:{free_port()}"
    c10d = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=test", "--max-restarts=2"]
    c10d += ["--monitor-interval=0.2", "--local-addr=127.0.0.1"]
    work = tmp_path / "killed"
    work.mkdir()
    started = agents(work, [c10d, c10d], settings)

    def folder() -> Path | None:
        """The machine of rank 0, which the rendezvous chooses."""
        return next((work / f"node-{n}" for n in range(2) if (work / f"node-{n}" / "run").is_dir()), None)

    def has_logged(step: int) -> bool:
        first = folder()
        if first is None or not (first / "run" / "metrics.jsonl").is_file():
            return False
        return max((line["step"] for line in read_metrics(first / "run")), default=0) >= step

    try:
        wait_for(lambda: has_logged(5))
        os.kill(worker_of(started[1]), signal.SIGKILL)
    except BaseException:
        for agent in started:
            agent.kill()
        raise
    wait_for_all(started, work)
    first = folder()
    assert first is not None
    other = work / f"node-{1 - int(first.name[-1])}"
    assert sorted(path.name for path in other.iterdir()) == ["cache"]  # only rank 0 writes a run folder
    printed = " ".join("".join((work / f"printed-{node}").read_text() for node in range(2)).split())
    assert "the newest valid checkpoint), after step" in printed
    assert len(json.loads((first / "run" / "environment.json").read_text())["resumed"]) >= 1
    assert [line["step"] for line in read_metrics(first / "run")] == list(range(1, steps + 1))

    # The same without a kill, with a static rendezvous.
    whole = tmp_path / "whole"
    whole.mkdir()
    port = free_port()
    static = [[f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"] for node in range(2)]
    wait_for_all(agents(whole, static, settings), whole)
    assert (whole / "node-0" / "run" / "final" / "manifest.json").is_file()
    assert sorted(path.name for path in (whole / "node-1").iterdir()) == ["cache"]
    assert_same_run(whole / "node-0" / "run", first / "run", last=steps)


def test_torchrun_passes_a_signal_on(tmp_path: Path, small_model_dir: Path, easy_vqa: Path) -> None:
    """SIGTERM to an agent, as a cluster sends it: every rank saves and ends, and no process stays."""
    settings = run_settings(small_model_dir, easy_vqa, 400) | {"checkpoint.save_steps": "null"}
    port = free_port()
    static = [[f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"] for node in range(2)]
    started = agents(tmp_path, static, settings)
    run = tmp_path / "node-0" / "run"
    try:
        wait_for(lambda: (run / "metrics.jsonl").is_file() and len(read_metrics(run)) > 2)
        workers = [worker_of(agent) for agent in started]
        started[0].send_signal(signal.SIGTERM)
        for agent in started:
            agent.wait(timeout=120)
    finally:
        for agent in started:
            agent.kill()
    found = find_checkpoint(run).folder
    assert found is not None
    assert int(found.name.split("-")[1]) == read_metrics(run)[-1]["step"]
    assert "stopped by SIGTERM after step" in (tmp_path / "printed-0").read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
