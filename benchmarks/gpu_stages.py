"""What ``gpu_first.py`` measures, stage by stage; each runs in a process of its own, which this file is too.

A stage has parts, done one after the other. Of each the process writes two lines of JSON to a file of events: when it
begins, and when it ends, with its figures. Nothing else that it prints counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class NotThereError(Exception):
    """A part cannot run here, by no fault of anybody: what it needs is not installed, or no device has it."""


@dataclass(frozen=True)
class Place:
    """Where a stage runs.

    Attributes:
        preset, model: the model of the stages that train, as for ``phi3v bench train``.
        is_small: a rehearsal's sizes.
        folder: what the stages share, and keep from one call to the next.
    """

    preset: str
    folder: Path
    is_small: bool = False
    model: Path | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        """Of a measured row. They are the same for all rows, which thus share their pages and can be compared."""
        if self.is_small:
            return {"batch_size": 2, "steps": 1, "num_crops": 1, "pack_tokens": 1024, "rank": 4}
        return {"batch_size": 16, "steps": 4}


Part = Callable[[Place], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """Some measurements that belong together.

    Attributes:
        seconds: beside those of the others; a call divides its minutes in proportion.
    """

    name: str
    about: str
    seconds: float
    parts: Mapping[str, Part]


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise NotThereError(f"{module} is not installed")


def machine(_place: Place) -> dict[str, Any]:
    """What a result depends on; measurements of another are not gone on with."""
    import torch

    from phi3v.bench.result import with_environment
    from phi3v.machine import available_cores

    facts = with_environment("gpu_first", {"is_gpu": on_gpu(), "cuda": torch.version.cuda, "cores": available_cores()})
    extras = ("triton", "liger_kernel", "torchao", "flash_attn", "deepspeed")
    facts["versions"] |= {name: _version(name) for name in extras}
    if on_gpu():
        found = torch.cuda.get_device_properties(0)
        facts |= {
            "memory_gb": round(found.total_memory / 1e9, 2),
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "driver": _driver(),
        }
    return facts


def _version(module: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(module.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_tests(_place: Place) -> dict[str, Any]:
    """The tests that need a GPU; without one they are collected and skipped."""
    need("pytest")
    files = sorted(
        str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text()
    )
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    if done.returncode:
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise RuntimeError("\n".join([f"pytest ended with {done.returncode}: {counts}", *failed]))
    return {"tests": counts}


def small_inputs(place: Place) -> tuple[Path, Path]:
    """The tiny model, and a few small pages."""
    from phi3v.bench.pages import write_pages
    from phi3v.model.presets import init_model

    model = place.folder / "tiny"
    if not (model / "complete").is_file():
        shutil.rmtree(model, ignore_errors=True)
        init_model("tiny", model)
        (model / "complete").touch()
    return model, write_pages(place.folder / "small-pages", 8, sizes=((336, 300),))


def self_check(variant: Any, precision: Any) -> Part:
    """The self-check of a run of LoRA, at the real widths and heads: a few layers, without the weights of the model.

    What it finds the rows that follow know.
    """

    def part(place: Place) -> dict[str, Any]:
        import torch

        from phi3v.bench.rows import row_config
        from phi3v.bench.settings import BenchSettings, Row
        from phi3v.data.table import open_table
        from phi3v.model.presets import planned_config, preset_config
        from phi3v.train.collectives import HostCollectives
        from phi3v.train.device import choose_device
        from phi3v.train.methods.loading import ModelFacts, choose_attention, load_processor, make_skeleton
        from phi3v.train.prepare import check_fast_paths, require_lengths

        if precision == "fp16" and not on_gpu():
            raise NotThereError("fp16 needs a GPU")
        tiny, data = small_inputs(place)
        folder = place.model or (tiny if place.preset == "tiny" else None)
        model = preset_config(place.preset) if folder is None else planned_config(str(folder))[0]
        settings = BenchSettings(**place.sizes, precision=precision)
        config = row_config(Row("lora", variant), settings, tiny, data, place.folder / "runs" / "self-check")
        config.training.self_check = "always"
        runtime = choose_device(precision)
        attention = choose_attention(config, runtime)
        facts = ModelFacts(make_skeleton(model), torch.bfloat16, *attention, model.max_position_embeddings)
        processor, table = load_processor(config), open_table(data, progress=False)
        lengths = require_lengths(config, table, facts, processor, config.objective)
        checked = check_fast_paths(config, facts, runtime, HostCollectives(1), table, lengths, processor, None)
        wrong = [str(verdict) for verdict in checked.verdicts if verdict.state != "passed"]
        return checked.to_json_dict() | {"asked": attention[0], "wrong": wrong}

    return part


def train_command(run: str, *options: str, resume: bool = False) -> Part:
    """``phi3v train`` with readers, from its command line to its exit code."""

    def part(place: Place) -> dict[str, Any]:
        model, data = small_inputs(place)
        keys = {
            "model.path": model,
            "model.num_crops": 1,
            "data.train": data,
            "data.eval": data,
            "data.num_workers": 2,
            "method.lora.rank": 4,
            "training.output_dir": place.folder / "runs" / run,
            "training.max_steps": 6 if resume else 4,
            "training.batch_size": 4,
            "training.overwrite": str(not resume).lower(),
            "training.logging_steps": 1,
            "training.progress_bar": "false",
            "checkpoint.save_steps": 2,
            "evaluation.before": "false",
            "evaluation.max_questions": 4,
            "evaluation.max_new_tokens": 4,
        }
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        given = [word if on_gpu() or word != "fp16" else "fp32" for word in options]
        command = [sys.executable, "-m", "phi3v", "train", *(["--resume"] if resume else []), *words, *given]
        began = time.monotonic()
        if resume and not any((place.folder / "runs" / run).glob("checkpoint-*")):
            raise RuntimeError("there is no checkpoint to go on from")
        done = subprocess.run([*command, "--json"], cwd=place.folder, stdout=subprocess.PIPE, text=True, check=False)
        seconds = time.monotonic() - began
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode} of phi3v train {' '.join(options)}: {done.stdout.strip()}")
        lines = (place.folder / "runs" / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
        return {"exit_code": 0, "seconds": round(seconds, 1), "losses": losses, "result": json.loads(done.stdout)}

    return part


def inputs(place: Place) -> dict[str, Any]:
    """The pages and the random weights of the stages that follow; the weights are drawn on the device."""
    from phi3v.bench.training import bench_inputs

    sizes = place.sizes
    began = time.monotonic()
    model, _data, named = bench_inputs(place.preset, place.model, None, sizes["batch_size"] * (sizes["steps"] + 1))
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return {"model": named, "gigabytes": round(size / 1e9, 2), "seconds": round(time.monotonic() - began, 1)}


def bench_row(
    method: Any, variant: Any, *modules: str, small: Mapping[str, Any] | None = None, **settings: Any
) -> Part:
    """A row of ``phi3v bench train``.

    Args:
        modules: what it needs.
        small: settings of a rehearsal in place of these.
    """

    def part(place: Place) -> dict[str, Any]:
        from rich.console import Console

        from phi3v.bench.settings import BenchSettings
        from phi3v.bench.training import bench_train

        need(*modules)
        if settings.get("compile") and not on_gpu():
            raise NotThereError("it takes a CPU many minutes; tests compile the layers there")
        own = settings if small is None or not place.is_small else {**settings, **small}
        known = BenchSettings(**{**place.sizes, "seconds": 60.0, **own})
        preset = None if place.model is not None else place.preset
        result = bench_train([method], [variant], known, Console(stderr=True), preset=preset, model=place.model)
        (row,) = result["rows"]
        if "error" in row:
            raise (RuntimeError if on_gpu() else NotThereError)(row["error"])
        return row | {name: result[name] for name in ("model", "settings", "timed_by")}

    return part


def attention(layout: str) -> Part:
    """Every backend of packed rows: whether it agrees, and its speed, at the real heads of 96."""

    def part(place: Place) -> dict[str, Any]:
        from attention_backends import LAYOUTS, SMALL_LAYOUTS, compare_attention

        layouts = SMALL_LAYOUTS if place.is_small else LAYOUTS
        rows = compare_attention({layout: layouts[layout]}, heads=2 if place.is_small else 32)
        return {"backends": rows}

    return part


def preprocess(place: Place) -> dict[str, Any]:
    from phi3v.bench.pages import LETTER, draw_page
    from phi3v.bench.preprocess import bench_preprocess

    pages = [draw_page(seed, (336, 300) if place.is_small else LETTER) for seed in range(1 if place.is_small else 4)]
    return bench_preprocess(pages, 1 if place.is_small else 16, 1 if place.is_small else 5)


SAMPLES = ("lora", "samples")
UNCHECKED = ("--training.self_check", "off")  # that takes time, and the first stage has done it

STAGES = (
    Stage(
        "self-check",
        "fast paths beside the plain one, at the real widths",
        150,
        {
            f"{variant}, {precision}": self_check(variant, precision)
            for precision in ("bf16", "fp16")
            for variant in ("samples", "shared-image")
        },
    ),
    Stage("gpu-tests", "the tests that need a GPU", 60, {"pytest -m gpu": gpu_tests}),
    Stage(
        "train-command",
        "phi3v train with readers, tiny, to its exit code",
        140,
        {
            "lora": train_command("lora", "--method.name", "lora", "--data.packing", "shared-image"),
            "resume": train_command("lora", "--method.name", "lora", "--data.packing", "shared-image", resume=True),
            "full": train_command("full", "--method.name", "full", "--data.packing", "samples", *UNCHECKED),
            "fp16": train_command("fp16", "--method.name", "lora", "--training.precision", "fp16", *UNCHECKED),
        },
    ),
    Stage("inputs", "random weights and pages", 45, {"made": inputs}),
    Stage(
        "lora",
        "LoRA at full size",
        110,
        {variant: bench_row("lora", variant) for variant in ("samples", "shared-image", "recipe-flash", "recipe")},
    ),
    Stage(
        "full",
        "full fine-tuning: bf16 weights and moments, then lean mode within 24 GB",
        90,
        {
            "samples": bench_row("full", "samples", optimizer="adamw_bf16", small={"precision": "bf16"}),
            "lean": bench_row(
                "full", "lean", "bitsandbytes", memory_gb=24.0, small={"memory_gb": None, "precision": "bf16"}
            ),
            "lean, bf16 moments": bench_row("full", "lean", optimizer="adamw_bf16", small={"precision": "bf16"}),
        },
    ),
    Stage(
        "qlora",
        "QLoRA",
        60,
        {
            variant: bench_row("qlora", variant, "bitsandbytes", small={"precision": "bf16"})
            for variant in ("samples", "shared-image", "lean")
        },
    ),
    Stage(
        "frozen-vision",
        "full fine-tuning with a frozen vision part",
        55,
        {
            variant: bench_row("frozen-vision", variant, optimizer="adamw_bf16", small={"precision": "bf16"})
            for variant in ("samples", "shared-image")
        },
    ),
    Stage(
        "attention",
        "varlen, flex and SDPA on packed rows",
        45,
        {layout: attention(layout) for layout in ("samples", "shared-image")},
    ),
    Stage("preprocess", "preparing pages, and cutting them on the device", 20, {"pages": preprocess}),
    Stage(
        "profile",
        "one step: kernels, gaps, device waits",
        50,
        {variant: bench_row("lora", variant, profile=True) for variant in ("samples", "shared-image")},
    ),
    Stage(
        "kernels",
        "Liger, float8, compile",
        100,
        {
            "liger": bench_row(*SAMPLES, "liger_kernel", kernels="liger"),
            "float8": bench_row(*SAMPLES, "torchao", fp8=True),
            "compile": bench_row(*SAMPLES, compile=True),
        },
    ),
)
MACHINE = Stage("machine", "what this machine is", 60, {"facts": machine})
BY_NAME = {stage.name: stage for stage in (MACHINE, *STAGES)}


def run_parts(stage: Stage, parts: list[str], place: Place, events: Path) -> None:
    """Do some parts of a stage. One that fails ends the process, since it may have spoiled the device for the next."""
    with events.open("a", encoding="utf-8", buffering=1) as file:

        def tell(**event: Any) -> None:
            file.write(json.dumps(event) + "\n")

        for part in parts:
            tell(event="begin", part=part)
            try:
                figures = stage.parts[part](place)
            except NotThereError as error:
                tell(event="end", part=part, status="not there", reason=str(error))
            else:
                tell(event="end", part=part, status="done", figures=figures)


def end_with(parent: int) -> None:
    """End this process and those that it started when ``parent`` is gone, so that none is left on the device."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=BY_NAME)
    parser.add_argument("--parts", nargs="+", required=True)
    parser.add_argument("--events", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parent", type=int, help="process without which this one ends, with its whole process group")
    given = parser.parse_args(argv)
    if given.parent is not None:
        threading.Thread(target=end_with, args=(given.parent,), daemon=True).start()
    place = Place(given.preset, given.folder, is_small=given.small, model=given.model)
    run_parts(BY_NAME[given.stage], given.parts, place, given.events)


if __name__ == "__main__":
    main()
