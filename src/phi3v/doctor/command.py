"""``phi3v doctor``: check a recipe without training."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from phi3v.config import add_recipe, load_config
from phi3v.grammar import Parser


def add_commands(verbs: Parser) -> None:
    command = verbs.add_command(
        "doctor",
        doctor,
        "check environment, recipe, data, model and gradients before a run; exits with 2 if something fails",
        "phi3v doctor docvqa_lora",
        brief="check everything before a run",
    )
    add_recipe(command)


def doctor(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    config = load_config(arguments.recipe, arguments.overrides)
    from phi3v.doctor.diagnosis import diagnose

    report = diagnose(config, console)
    return report.to_json_dict() | {"exit_code": 0 if report.ok else 2}
