"""What a save costs each of several ranks, whole (rank 0 gathers and writes) and sharded (each writes its part).

    python benchmarks/checkpoints.py                # benchmarks/results/checkpoints.json
    python benchmarks/checkpoints.py --cases fsdp2:4 zero3:2
    python benchmarks/checkpoints.py --quick        # to see that it works

Processes of a gloo group train a model of some twenty-five million parameters in full and save every few steps. Of each
rank:

- the bytes that it wrote: of files in its checkpoints, by whoever wrote them;
- the stall: what `Checkpointer.save` takes of the thread that trains, waiting for the others included, beside what a
  step without a save takes on the same rank. Both in wall time and in CPU time of that thread.

On a machine whose ranks share cores and disk, as here, the writing threads compete with training, so the steps after a
save are longer too; they are counted apart. Wall times of such ranks say which part of a save is waited for, not how
fast a machine is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench_result import ROOT, write_between_marks, write_result
from faults import write_data
from phi3v.cli import main as phi3v
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.presets import init_model, preset_config
from phi3v.train.checkpoint_folder import checkpoints
from phi3v.train.checkpoints.writer import Checkpointer
from phi3v.train.loop import TrainingLoop

_CONTEXT = multiprocessing.get_context("forkserver")
OUT = ROOT / "benchmarks" / "results" / "checkpoints.json"
MARKS = ("<!-- checkpoints -->", "<!-- /checkpoints -->")
EVERY = 4  # steps from save to save
LEAVE_OUT = 2  # steps at the beginning


def make_model(folder: Path, *, wide: int) -> int:
    """The tiny model with a decoder ``wide`` times as wide; gives its number of parameters."""
    init_model("tiny", folder)
    tiny = preset_config("tiny")
    config = type(tiny).from_pretrained(
        str(folder),
        hidden_size=wide * tiny.hidden_size,
        intermediate_size=wide * tiny.intermediate_size,
        num_attention_heads=wide * tiny.num_attention_heads,
        num_key_value_heads=wide * tiny.num_key_value_heads,
        num_hidden_layers=4,
    )
    torch.manual_seed(0)
    model = Phi3VForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def measure_rank(settings: dict[str, object], environment: dict[str, str], log: str, out: str) -> None:
    """Train as a rank of a group, and write what the steps and saves took to ``out``."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    steps: list[dict[str, float]] = []
    save, compute = Checkpointer.save, TrainingLoop._take
    last: list[tuple[float, float]] = []

    def take(self: Any, source: Any) -> Any:
        """Steps are told apart where the rows of the next one are taken."""
        now = time.perf_counter(), time.thread_time()
        if last:
            steps.append({"wall": now[0] - last[0][0], "cpu": now[1] - last[0][1], "save_wall": 0.0, "save_cpu": 0.0})
            steps[-1] |= saved
            saved.clear()
        last[:] = [now]
        return compute(self, source)

    saved: dict[str, float] = {}

    def timed(self: Any, state: Any) -> None:
        began = time.perf_counter(), time.thread_time()
        save(self, state)
        saved.update(save_wall=time.perf_counter() - began[0], save_cpu=time.thread_time() - began[1])

    arguments = ["train", *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]
    with (
        open(log, "w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        mock.patch.object(Checkpointer, "save", timed),
        mock.patch.object(TrainingLoop, "_take", take),
    ):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = phi3v(arguments)
        Path(out).write_text(json.dumps(steps))
    sys.exit(code)


def run(work: Path, ranks: int, engine: str, form: str, steps: int) -> dict[str, Any]:
    """One run; gives what its saves cost."""
    name = f"{engine}-{form}-{ranks}"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    settings: dict[str, object] = {
        "model.path": work / "model",
        "data.train": work / "data" / "train.jsonl",
        "data.num_workers": 0,
        "method.name": "full",
        "distributed.engine": engine,
        "training.output_dir": work / name,
        "training.max_steps": steps,
        "training.batch_size": ranks,
        "training.micro_batch_size": 1,
        "training.logging_steps": 1,
        "checkpoint.save_steps": EVERY,
        "checkpoint.keep_last": 1,
        "checkpoint.format": form,
    }
    processes = []
    for rank in range(ranks):
        environment = dict(os.environ) | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": "1",
        }
        log, out = (str(work / f"{name}-{rank}.{kind}") for kind in ("txt", "json"))
        process = _CONTEXT.Process(target=measure_rank, args=(settings, environment, log, out), daemon=True)
        process.start()
        processes.append(process)
    for rank, process in enumerate(processes):
        process.join(900)
        if process.exitcode != 0:
            raise RuntimeError((work / f"{name}-{rank}.txt").read_text()[-3000:])
    measured = [json.loads((work / f"{name}-{rank}.json").read_text())[LEAVE_OUT:] for rank in range(ranks)]
    return {
        "engine": engine,
        "format": form,
        "ranks": ranks,
        "bytes_written": written(checkpoints(work / name)[0], ranks),
        "per_rank": [costs(own) for own in measured],
    }


