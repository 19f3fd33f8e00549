"""A small, real example of learning from preferences: the quickstart's model learns from its own answers.

    phi3v quickstart                            # leaves model, data and run in quickstart/
    python benchmarks/preference_example.py     # needs nothing else

1. The tuned model answers questions of the training split, several times each, by chance (`phi3v data pairs`); a right
   and a wrong answer to the same question become a pair.
2. DPO on these pairs, LoRA on the tuned model (recipe ``easy_vqa_dpo``).
3. Accuracy on the same questions of the untouched test split before and after, with 95 % intervals, and the interval of
   the difference: questions are drawn anew 10,000 times, with what both models made of each. And the accuracy of
   answers that are drawn by chance, to some of these questions.

What is there already is kept: a second run goes on where the first one was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from bench_result import ROOT, phi3v, write_result

RECIPE = "easy_vqa_dpo"
DRAWS = 10_000


def compare(run: Path) -> dict[str, Any]:
    """Scores before and after, and the difference on the same questions."""
    scores, right = {}, {}
    for when in ("before", "after"):
        measured = json.loads((run / f"eval_{when}.json").read_text(encoding="utf-8"))
        scores[when] = measured["scores"]["accuracy"]
        lines = (run / f"predictions_{when}.jsonl").read_text(encoding="utf-8").splitlines()
        right[when] = np.array([json.loads(line)["score"] for line in lines])
    change = right["after"] - right["before"]
    drawn = np.random.default_rng(0).integers(len(change), size=(DRAWS, len(change)))
    low, high = np.percentile(change[drawn].mean(axis=1), [2.5, 97.5])
    return {
        "accuracy": scores,
        "difference": {"value": float(change.mean()), "low": float(low), "high": float(high)},
        "questions_gained": int((change > 0).sum()),
        "questions_lost": int((change < 0).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("quickstart"), help="what `phi3v quickstart` left")
    parser.add_argument("--questions", type=int, default=1500, help="of the training split that are answered")
    parser.add_argument("--samples", type=int, default=6, help="answers to each")
    parser.add_argument("--test-questions", type=int, default=300, help="that are answered by chance too")
    parser.add_argument("--batch-size", type=int, default=96, help="answers drawn at once")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "preference_example.json")
    given, keys = parser.parse_known_args()  # keys of the recipe besides, as --training.learning_rate 1e-4
    work = given.quickstart / "preferences"
    base, pairs, run = work / "base", work / "pairs", work / "run"
    if not (ROOT / base).is_dir():
        phi3v("export", given.quickstart / "run", "--out", base)
    drawn = json.loads(made.read_text()) if (made := ROOT / work / "pairs.json").is_file() else None
    if drawn is None:
        drawn = phi3v(
            *("data", "pairs", "--model", base, "--data", given.quickstart / "data" / "train.jsonl"),
            *("--metric", "accuracy", "--samples", given.samples, "--top-p", 1.0, "--max-questions", given.questions),
            *("--batch-size", given.batch_size, "--out", pairs),
        )
        made.write_text(json.dumps(drawn))
    trained = phi3v("train", RECIPE, *keys)
    by_chance = {}
    for when, model in (("before", base), ("after", run)):
        out = work / f"test_{when}"
        shutil.rmtree(ROOT / out, ignore_errors=True)
        told = phi3v(
            *("data", "pairs", "--model", model, "--data", given.quickstart / "data" / "test.jsonl"),
            *("--metric", "accuracy", "--samples", given.samples, "--top-p", 1.0, "--max-new-tokens", 8),
            *("--max-questions", given.test_questions, "--batch-size", given.batch_size, "--out", out),
        )
        by_chance[when] = told["mean_score"]
    lines = [json.loads(line) for line in (ROOT / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = ("step", "loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "kl")
    figures = {
        "drawn": {name: value for name, value in drawn.items() if name not in ("model", "data", "file")},
        **compare(ROOT / run),
        "accuracy_by_chance": by_chance | {"questions": given.test_questions, "samples": given.samples},
        "training": {name: trained[name] for name in ("steps", "samples_per_second", "mean_train_loss")},
        "metrics": [{name: line[name] for name in shown if name in line} for line in lines if "loss" in line],
    }
    print(json.dumps(write_result("preference_example", figures, given.out), indent=2))


if __name__ == "__main__":
    main()
