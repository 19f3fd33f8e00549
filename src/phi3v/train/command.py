"""``phi3v train``."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from phi3v.config import add_recipe, load_config
from phi3v.errors import UserError
from phi3v.grammar import Parser


def add_commands(verbs: Parser) -> None:
    command = verbs.add_command(
        "train",
        train,
        "fine-tune a model from a recipe; options override its keys. SIGTERM, SIGINT and SIGUSR1 stop training after "
        "the current step, with a checkpoint and exit code 3",
        "phi3v train docvqa_lora --training.output_dir output/first",
        brief="fine-tune a model from a recipe",
        on_all_ranks=True,
    )
    command.usage = "phi3v train [RECIPE] [--resume [auto|CHECKPOINT]] [--json] [--key.subkey value …]"
    add_recipe(command, shown=True)
    command.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from this checkpoint, or from the newest valid one in training.output_dir; without any, start "
        "from the beginning (default: start from the beginning)",
    )


def train(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    if arguments.recipe is None and not arguments.overrides:
        raise UserError(
            "there is nothing to train", hint="name a recipe, or keys such as --data.train; see `phi3v train --help`"
        )
    config = load_config(arguments.recipe, arguments.overrides)
    if arguments.recipe is not None:
        recipe = arguments.recipe.absolute()
        is_of_run = recipe.name == "config.yaml" and (recipe.parent / "environment.json").is_file()
        if is_of_run and "training.output_dir" not in arguments.overrides:
            config = config.now_in(recipe.parent)  # which may have been moved since
            config.training.output_dir = str(recipe.parent)
    from phi3v.doctor.diagnosis import check_before_training
    from phi3v.report.live import train_with_report

    check_before_training(config)
    return train_with_report(config, console, arguments.resume).to_json_dict()
