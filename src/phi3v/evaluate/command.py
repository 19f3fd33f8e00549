"""``phi3v eval``: score a model on a data file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v.config import METRIC_NAMES, PRECISIONS
from phi3v.grammar import Parser

# Options that replace the run's own settings of its evaluation.
SETTINGS = ("metrics", "answer_words", "max_questions", "batch_size", "max_new_tokens")


def add_commands(verbs: Parser) -> None:
    command = verbs.add_command(
        "eval",
        evaluate,
        "score a model, an adapter or a run on a data file; also under torchrun",
        "phi3v eval output/first --data data/test.jsonl --metrics accuracy token_f1 --out output/first-test",
        brief="score a model, an adapter or a run",
        on_all_ranks=True,
    )
    command.add_argument("model", metavar="MODEL_OR_RUN", help="a model folder, a hub id, an adapter or a run folder")
    command.add_argument("--model", "--base", dest="base", metavar="MODEL", help="the base model, if it has moved")
    command.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl", help="the questions")
    command.add_argument("--out", type=Path, metavar="DIR", help="write eval.json and predictions.jsonl there")
    command.add_argument(
        "--submission",
        type=Path,
        metavar="FILE",
        help="write a file for the official evaluator of docvqa (JSON), nlvr2 or hateful-memes (CSV)",
    )
    own = "default: as the run was evaluated"
    command.add_argument(
        "--metrics",
        nargs="+",
        action="extend",
        choices=METRIC_NAMES,
        metavar="NAME",
        help=f"metrics, the primary one first, from {', '.join(METRIC_NAMES)} ({own}, else accuracy)",
    )
    command.add_argument(
        "--answer-words",
        nargs="+",
        action="extend",
        metavar="WORD",
        help=f"for auroc: the possible answers, the positive one first, e.g. yes no ({own})",
    )
    command.add_argument("--max-questions", type=int, metavar="N", help=f"size of a random sample ({own}, else all)")
    command.add_argument("--batch-size", type=int, metavar="N", help=f"questions answered at once ({own}, else 8)")
    command.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"maximum tokens of an answer ({own}, else by the references)"
    )
    command.add_argument(
        "--num-crops", type=int, metavar="N", help="maximum number of crops per image (default: as saved)"
    )
    command.add_argument("--precision", choices=PRECISIONS, help=f"precision of computation ({own}, else auto)")


def evaluate(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.train.evaluate_finetuned import evaluate_tuned
    from phi3v.train.observers.signals import Signals

    with Signals() as signals:
        signals.doing = "evaluating; nothing was written"
        result = evaluate_tuned(
            arguments.model,
            str(arguments.data),
            console,
            base=arguments.base,
            settings={key: value for key in SETTINGS if (value := getattr(arguments, key)) is not None},
            num_crops=arguments.num_crops,
            precision=arguments.precision,
            out=arguments.out,
            submission=arguments.submission,
        )
    written = {"submission": str(arguments.submission)} if arguments.submission else {}
    return {"model": arguments.model, "data": str(arguments.data)} | result.summary() | written
