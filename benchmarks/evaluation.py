"""How much faster evaluation is than answering one question at a time, with the same answers.

    make quickstart && python benchmarks/evaluation.py [--questions 300]

``phi3v bench generate`` does the measuring, here with the quickstart's model and data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench_result import ROOT, write_result
from phi3v.bench.generation import bench_generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "quickstart" / "run" / "final")
    parser.add_argument("--data", type=Path, default=ROOT / "quickstart" / "data" / "test.jsonl")
    parser.add_argument("--questions", type=int, default=1000, help="the first so many of the file")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="as the public recipe")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "evaluation.json")
    arguments = parser.parse_args()
    figures = bench_generate(
        arguments.model,
        arguments.data,
        questions=arguments.questions,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
    )
    print(json.dumps(write_result("evaluation", figures, arguments.out), indent=2))


if __name__ == "__main__":
    main()
