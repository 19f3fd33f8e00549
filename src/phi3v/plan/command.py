"""``phi3v plan``: one machine in full, or several in one table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v.config import add_recipe, load_config
from phi3v.errors import UserError
from phi3v.grammar import Parser
from phi3v.terminal import say


def add_commands(verbs: Parser) -> None:
    command = verbs.add_command(
        "plan",
        plan,
        "predict what fits which GPUs, how fast it is and what quota it needs; --key.subkey value overrides the recipe",
        "phi3v plan docvqa_lora --gpu a100-80gb --gpus 8",
        brief="predict what fits which GPUs, and how fast",
    )
    add_recipe(command)
    command.add_argument(
        "--gpu",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="e.g. a100-80gb, or 8xa100-80gb; several are compared in one table (default: this machine)",
    )
    command.add_argument("--gpus", type=int, metavar="N", help="number of GPUs (default: 1)")
    command.add_argument("--sku", metavar="SIZE", help="an Azure size instead of --gpu, e.g. Standard_ND96asr_v4")
    command.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes of that size")
    command.add_argument("--write", type=Path, metavar="FILE.yaml", help="write the recommended recipe")


def plan(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    config = load_config(arguments.recipe, arguments.overrides)
    gpus, count, write = arguments.gpu or [None], arguments.gpus, arguments.write
    if len(gpus) > 1 and (write is not None or count is not None):
        where = "--write" if write is not None else "--gpus"
        raise UserError("several machines are compared", where=where, hint="name one --gpu, e.g. 8xa100-80gb")
    from phi3v.plan.hardware import find_machine
    from phi3v.plan.options import planned_recipe
    from phi3v.plan.planner import Planner
    from phi3v.plan.show import show_comparison, show_plan

    machines = [find_machine(gpu, count, arguments.sku, arguments.nodes) for gpu in gpus]
    planner = Planner(config, progress=config.training.progress_bar)
    plans = [planner.plan(machine) for machine in machines]
    if len(plans) > 1:
        show_comparison(console, plans)
        return {"machines": [plan.to_json_dict() for plan in plans]}
    show_plan(console, plans[0])
    if write is not None:
        write.write_text(planned_recipe(plans[0]), encoding="utf-8")
        say(console, f"recipe: {write}")
    return plans[0].to_json_dict()
