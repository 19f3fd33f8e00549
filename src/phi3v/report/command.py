"""``phi3v report``: one HTML file about one or several runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v.grammar import Parser
from phi3v.terminal import say


def add_commands(verbs: Parser) -> None:
    command = verbs.add_command(
        "report",
        report,
        "write one HTML file about a run, or several compared: curves, scores, predictions, configuration",
        "phi3v report output/first output/second --out compared.html",
        brief="write an HTML report of one or several runs",
    )
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    command.add_argument(
        "--out", type=Path, metavar="FILE.html", help="the file (default: report.html in the run folder, or here)"
    )
    command.add_argument(
        "--images",
        type=float,
        default=2.0,
        metavar="MB",
        help="maximum size of the thumbnails in the page",
    )
    command.add_argument("--open", action="store_true", help="open it in the browser")


def report(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.report.page import announce_page
    from phi3v.report.report import report

    told = report(arguments.runs, out=arguments.out, image_budget=int(arguments.images * 1e6))
    for run in told["runs"]:
        for note in run["missing"]:
            say(console, f"{run['folder']}: {note}")
    announce_page(console, told["report"], told["bytes"], show=arguments.open)
    return told
