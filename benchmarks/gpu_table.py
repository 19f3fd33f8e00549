"""The table of training speed on one GPU: every method in every variant, beside the targets, with one command.

    python benchmarks/gpu_table.py                         # full size, random weights; an hour on one H100
    python benchmarks/gpu_table.py --preset tiny --batch-size 2 --steps 1 --num-crops 1    # to see that it works

Each row runs ``phi3v bench train`` in a process of its own, so that one that runs out of memory leaves the next an
empty device. Rows that the result holds already, measured with the same settings on the same machine, are not measured
again. At last the attention backends for packed rows are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from attention_backends import compare_attention
from bench_result import ROOT, write_result

# For an H100; (method, variant) → the least samples/s, the most GB.
TARGETS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("full", "samples"): (5.5, 72.0),
    ("frozen-vision", "samples"): (7.5, None),
    ("lora", "samples"): (7.0, 40.0),
    ("qlora", "samples"): (6.5, None),
    ("qlora", "lean"): (4.5, 6.0),
    ("full", "lean"): (None, 24.0),
}
# (method, variant, baseline) → the least ratio of samples/s.
RATIO_TARGETS = {("lora", "samples", "recipe"): 1.8} | {
    (method, "shared-image", "samples"): 3.0 for method in ("full", "frozen-vision", "lora", "qlora")
}
VARIANTS = ("recipe", "recipe-flash", "samples", "shared-image")
ROWS = [(method, variant) for method in ("full", "frozen-vision", "lora", "qlora") for variant in VARIANTS]
ROWS += [("full", "lean"), ("qlora", "lean")]


def measure(method: str, variant: str, options: list[str], out: Path) -> None:
    """One row, added to ``out``; where the process dies it is left out, to be measured by the next call."""
    command = [
        sys.executable,
        "-m",
        "phi3v",
        "bench",
        "train",
        "--methods",
        method,
        "--variants",
        variant,
        "--out",
        str(out),
    ]
    code = subprocess.run([*command, *options], cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    if code:
        print(f"{method} {variant}: the process ended with {code}", file=sys.stderr)


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is aimed at beside what was measured; ``met`` is None where nothing was."""
    of = {(row["method"], row["variant"]): row for row in rows if "error" not in row}
    found: list[dict[str, Any]] = []

    def add(name: str, target: float, measured: float | None, *, at_most: bool = False) -> None:
        met = None if measured is None else (measured <= target if at_most else measured >= target)
        found.append({"figure": name, "target": target, "measured": measured, "met": met})

    for (method, variant), (speed, memory) in TARGETS.items():
        row = of.get((method, variant), {})
        if speed is not None:
            add(f"{method} {variant} samples/s, at least", speed, row.get("samples_per_second"))
        if memory is not None:
            add(f"{method} {variant} GB, at most", memory, row.get("peak_gb"), at_most=True)
    for (method, variant, base), ratio in RATIO_TARGETS.items():
        ours, theirs = (of.get((method, name), {}).get("samples_per_second") for name in (variant, base))
        measured = round(ours / theirs, 2) if ours and theirs else None
        add(f"{method} {variant} over {base}, at least", ratio, measured)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="phi-3.5-vision", choices=("phi-3.5-vision", "phi-3-vision", "tiny"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_table.json")
    parser.add_argument("--rows", nargs="+", metavar="METHOD/WAY", help="only these, e.g. lora/recipe (default: all)")
    parser.add_argument("--small", action="store_true", help="compare attention on short rows only")
    given, options = parser.parse_known_args()
    rows_file = given.out.with_name(given.out.stem + "_rows.json")
    for method, variant in ROWS:
        if given.rows is None or f"{method}/{variant}" in given.rows:
            measure(method, variant, ["--preset", given.preset, *options], rows_file)
    held = json.loads(rows_file.read_text(encoding="utf-8")) if rows_file.is_file() else {"rows": []}
    layouts = {"samples": ((0, 40), (0, 7)), "shared-image": ((60, 5, 9), (0, 11))} if given.small else None
    names = ("machine", "devices", "model", "data", "settings", "rows", "ratios")
    figures = {name: held[name] for name in names if name in held}
    is_real = torch.cuda.is_available() and given.preset != "tiny"  # what is aimed at is for no other
    figures |= {"targets": targets(held["rows"] if is_real else []), "attention": compare_attention(layouts)}
    write_result("gpu_table", figures, given.out)
    for line in figures["targets"]:
        measured = "not yet measured" if line["measured"] is None else line["measured"]
        print(f"{line['figure']} {line['target']}: {measured}")
    for line in figures["attention"]:
        print(f"{line['rows']} {line['backend']}: {line.get('error') or line}")


if __name__ == "__main__":
    main()
