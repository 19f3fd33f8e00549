"""The table of methods and tasks: the tiny base model tuned on a small stand-in of every task, with every method.

    python benchmarks/task_table.py [--tasks docvqa nlvr2] [--methods lora] [--packing none] [--docs docs/results.md]

Makes the stand-ins (`tasks/`), converts them with ``phi3v data convert`` and runs ``phi3v train`` with the recipes as
they are shipped, but for what a small model on a CPU needs (`overrides`), in padded batches and packed. A row (task,
method, packing) that the result holds already, with the same model, data and settings, is not measured again.

Runs go side by side, one on each of `CORES` cores: that takes less time in all than one after the other. What the base
scores before is measured once a task, and once more with the weights in 4 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import itertools
import json
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench_result import phi3v, write_between_marks, write_result
from phi3v.evaluate.bootstrap import bootstrap_interval, weighted_mean
from phi3v.evaluate.metrics import METRICS
from tasks import METHODS, TASKS, Task

ROOT = Path(__file__).parents[1]
SEED = 3
BATCH_SIZE = 8
CORES = 2
LEARNING_RATES = {"full": 1e-3, "frozen_vision": 1e-3, "lora": 3e-3, "qlora": 3e-3}
RANK, ALPHA_RATIO = 16, 2.0
PACKINGS = ("none", "shared-image")
Key = tuple[str, str, str]  # task, method, packing
BEGIN, END = "<!-- stand-ins: begin (written by benchmarks/task_table.py) -->", "<!-- stand-ins: end -->"


def prepare(name: str, task: Task, work: Path) -> Path:
    """Make and convert a stand-in, unless that was done before; the folder of its data."""
    original, data = work / "original" / name, work / "data" / name
    made = made_from(task)
    marker = data / "made.json"
    if not marker.exists() or json.loads(marker.read_text(encoding="utf-8")) != made:
        for folder in (original, data):
            shutil.rmtree(folder, ignore_errors=True)
        original.mkdir(parents=True)
        task.make(original, task.sizes, SEED)
        source = original / task.original
        phi3v("data", "convert", task.source, "--source", source, "--out", data, *task.convert_options)
        marker.write_text(json.dumps(made), encoding="utf-8")
    return data


def made_from(task: Task) -> dict[str, Any]:
    """What a stand-in depends on: where it changes, data is made and rows are measured anew."""
    folder = Path(__file__).parent
    files = [folder / "drawing.py", folder / "tasks" / "parts.py", Path(inspect.getfile(task.make))]
    return {
        "seed": SEED,
        "sizes": dataclasses.asdict(task.sizes),
        "code": hashlib.sha256(
            b"".join([*map(Path.read_bytes, files), *map(str.encode, task.convert_options)])
        ).hexdigest()[:16],
    }


def overrides(method: str, packing: str, task: Task, steps: int | None) -> dict[str, Any]:
    """What differs from the recipe, but for paths: settings of a small model, few steps and a CPU."""
    settings: dict[str, Any] = {
        "model.num_crops": 1,
        "training.max_steps": steps or task.steps,
        "training.batch_size": BATCH_SIZE,
        "data.packing": packing,
        "training.micro_batch_size": BATCH_SIZE if packing == "none" else 1,
        "training.learning_rate": LEARNING_RATES[method],
        "training.warmup_steps": min(10, steps or task.steps),
        "training.activation_checkpointing": "none",
        "training.seed": SEED,
        "evaluation.batch_size": 32,
        "evaluation.max_new_tokens": 12,
    }
    if method in ("lora", "qlora"):
        settings |= {"method.lora.rank": RANK, "method.lora.alpha_ratio": ALPHA_RATIO}
    return settings


def measure(
    name: str,
    method: str,
    settings: dict[str, Any],
    model: Path,
    data: Path,
    work: Path,
    before: dict[str, list[float]] | None,
) -> dict[str, Any]:
    """Tune and measure; the row of the table. What the base scores, ``before``, is measured where it is not known."""
    packing = settings["data.packing"]
    task, folder = TASKS[name], work / "runs" / f"{name}_{method}_{packing}"
    paths = {
        "model.path": model,
        "data.train": data / task.train,
        "data.eval": data / task.test,
        "training.output_dir": folder,
        "training.overwrite": True,
        "evaluation.before": before is None,
    }
    options = [part for key, value in (paths | settings).items() for part in (f"--{key}", str(value).lower())]
    options = [str(value) if isinstance(value, Path) else value for value in options]
    start = time.perf_counter()
    run = phi3v("train", f"{name}_{method}", *options, threads=1)
    after = json.loads((folder / "eval_after.json").read_text(encoding="utf-8"))
    if before is None:
        before = _scores(json.loads((folder / "eval_before.json").read_text(encoding="utf-8")))
    return {
        "task": name,
        "method": method,
        "packing": packing,
        "metric": after["metric"],
        "n": after["num_questions"],
        "chance": round(chance(data / task.test, after["metric"]), 4),
        "before": before,
        "after": _scores(after),
        "train_seconds": run["train_seconds"],
        "total_seconds": round(time.perf_counter() - start, 1),
        "samples_per_second": run["samples_per_second"],
        "peak_memory_gb": round(run["peak_memory_gb"], 2),
        "settings": settings,
        "data": made_from(task),
    }


def _scores(evaluation: dict[str, Any]) -> dict[str, list[float]]:
    """Of every metric [score, lower, upper end of its 95 % interval]."""
    return {
        name: [round(score[key], 4) for key in ("value", "low", "high")] for name, score in evaluation["scores"].items()
    }


def chance(file: Path, metric: str) -> float:
    """The best score without looking at the images: to every question text the one answer that does best on it."""
    of_answer = METRICS[metric].of_answer
    questions: defaultdict[str, list[list[str]]] = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        for turn in json.loads(line)["conversations"]:
            questions[turn["user"]].append(turn.get("answers", [turn["assistant"]]))
    best = 0.0
    for references in questions.values():
        candidates = {answer for answers in references for answer in answers}
        best += max(sum(of_answer(candidate, answers) for answers in references) for candidate in candidates)
    return best / sum(map(len, questions.values()))


def same_base(one: Key, other: Key) -> bool:
    """Whether two rows start from the same weights on the same task: QLoRA rounds them, the others do not."""
    return one[0] == other[0] and (one[1] == "qlora") == (other[1] == "qlora")


def in_waves(keys: Iterable[Key]) -> tuple[list[Key], list[Key]]:
    """First one row of each task and base, which measures what the base scores, then the others."""
    first: list[Key] = []
    then: list[Key] = []
    for key in keys:
        (then if any(same_base(key, other) for other in first) else first).append(key)
    return first, then


def packed_less_padded(result: dict[str, Any]) -> tuple[float, float, float]:
    """How much packing changes the first metric: the mean over methods and tasks, and its 95 % interval.

    Each pair differs by more than the questions that were asked: training magnifies rounding. The interval is of the
    mean over pairs.
    """
    scores = {(row["task"], row["method"], row["packing"]): row["after"][row["metric"]][0] for row in result["rows"]}
    pairs = dict.fromkeys((task, method) for task, method, _ in scores)
    both = [[scores.get((*pair, packing)) for packing in PACKINGS] for pair in pairs]
    differences = np.array([packed - padded for padded, packed in both if padded is not None and packed is not None])
    if not len(differences):
        return (float("nan"),) * 3
    return (float(differences.mean()), *bootstrap_interval(weighted_mean(differences), len(differences)))


def markdown(result: dict[str, Any]) -> str:
    """The result as a table: a line a task, method and metric, scores in percent with their interval."""
    mean, low, high = (100 * value for value in packed_less_padded(result))
    lines = [
        f"Packed less padded, mean over all methods and tasks: {mean:+.1f} ({low:+.1f} to {high:+.1f}) points.",
        "",
        "| task (metric, n, chance) | method | before | after, padded | after, packed | steps | seconds | memory, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows: defaultdict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in result["rows"]:
        rows[row["task"], row["method"]][row["packing"]] = row
    for (name, method), by_packing in rows.items():
        some = next(iter(by_packing.values()))
        for metric in some["after"]:
            is_main = metric == some["metric"]
            cells = [f"{name} ({metric}, {some['n']}, {100 * some['chance']:.1f})" if is_main else f"– ({metric})"]
            cells += [method, f"{100 * some['before'][metric][0]:.1f}"]
            cells += [_interval(by_packing.get(packing), metric) for packing in PACKINGS]
            cells += [str(some["settings"]["training.max_steps"])] if is_main else [""]
            for key, form in (("train_seconds", ".0f"), ("peak_memory_gb", ".2f")):
                both = " / ".join(format(by_packing[p][key], form) if p in by_packing else "–" for p in PACKINGS)
                cells.append(both if is_main else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(row: dict[str, Any] | None, metric: str) -> str:
    if row is None:
        return "–"
    value, low, high = (100 * number for number in row["after"][metric])
    score = f"**{value:.1f}**" if metric == row["metric"] else f"{value:.1f}"
    return f"{score} ({low:.1f} to {high:.1f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--packing", nargs="+", choices=PACKINGS, default=list(PACKINGS), metavar="PACKING")
    parser.add_argument("--steps", type=int, help="optimizer steps of every run (default: as the task needs)")
    parser.add_argument(
        "--model",
        type=Path,
        default=ROOT / "src" / "phi3v" / "model" / "tiny_base",
        help="the model to tune (default: the base that is shipped, %(default)s)",
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tasks", help="where data and runs are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tasks.json")
    parser.add_argument("--markdown", action="store_true", help="print the result as a table at the end")
    parser.add_argument("--docs", type=Path, metavar="FILE.md", help="write the table between its marks in a document")
    arguments = parser.parse_args(argv)
    work = arguments.work.resolve()
    model = arguments.model.resolve()
    if not model.exists():
        raise SystemExit(f"there is no model in {model}: name the folder of one with --model")
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:16]

    rows: dict[Key, dict[str, Any]] = {}
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text(encoding="utf-8"))
        if earlier["base"] == weights:
            rows = {(row["task"], row["method"], row["packing"]): row for row in earlier["rows"]}
    wanted = {}
    for key in itertools.product(arguments.tasks, arguments.methods, arguments.packing):
        name, method, packing = key
        settings = overrides(method, packing, TASKS[name], arguments.steps)
        held = rows.pop(key, {})
        if held.get("settings") == settings and held.get("data") == made_from(TASKS[name]):
            rows[key] = held
        else:
            wanted[key] = settings
    data = {name: prepare(name, TASKS[name], work) for name in {key[0] for key in wanted}}

    one_at_a_time = threading.Lock()

    def run(key: Key) -> None:
        name, method, packing = key
        print(f"{name}, {method}, packing {packing}", file=sys.stderr, flush=True)
        with one_at_a_time:
            known = [row["before"] for other, row in rows.items() if same_base(other, key)]
        row = measure(name, method, wanted[key], model, data[name], work, known[0] if known else None)
        with one_at_a_time:
            rows[key] = row
            in_order = [rows[key] for key in itertools.product(TASKS, METHODS, PACKINGS) if key in rows]
            write_result("tasks", {"base": weights, "runs_side_by_side": CORES, "rows": in_order}, arguments.out)

    for keys in in_waves(wanted):
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(run, keys))
    result = json.loads(arguments.out.read_text(encoding="utf-8"))
    if arguments.docs:
        write_between_marks(arguments.docs, (BEGIN, END), markdown(result))
    print(markdown(result) if arguments.markdown else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
