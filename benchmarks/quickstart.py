"""The figures of ``phi3v quickstart``, beside the same model trained from scratch.

    python benchmarks/quickstart.py [--out benchmarks/results/quickstart.json]

Makes model and data anew and runs the quickstart's recipe through the command line: LoRA on the pretrained tiny base.
Then the same architecture learns the same data from random weights, every weight trained. One JSON object with device,
versions and date holds both.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

from bench_result import phi3v, write_result

ROOT = Path(__file__).parents[1]
WORK = Path("quickstart")  # as in the recipe
RECIPE = "easy_vqa_tiny"
FROM_SCRATCH: dict[str, Any] = {
    "model.path": WORK / "scratch-model",
    "method.name": "full",
    "training.output_dir": WORK / "scratch-run",
    "training.max_steps": 480,
    "training.learning_rate": 1e-3,
}


def tune(settings: dict[str, Any]) -> dict[str, Any]:
    """Train and measure; what the run came to."""
    start, before = time.perf_counter(), _cpu_seconds()
    run = phi3v("train", RECIPE, *(part for key, value in settings.items() for part in (f"--{key}", value)))
    folder = ROOT / run.pop("folder")
    scores = {}
    for when in ("before", "after"):
        measured = json.loads((folder / f"eval_{when}.json").read_text(encoding="utf-8"))
        scores[when] = measured["scores"] | {"seconds": measured["seconds"]}
    return {
        "total_seconds": round(time.perf_counter() - start, 1),  # of wall time, as all seconds of the run
        "cpu_seconds": round(_cpu_seconds() - before, 1),
        "evaluation": scores,
        "training": run,
    }


def _cpu_seconds() -> float:
    """Of all commands so far, on all threads."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quickstart.json")
    out = parser.parse_args().out
    shutil.rmtree(ROOT / WORK, ignore_errors=True)
    start = time.perf_counter()
    model = phi3v("model", "init", "--preset", "tiny", "--pretrained", "--out", WORK / "model")
    phi3v("data", "convert", "easy-vqa", "--out", WORK / "data")
    figures: dict[str, Any] = {
        "parameters": model["parameters"],
        "preparing_seconds": round(time.perf_counter() - start, 1),
        "quickstart": tune({}),
    }
    phi3v("model", "init", "--preset", "tiny", "--out", WORK / "scratch-model")
    figures["from_scratch"] = tune(FROM_SCRATCH)
    print(json.dumps(write_result("quickstart", figures, out), indent=2))


if __name__ == "__main__":
    main()
