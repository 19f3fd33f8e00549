"""The figures of ``make quickstart``: time, accuracy before and after, questions a second.

    python benchmarks/quickstart.py [--out benchmarks/results/quickstart.json]

Makes the tiny model and the data anew, runs the quickstart's recipe through the command line, and writes one JSON
object with device, versions and date.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from bench_result import phi3v, write_result

ROOT = Path(__file__).parents[1]
WORK = Path("quickstart")  # as in the recipe


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
    scores = {
        when: measured["scores"] | {"seconds": measured["seconds"]}
        for when in ("before", "after")
        for measured in [json.loads((ROOT / WORK / "run" / f"eval_{when}.json").read_text())]
    }
    figures = {
        "parameters": model["parameters"],
        "total_seconds": round(seconds, 1),
        "evaluation": scores,
        "training": {key: value for key, value in run.items() if key != "folder"},
    }
    print(json.dumps(write_result("quickstart", figures, out), indent=2))


if __name__ == "__main__":
    main()