def written(checkpoint: Path, ranks: int) -> list[int]:
    """The bytes of a checkpoint that each rank wrote."""
    sizes = [0] * ranks
    for path in (path for path in checkpoint.rglob("*") if path.is_file()):
        rank = int(path.name.split("-")[1]) - 1 if path.parent.name == "shards" else 0
        sizes[rank] += path.stat().st_size
    return sizes


def costs(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of one rank: what saves take of the training thread, beside steps without one."""
    saves = [step for step in steps if step["save_wall"] > 0.001]
    after = [steps[index + 1] for index, step in enumerate(steps[:-1]) if step in saves]
    plain = [step for step in steps if step not in saves and step not in after]
    wall, cpu = (statistics.median(step[kind] for step in plain) for kind in ("wall", "cpu"))
    return {
        "step_seconds": round(wall, 4),
        "step_cpu_seconds": round(cpu, 4),
        "stall_in_steps": round(statistics.median(step["save_wall"] for step in saves) / wall, 2),
        "stall_cpu_in_steps": round(statistics.median(step["save_cpu"] for step in saves) / cpu, 2),
        "step_after_in_steps": round(statistics.median(step["wall"] for step in after) / wall, 2),
    }


def summary(parameters: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of the runs."""
    return {
        "how": "gloo ranks on one machine that share its cores and its disk, one thread each; full fine-tuning in "
        f"float32 with adamw, a save every {EVERY} steps, written in a thread; medians; the stall is what a save takes "
        "of the thread that trains, in steps without a save",
        "parameters": parameters,
        "cores": len(os.sched_getaffinity(0)),
        "runs": runs,
    }


def table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        "| engine, ranks | format | MB written by each rank | stall in steps, CPU time | wall time |",
        "|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        megabytes = ", ".join(f"{size / 1e6:.1f}" for size in run["bytes_written"])
        stalls = (
            ", ".join(f"{rank[key]:.2f}" for rank in run["per_rank"])
            for key in ("stall_cpu_in_steps", "stall_in_steps")
        )
        lines.append(f"| `{run['engine']}`, {run['ranks']} | {run['format']} | {megabytes} | {' | '.join(stalls)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what whole and sharded saves cost each rank.")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--cases", nargs="+", default=["zero2:2"], help="ENGINE:RANKS, each whole and sharded")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    _CONTEXT.set_forkserver_preload(["phi3v.cli", "phi3v.train.run", "deepspeed", "faults"])
    cases = [(int(ranks), engine) for engine, ranks in (case.split(":") for case in arguments.cases)]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["PHI3V_CACHE"] = str(work / "cache")
        write_data(work / "data")
        parameters = make_model(work / "model", wide=1 if arguments.quick else 6)
        steps = LEAVE_OUT + EVERY * (3 if arguments.quick else 6)
        runs = [run(work, ranks, engine, form, steps) for ranks, engine in cases for form in ("whole", "sharded")]
    result = summary(parameters, runs)
    write_result("checkpoints", result, arguments.out)
    if arguments.out == OUT:
        write_between_marks(ROOT / "docs" / "resume.md", MARKS, table(result))
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
