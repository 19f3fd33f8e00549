"""The GPU tables of docs/benchmarks.md, made of the results of ``gpu_first.py`` in benchmarks/results.

    python benchmarks/gpu_table.py

Every figure stands with the card and the day that it was measured on, or as not measured. Rehearsals do not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench_result import ROOT, write_between_marks

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
MARKS = ("<!-- gpu tables, by benchmarks/gpu_table.py -->", "<!-- end of gpu tables -->")

Result = dict[str, Any]
Figure = Callable[[Result], str | None]

# For an H100: (stage, part) → what is aimed at, in words.
TARGETS = {
    ("full", "samples"): "5.5 samples/s, 72 GB",
    ("frozen-vision", "samples"): "7.5 samples/s",
    ("lora", "samples"): "7.0 samples/s, 40 GB",
    ("qlora", "samples"): "6.5 samples/s",
    ("qlora", "lean"): "4.5 samples/s, 6 GB",
    ("full", "lean"): "24 GB",
}
ROWS = (
    *(("lora", variant) for variant in ("samples", "shared-image", "recipe-flash", "recipe")),
    *(("full", variant) for variant in ("samples", "lean", "lean, bf16 moments")),
    *(("qlora", variant) for variant in ("samples", "shared-image", "lean")),
    *(("frozen-vision", variant) for variant in ("samples", "shared-image")),
    *(("kernels", name) for name in ("liger", "float8", "compile")),
)


def part_of(result: Result, stage: str, part: str) -> dict[str, Any]:
    found: dict[str, Any] = result["stages"].get(stage, {}).get("parts", {}).get(part, {"status": "not run"})
    return found


def speed(part: dict[str, Any]) -> str:
    """Of a row of training."""
    figures = part["figures"]
    mfu = "" if figures["mfu"] is None else f", MFU {figures['mfu']:.1%}"
    peak = f"{figures['peak_gb']} GB"
    planned = figures.get("planned_peak_gb")
    words = f"{figures['samples_per_second']} samples/s{mfu}, {peak}" + (f" (planned {planned})" if planned else "")
    return escaped("; ".join([words, *(f"not as asked: {what}" for what in figures.get("not_as_asked", ()))]))


def ratio(stage: str, part: str, base: str) -> Figure:
    """One part's speed over another's."""

    def of(result: Result) -> str | None:
        parts = [part_of(result, stage, name) for name in (part, base)]
        if any(one["status"] != "done" for one in parts):
            return None
        ours, theirs = (one["figures"]["samples_per_second"] for one in parts)
        return f"{ours / theirs:.2f}x ({card_and_day(result, parts[0])})"

    return of


def measured(stage: str, part: str, words: Callable[[dict[str, Any]], str]) -> Figure:
    """What a part found, or what became of it; None if it was not tried."""

    def of(result: Result) -> str | None:
        found = part_of(result, stage, part)
        where = card_and_day(result, found)
        if found["status"] == "done":
            return f"{words(found)} ({where})"
        if found["status"] in ("not run", "no time left"):
            return None
        reason = found.get("reason") or next(iter(found.get("last_lines", [])[-1:]), "")
        return f"{found['status']}: {escaped(reason)[:120]} ({where})"

    return of


def card_and_day(result: Result, part: dict[str, Any]) -> str:
    return f"{result['device']}, torch {result['versions']['torch']}, {part.get('date', result['date'])[:10]}"


def escaped(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def cell(results: Iterable[Result], figure: Figure) -> str:
    """Of every result that has the figure."""
    return "; ".join(filter(None, map(figure, results))) or "not measured"


def tables(results: list[Result]) -> str:
    """The whole section."""
    lines = ["| full size, bf16 | aimed at, on an H100 | measured |", "|---|---|---|"]
    for stage, part in ROWS:
        name = f"LoRA `samples` with {part}" if stage == "kernels" else f"{stage} `{part}`"
        target = TARGETS.get((stage, part), "–")
        lines.append(f"| {name} | {target} | {cell(results, measured(stage, part, speed))} |")
    ratios = [("lora", "samples", "recipe", "1.8x")]
    ratios += [(stage, "shared-image", "samples", "3x") for stage in ("lora", "qlora", "frozen-vision")]
    for stage, part, base, target in ratios:
        lines.append(f"| {stage} `{part}` over `{base}` | {target} | {cell(results, ratio(stage, part, base))} |")
    for layout in ("samples", "shared-image"):
        found = cell(results, measured("attention", layout, backends))
        lines.append(f"| attention, a row of `{layout}`, forward and backward | within 2 % of float32 | {found} |")
    cut = cell(results, measured("preprocess", "pages", lambda part: f"{milliseconds(part)} ms a page"))
    lines.append(f"| cutting a page of 1275x1650 on the GPU, with its way there | – | {cut} |")
    for variant in ("samples", "shared-image"):
        found = cell(results, measured("profile", variant, profile))
        lines.append(f"| one step of LoRA `{variant}` | – | {found} |")
    lines += ["", "| checked | result |", "|---|---|"]
    for stage, part, name in CHECKS:
        lines.append(f"| {name} | {cell(results, measured(stage, part, check))} |")
    return "\n".join(lines)


CHECKS = (
    *(
        ("self-check", f"{variant}, {precision}", f"self-check, `{variant}`, {precision}")
        for precision in ("bf16", "fp16")
        for variant in ("samples", "shared-image")
    ),
    ("gpu-tests", "pytest -m gpu", "`pytest -m gpu`"),
    *(("train-command", part, f"`phi3v train`, tiny: {part}") for part in ("lora", "resume", "full", "fp16")),
)


def backends(part: dict[str, Any]) -> str:
    """Without those that this machine lacks."""
    words = []
    for row in part["figures"]["backends"]:
        if row.get("agrees"):
            words.append(f"{row['backend']} {row['milliseconds']} ms")
        elif "agrees" in row:
            off = row.get("error") or f"off by {row['largest_difference']} of the norm"
            words.append(f"{row['backend']} is wrong: {off}")
    return escaped(", ".join(words))


def milliseconds(part: dict[str, Any]) -> float:
    value: float = part["figures"]["milliseconds_per_page"]["cut_on_the_gpu"]
    return value


def profile(part: dict[str, Any]) -> str:
    table = part["figures"]["profile"]
    first = ", ".join(f"{row['name'][:40]} {row['share']:.0%}" for row in table["operations"][:3])
    busy = f", {table['busy_share']:.0%} busy, {table['gaps_ms']} ms of gaps" if "busy_share" in table else ""
    return escaped(f"{table['step_ms']} ms{busy}; most in {first}")


def check(part: dict[str, Any]) -> str:
    figures = part["figures"]
    if "wrong" in figures:
        right = sum(text.startswith("passed") for text in figures.get("verdicts", {}).values())
        return escaped("; ".join([f"{right} agree with the plain path", *figures["wrong"]]))
    return ", ".join(f"{n} {word}" for word, n in figures["tests"].items()) if "tests" in figures else "passes"


def results_in(folder: Path) -> list[Result]:
    """Of real cards, in the order of their names."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("gpu_first_*.json"))]
    return [result for result in found if result["is_gpu"] and not result["is_rehearsal"]]


def main() -> None:
    write_between_marks(PAGE, MARKS, tables(results_in(RESULTS)))


if __name__ == "__main__":
    main()
