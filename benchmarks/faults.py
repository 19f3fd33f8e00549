"""A run that is killed again and again: SIGKILL at random moments, ``--resume auto`` after each, until it is done.

    python benchmarks/faults.py                     # 100 kills over one run; benchmarks/results/faults.json
    python benchmarks/faults.py --kills 6 --steps 12 --out /tmp/faults.json     # to see that it works

First the run is done undisturbed. Then it is started, killed and started again:

- a third of the kills wait until a checkpoint is being written, and come up to 0.15 s later; whether one hit is told by
  the half-written folder that it left;
- the others come at a random moment between the start of the process and a few steps after it goes on.

After every kill each folder that has a checkpoint's name must be valid, the newest must be the newest that was there
before or a newer one, and the next start must go on from it. At the end weights, optimizer, random numbers and logged
losses must be those of the undisturbed run, bit by bit.

A process is forked from a server that has the libraries loaded, as starting Python anew for each kill would take most
of the time; from there on it is `phi3v train RECIPE --resume auto` as the command line runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from bench_result import ROOT, write_result
from phi3v.cli import main as phi3v
from phi3v.model.presets import init_model
from phi3v.train.checkpoint_folder import checkpoints, damage, step_of

COLORS = ("red", "green", "blue", "yellow", "black", "orange")
SHAPES = ("square", "circle")
_CONTEXT = multiprocessing.get_context("forkserver")
# A process that gets no further than this hangs.
PATIENCE = 600.0
SAVE_SHARE = 3  # one kill in so many is aimed at a save


@dataclass
class Tally:
    """What the kills came to."""

    kills: int = 0
    aimed_at_saves: int = 0
    hit_saves: int = 0
    before_first_step: int = 0
    damaged_checkpoints: int = 0
    resumes: int = 0
    wrong_resumes: int = 0
    steps_computed: int = 0
    faults: list[str] = field(default_factory=list)


def write_data(folder: Path, count: int = 12) -> Path:
    """A data file about drawn shapes."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for index in range(count):
        color, shape = COLORS[index % len(COLORS)], SHAPES[index % len(SHAPES)]
        picture = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(picture)
        box = (8 + index, 8, 40 + index, 40)
        (draw.rectangle if shape == "square" else draw.ellipse)(box, fill=color)
        picture.save(folder / "images" / f"{index}.png")
        turns = [{"images": [f"{index}.png"], "user": "What is it?", "assistant": f"A {color} {shape}."}]
        lines.append(json.dumps({"id": str(index), "conversations": turns}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train_command(work: Path, out: Path, steps: int) -> list[str]:
    """A LoRA run with dropout, a trained projector and a checkpoint at every step."""
    settings = {
        "model.path": work / "model",
        "data.train": work / "data" / "train.jsonl",
        "data.num_workers": 0,
        "method.name": "lora",
        "method.lora.rank": 4,
        "method.lora.dropout": 0.2,
        "method.lora.also_train": "[projector]",
        "training.output_dir": out,
        "training.max_steps": steps,
        "training.batch_size": 2,
        "training.micro_batch_size": 1,
        "training.learning_rate": 1e-3,
        "training.warmup_steps": 5,
        "training.logging_steps": 1,
        "checkpoint.save_steps": 1,
        "checkpoint.keep_last": 3,
    }
    return [
        "train",
        "--resume",
        "auto",
        *(part for key, value in settings.items() for part in (f"--{key}", str(value))),
    ]


def start(command: list[str], log: Path) -> Any:
    """The command in a process of its own; what it says goes to ``log``."""
    process = _CONTEXT.Process(target=_run, args=(command, str(log), dict(os.environ)), daemon=True)
    process.start()
    return process


def _run(command: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = phi3v(command)
    sys.exit(code)


def soak(command: list[str], out: Path, kills: int, dice: random.Random, work: Path) -> Tally:
    """Start and kill until so many kills are done, then let the run end.

    Raises:
        RuntimeError: the run ended, or hangs, before that.
    """
    tally = Tally()
    newest = -1
    until_step = 1.0  # seconds from the start of a process to its first new checkpoint, as far as was seen
    while True:
        log = work / f"log-{tally.kills}.txt"
        before = newest
        process = start(command, log)
        began = time.monotonic()
        if tally.kills < kills:
            aims = tally.kills % SAVE_SHARE == 0
            if aims:
                _wait_for_save(process, out, dice.randrange(1, 4))
                time.sleep(dice.uniform(0, 0.15))
            else:
                end, first = began + dice.uniform(0, 1.3 * until_step), None
                while time.monotonic() < end and process.exitcode is None:
                    time.sleep(0.02)
                    if first is None and any(step_of(path) > before for path in checkpoints(out)):
                        first = time.monotonic() - began
                until_step = first if first is not None else max(until_step, 1.1 * (time.monotonic() - began))
            if process.exitcode is not None:
                raise RuntimeError(f"the run ended after {tally.kills} kills; give it more --steps\n{_said(log)}")
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            tally.kills += 1
            tally.aimed_at_saves += aims
            tally.hit_saves += any(out.glob(".checkpoint-*.new"))
        else:
            process.join(PATIENCE)
            if process.exitcode != 0:
                raise RuntimeError(f"the run did not end well: {process.exitcode}\n{_said(log)}")
        _judge_start(tally, log, newest)
        newest = _judge_folder(tally, out, newest)
        tally.before_first_step += newest == before and process.exitcode != 0
        tally.steps_computed += sum(1 for _ in re.finditer(r"^step \d+/", _said(log), re.MULTILINE))
        print(f"kill {tally.kills}: step {max(newest, 0)}, {tally.hit_saves} hit a save", flush=True)
        if process.exitcode == 0:
            return tally


def _said(log: Path) -> str:
    """What a process said; nothing if it was killed before it could."""
    return log.read_text() if log.exists() else ""


def _wait_for_save(process: Any, out: Path, number: int) -> None:
    """Until the process writes its ``number``-th checkpoint."""
    end, names = time.monotonic() + PATIENCE, set()
    left_over = {path.name for path in out.glob(".checkpoint-*.new")}
    while process.exitcode is None and time.monotonic() < end:
        now = {path.name for path in out.glob(".checkpoint-*.new")}
        left_over &= now  # of the last kill, until the new process has removed it
        names |= now - left_over
        if len(names) >= number:
            return
        time.sleep(0.002)


def _judge_start(tally: Tally, log: Path, newest: int) -> None:
    """Whether a process went on from the newest checkpoint that it found."""
    text = " ".join(_said(log).split())
    match = re.search(r"the newest valid checkpoint\), after step (\d+)", text)
    if match is not None:
        tally.resumes += 1
        if int(match[1]) != newest:
            tally.wrong_resumes += 1
            tally.faults.append(f"{log.name}: went on from step {match[1]}, and step {newest} was saved")
    elif newest >= 0 and "so the run starts anew" in text:
        tally.wrong_resumes += 1
        tally.faults.append(f"{log.name}: started anew, and step {newest} was saved")


def _judge_folder(tally: Tally, out: Path, newest: int) -> int:
    """The newest checkpoint; whatever has a checkpoint's name must be valid, and what was saved must be there."""
    for folder in checkpoints(out):
        wrong = damage(folder)
        if wrong is not None:
            tally.damaged_checkpoints += 1
            tally.faults.append(f"{folder.name}: {wrong}")
    now = max((step_of(folder) for folder in checkpoints(out)), default=-1)
    if now < newest:
        tally.faults.append(f"step {newest} was saved, and now the newest is {now}")
    return now


def differences(one: Path, two: Path, steps: int) -> list[str]:
    """What two finished runs do not have in common, bit by bit."""
    found = []
    for name in ("final", f"checkpoint-{steps}/model", f"checkpoint-{steps}"):
        files = {path.name for path in (one / name).glob("*.safetensors")}
        for file in sorted(files):
            a, b = load_file(one / name / file), load_file(two / name / file)
            found += [f"{name}/{file}: {key}" for key in a.keys() | b.keys() if not _equal(a.get(key), b.get(key))]
    a, b = (
        torch.load(run / f"checkpoint-{steps}" / "optimizer" / "optimizer.pt", weights_only=True) for run in (one, two)
    )
    if not _equal(a, b):
        found.append("the optimizer's state")
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", "samples", "questions", "tokens")
    losses = [
        [
            {key: json.loads(line)[key] for key in kept}
            for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for run in (one, two)
    ]
    if losses[0] != losses[1]:
        found.append("metrics.jsonl")
    return found


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(_equal, one, two))
    return bool(one == two)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill one run again and again, and see that nothing is lost.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, help="of the run (default: 0.8 a kill)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    arguments = parser.parse_args()
    steps = arguments.steps or max(8, arguments.kills * 4 // 5)
    _CONTEXT.set_forkserver_preload(["phi3v.cli", "phi3v.train.run", "phi3v.doctor.diagnosis", "bench_result"])
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["PHI3V_CACHE"] = str(work / "cache")
        init_model("tiny", work / "model")
        write_data(work / "data")
        undisturbed, killed = work / "undisturbed", work / "killed"
        began = time.monotonic()
        process = start(train_command(work, undisturbed, steps), work / "undisturbed.txt")
        process.join(10 * PATIENCE)
        if process.exitcode != 0:
            raise RuntimeError((work / "undisturbed.txt").read_text())
        seconds = time.monotonic() - began
        began = time.monotonic()
        command = train_command(work, killed, steps)
        tally = soak(command, killed, arguments.kills, random.Random(arguments.seed), work)
        result = {
            "how": "processes forked from a server with the libraries loaded, killed with SIGKILL; tiny model, LoRA "
            "with dropout and a trained projector, a checkpoint at every step, written in a thread",
            "steps": steps,
            "kills": tally.kills,
            "kills_aimed_at_a_save": tally.aimed_at_saves,
            "kills_that_left_a_half_written_checkpoint": tally.hit_saves,
            "kills_before_a_new_checkpoint": tally.before_first_step,
            "resumes_from_a_checkpoint": tally.resumes,
            "resumes_not_from_the_newest_checkpoint": tally.wrong_resumes,
            "checkpoints_found_damaged": tally.damaged_checkpoints,
            "steps_logged_in_all": tally.steps_computed,
            "differences_from_the_undisturbed_run": differences(undisturbed, killed, steps),
            "faults": tally.faults,
            "undisturbed_seconds": round(seconds, 1),
            "killed_seconds": round(time.monotonic() - began, 1),
        }
    write_result("faults", result, arguments.out)
    print(json.dumps(result, indent=2))
    return 0 if not result["faults"] and not result["differences_from_the_undisturbed_run"] else 1


if __name__ == "__main__":
    sys.exit(main())
