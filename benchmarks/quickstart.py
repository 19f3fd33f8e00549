"""The figures of ``make quickstart``: time, accuracy before and after, questions a second.

    python benchmarks/quickstart.py [--out benchmarks/results/quickstart.json]

Makes the tiny model and the data anew, runs the quickstart's recipe through the command line, and writes one JSON
object with device, versions and date.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORK = Path("quickstart")  # as in the recipe


def phi3v(*arguments: str) -> dict[str, Any]:
    """Run a command with ``--json`` and return its object."""
    command = [sys.executable, "-m", "phi3v", *arguments, "--json"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def cpu_name() -> str:
    """The processor as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quickstart.json")
    out = parser.parse_args().out
    for name in ("model", "run"):
        shutil.rmtree(ROOT / WORK / name, ignore_errors=True)
    start = time.perf_counter()
    model = phi3v("model", "init", "--preset", "tiny", "--out", str(WORK / "model"))
    phi3v("data", "convert", "easy-vqa", "--out", str(WORK / "data"))
    run = phi3v("train", "recipes/easy_vqa_tiny.yaml")
    seconds = time.perf_counter() - start
    environment = json.loads((ROOT / WORK / "run" / "environment.json").read_text())
    scores = {
        when: {key: measured[key] for key in ("metric", "score", "num_questions", "seconds")}
        for when in ("before", "after")
        for measured in [json.loads((ROOT / WORK / "run" / f"eval_{when}.json").read_text())]
    }
    figures = {
        "benchmark": "quickstart",
        "device": f"{cpu_name()}, {environment['cpus']} cores",
        "date": environment["date"],
        "python": environment["python"],
        "versions": environment["versions"],
        "parameters": model["parameters"],
        "total_seconds": round(seconds, 1),
        "evaluation": scores,
        "training": {key: value for key, value in run.items() if key not in ("folder",)},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
