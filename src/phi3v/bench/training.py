"""``phi3v bench train``: the public recipe's table of speed on this machine, the recipe's own training beside ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich import box
from rich.console import Console
from rich.table import Table

from phi3v.bench.counting import timed_by
from phi3v.bench.pages import QUESTIONS_PER_PAGE, pages_for, write_pages
from phi3v.bench.result import with_environment, write_json
from phi3v.bench.rows import measure_row
from phi3v.bench.settings import BASELINES, BenchSettings, Row, Variant
from phi3v.config import MethodName
from phi3v.data.cache import cache_root
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.model.presets import init_model
from phi3v.paths import find_model
from phi3v.plan.hardware import this_machine
from phi3v.terminal import say

COLUMNS = ("method", "variant", "GPUs", "attention", "batch", "samples/s", "pages/s", "tokens/s", "MFU", "peak GB")


def bench_train(
    methods: Sequence[MethodName],
    variants: Sequence[Variant],
    settings: BenchSettings,
    console: Console,
    *,
    preset: str | None = None,
    model: Path | None = None,
    data: Path | None = None,
    cache: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure every method in every variant; print the table.

    Args:
        preset: architecture with random weights, kept in ``cache``; by default phi-3.5-vision on a GPU, else tiny.
        model: a model folder in place of ``preset``.
        data: a JSONL file in place of drawn pages.
        cache: where made models and pages are kept; by default in phi3v's cache.
        out: written after every row; rows that it holds are not measured again, unless they failed.

    Raises:
        UserError: ``out`` holds a result of other settings or of another machine, or nothing is left to measure.
    """
    rows = [
        Row(method, variant)
        for method in methods
        for variant in variants
        if variant != "lean" or method in ("full", "qlora")
    ]
    if not rows:
        raise UserError("lean mode works with the methods full and qlora", where="--methods")
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():
        model_folder, file, named = bench_inputs(preset, model, data, settings.batch_size * (settings.steps + 1), cache)
        table = open_table(file, progress=False)
    machine = this_machine()
    facts = {
        "machine": machine.gpu.name,
        "devices": state.num_processes,
        "model": named,
        "data": _describe(file, table, is_drawn=data is None),
        "settings": asdict(settings),
        "timed_by": timed_by(),
    }
    measured = _earlier_rows(out, facts)
    result: dict[str, Any] = {}
    for row in rows:
        if "error" in measured.get(row.name, {"error": ""}):  # new, or to be tried again
            measured[row.name] = asdict(row) | measure_row(row, settings, model_folder, file)
        result = with_environment("train", facts | {"rows": list(measured.values())})
        result["ratios"] = ratios(result["rows"])
        found = measured[row.name]
        speed = found.get("error") or f"{found['samples_per_second']} samples/s, {found['peak_gb']} GB"
        say(console, f"{row.name}: {speed}")
        if out is not None and state.is_main_process:
            write_json(result, out)
    _show(console, result)
    return result


def bench_inputs(
    preset: str | None, model: Path | None, data: Path | None, questions: int, cache: Path | None = None
) -> tuple[Path, Path, str]:
    """The model's folder, the data file and the model's name in a result; random weights and pages are made once.

    Raises:
        UserError: ``model`` is no model folder.
    """
    folder = cache or cache_root() / "bench"
    if model is not None:
        model_folder, named = Path(find_model(str(model), f"--model {model}")), str(model)
    else:
        preset = preset or ("phi-3.5-vision" if torch.cuda.is_available() else "tiny")
        model_folder, named = folder / f"model-{preset}", f"{preset}, random weights"
        if not (model_folder / "complete").is_file():
            shutil.rmtree(model_folder, ignore_errors=True)
            init_model(preset, model_folder, device="cuda" if torch.cuda.is_available() else "cpu")
            (model_folder / "complete").touch()
    pages = pages_for(questions)
    return model_folder, data or write_pages(folder / f"pages-{pages}", pages), named


def _describe(file: Path, table: Any, *, is_drawn: bool) -> dict[str, Any]:
    pages = {image for record in table for image in record.images}
    source = f"drawn pages, {QUESTIONS_PER_PAGE} questions a page (bench/pages.py)" if is_drawn else str(file)
    return {"source": source, "samples": len(table), "pages": len(pages)}


def _earlier_rows(out: Path | None, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier or interrupted measurement by name."""
    if out is None or not out.is_file():
        return {}
    held = json.loads(out.read_text(encoding="utf-8"))
    for key, value in facts.items():
        if held.get(key) != value:
            raise UserError(
                f"holds a result with another {key}", where=str(out), hint="choose another --out, or remove it first"
            )
    for row in held["rows"]:
        if "way" in row:  # of an older version
            row["variant"] = row.pop("way")
    return {Row(row["method"], row["variant"]).name: row for row in held["rows"]}


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Samples a second of each variant over the recipe's and, shared pages, over ``samples``, method by method."""
    speed = {(row["method"], row["variant"]): row["samples_per_second"] for row in rows if "error" not in row}
    over = {
        f"{method} {variant} over {base}": value / speed[method, base]
        for (method, variant), value in speed.items()
        for base in (*BASELINES, "padded", "samples")
        if (method, base) in speed
        and variant not in (*BASELINES, base)
        and (base != "samples" or variant == "shared-image")
    }
    return {name: round(value, 2) for name, value in over.items()}


def _show(console: Console, result: dict[str, Any]) -> None:
    title = f"{result['device']}, {result['timed_by']}: {result['model']}, {result['data']['source']}"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in COLUMNS:  # a narrow terminal folds two of them
        is_name = column in ("method", "variant", "attention")
        can_fold = column in ("variant", "attention")
        table.add_column(column, overflow="fold", no_wrap=not can_fold, justify="left" if is_name else "right")
    for row in result["rows"]:
        if "error" in row:
            table.add_row(row["method"], row["variant"], "", "–")
            continue
        mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
        names = ("gpus", "attention", "batch_size", "samples_per_second", "pages_per_second", "tokens_per_second")
        values = [str(row[name]).removeprefix("packed_") for name in names]
        table.add_row(row["method"], row["variant"], *values, mfu, str(row["peak_gb"]))
    console.print(table)
    for row in result["rows"]:
        if "error" in row:
            say(console, f"{row['method']} {row['variant']}: {row['error']}")
    if all(row.get("mfu") is None for row in result["rows"]):
        say(console, "no MFU: this is a CPU, or a device whose rate is not in plan/hardware.yaml")
    for name, value in result["ratios"].items():
        say(console, f"{name}: {value}x")
