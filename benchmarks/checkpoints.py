"""What a save costs each of several ranks, whole (rank 0 gathers and writes) and sharded (each writes its part).

    python benchmarks/checkpoints.py                # benchmarks/results/checkpoints.json, and a table in docs/resume.md
    python benchmarks/checkpoints.py --cases zero3:2
    python benchmarks/checkpoints.py --quick        # to see that it works

Processes of a gloo group train a model of some twelve million parameters in full and save every second step; runs with
whole and with sharded checkpoints take turns. Of each rank:

- the bytes that it wrote: of files in its checkpoints, by whoever wrote them;
- the stall: CPU time of the process, threads of gloo included, from when training stops for a save until it goes on.
  The ranks wait for each other in it, so the largest of them is what training waits for, if each has a core and a
  network that is no slower than memory;
- the memory that saving takes: the peak from the first save on, less the peak in the steps before.

Wall times are not taken: the ranks share cores and a disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench_result import ROOT, peak_memory, write_between_marks, write_result
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
CASES = ("zero2:2", "fsdp2:2", "fsdp2:4", "fsdp2:2x2")
EVERY = 2  # steps from save to save
FIRST = 6  # steps before the first save that is measured; it and those before are warm-up
SAVES, ROUNDS = 8, 2


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
    """Train as a rank of a group, and write what the saves took to ``out``."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    save, take = Checkpointer.save, TrainingLoop._take
    steps: list[float] = []
    stalls: list[float] = []
    peaks: list[int] = []

    def counted(self: Any, source: Any) -> Any:
        """The rows of a step are taken where it begins."""
        steps.append(time.process_time())
        if len(steps) == FIRST - 2:
            peak_memory(reset=True)
        return take(self, source)

    def timed(self: Any, state: Any) -> None:
        self.wait()  # for the save before, which does not happen where steps take longer than saves
        if state.step < FIRST:
            return
        if state.step == FIRST or state.is_last:
            peaks.append(peak_memory(reset=True))
        began = time.process_time()
        save(self, state)
        if not state.is_last:  # which is not written in a thread
            stalls.append(time.process_time() - began)

    arguments = ["train", *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]
    with (
        open(log, "w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        mock.patch.object(Checkpointer, "save", timed),
        mock.patch.object(TrainingLoop, "_take", counted),
    ):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = phi3v(arguments)
        before, during = peaks
        step = statistics.median(after - began for began, after in pairwise(steps[2 : FIRST - 1]))
        Path(out).write_text(json.dumps({"step": step, "stalls": stalls[1:], "memory": during - before}))
    sys.exit(code)


def run(work: Path, case: str, form: str, saves: int) -> dict[str, Any]:
    """One run; gives what its saves cost."""
    engine, shape = case.split(":")
    replicas, shards = map(int, shape.split("x")) if "x" in shape else (1, int(shape))
    ranks = replicas * shards
    name = f"{engine}-{shape}-{form}"
    shutil.rmtree(work / name, ignore_errors=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    settings: dict[str, object] = {
        "model.path": work / "model",
        "model.num_crops": 1,
        "data.train": work / "data" / "train.jsonl",
        "data.num_workers": 0,
        "method.name": "full",
        "distributed.engine": engine,
        "distributed.replicas": replicas,
        "training.output_dir": work / name,
        "training.max_steps": FIRST + EVERY * (saves + 1),
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
    measured = [json.loads((work / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]
    return {"bytes_written": written(checkpoints(work / name)[0], ranks), "per_rank": measured}


def summary(case: str, form: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the runs of a case came to, for each rank: medians over all saves, of memory the most of any run."""
    ranks = [list(own) for own in zip(*(run["per_rank"] for run in runs), strict=True)]
    stalls = [[[float(stall) for stall in run["stalls"]] for run in own] for own in ranks]
    return {
        "case": case,
        "format": form,
        "bytes_written": runs[-1]["bytes_written"],
        "step_cpu_seconds": [round(statistics.median(run["step"] for run in own), 4) for own in ranks],
        "stall_cpu_seconds": [round(statistics.median(chain(*own)), 4) for own in stalls],
        "stall_cpu_seconds_of_runs": [[round(statistics.median(run), 4) for run in own] for own in stalls],
        "memory_bytes": [max(run["memory"] for run in own) for own in ranks],
    }


def written(checkpoint: Path, ranks: int) -> list[int]:
    """The bytes of a checkpoint that each rank wrote."""
    sizes = [0] * ranks
    for path in (path for path in checkpoint.rglob("*") if path.is_file()):
        rank = int(path.name.split("-")[1]) - 1 if path.parent.name == "shards" else 0
        sizes[rank] += path.stat().st_size
    return sizes


def table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        "| engine, ranks | format | MB written by each rank | stall of each rank, CPU ms | memory, MB |",
        "|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        engine, ranks = run["case"].split(":")
        shape = f"{ranks.replace('x', ' replicas of ')} ranks" if "x" in ranks else ranks
        values = (
            ", ".join(f"{value / unit:.0f}" for value in run[name])
            for name, unit in (("bytes_written", 1e6), ("stall_cpu_seconds", 1e-3), ("memory_bytes", 1e6))
        )
        lines.append(f"| `{engine}`, {shape} | {run['format']} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what whole and sharded saves cost each rank.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a round, two saves")
    parser.add_argument("--cases", nargs="+", default=CASES, help="ENGINE:RANKS, or ENGINE:REPLICASxRANKS of each")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    _CONTEXT.set_forkserver_preload(["phi3v.cli", "phi3v.train.run", "deepspeed", "faults"])
    saves, rounds = (2, 1) if arguments.quick else (SAVES, ROUNDS)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["PHI3V_CACHE"] = str(work / "cache")
        write_data(work / "data")
        parameters = make_model(work / "model", wide=1 if arguments.quick else 4)
        summaries = []
        for case in arguments.cases:
            runs: dict[str, list[dict[str, Any]]] = {"whole": [], "sharded": []}
            for _ in range(rounds):
                for form, own in runs.items():
                    own.append(run(work, case, form, saves))
            summaries += [summary(case, form, own) for form, own in runs.items()]
            print(table({"runs": summaries[-2:]}), flush=True)
    result = {
        "how": "gloo ranks on one machine that share its cores and its disk, one thread each; full fine-tuning in "
        f"float32 with adamw, a save every {EVERY} steps, written in a thread; {rounds} rounds of {saves} saves",
        "parameters": parameters,
        "cores": len(os.sched_getaffinity(0)),
        "runs": summaries,
    }
    write_result("checkpoints", result, arguments.out)
    if arguments.out == OUT:
        write_between_marks(ROOT / "docs" / "resume.md", MARKS, table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
