"""``phi3v recipes``: the recipes of the package, listed and copied; ``phi3v quickstart``: the first one, run."""

from __future__ import annotations

import argparse
import filecmp
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v.config import add_keys
from phi3v.errors import UserError
from phi3v.grammar import RECIPES, Parser
from phi3v.paths import cannot_write
from phi3v.terminal import say

DEFAULT_OUT = Path("quickstart")


def add_commands(verbs: Parser) -> None:
    command = verbs.add_command(
        "quickstart",
        partial(quickstart, verbs),
        "a first fine-tune, in ten minutes on two CPU cores: LoRA on the bundled tiny model with the data of easy-vqa "
        "(an extra), evaluated before and after; --key.subkey value overrides the recipe, easy_vqa_tiny",
        "phi3v quickstart --out quickstart",
        brief="a first fine-tune on the CPU, in ten minutes",
    )
    command.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="folder for model, data and run")
    add_keys(command, shown=False)

    group = verbs.add_group("recipes", "list the recipes, copy one", default="list")
    group.add_command(
        "list", list_recipes, "list the recipes that come with phi3v, as `phi3v recipes` alone does", "phi3v recipes"
    )
    command = group.add_command(
        "copy", copy_recipe, "write a recipe to a file, to change it", "phi3v recipes copy docvqa_lora --out mine.yaml"
    )
    command.add_argument("name", choices=tuple(RECIPES), metavar="NAME", help="a name that `phi3v recipes` lists")
    command.add_argument(
        "--out", type=Path, metavar="PATH", help="the file, or a folder for it (default: NAME.yaml, here)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def list_recipes(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    recipes = [
        {"name": name, "about": path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "), "file": str(path)}
        for name, path in RECIPES.items()
    ]
    width = max(map(len, RECIPES))
    for recipe in recipes:
        say(console, f"{recipe['name']:{width}}  {recipe['about']}")
    return {"recipes": recipes}


def copy_recipe(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    name, out = arguments.name, arguments.out or Path()
    out = out / f"{name}.yaml" if out.is_dir() else out
    # The commands in its head are those of the copy.
    text = RECIPES[name].read_text(encoding="utf-8").replace(f" train {name}\n", f" train {shlex.quote(str(out))}\n")
    try:
        with out.open("w" if arguments.overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError("is there already", where=str(out), hint="choose another --out, or add --overwrite") from None
    except OSError as error:
        raise cannot_write(error, str(out), "choose another --out") from None
    say(console, f"recipe: {out}; run it: phi3v train {shlex.quote(str(out))}")
    return {"name": name, "file": str(out)}


def quickstart(verbs: Parser, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run three command lines, shown as they are typed; a model and data that are there already are kept."""
    from phi3v.data.sources.easy_vqa import package_data
    from phi3v.model.presets import PRETRAINED_TINY

    package_data()
    out = arguments.out
    model, data = out / "model", out / "data"
    keys: dict[str, Any] = {"training.overwrite": "true"}
    if out != DEFAULT_OUT:  # which the recipe names
        keys |= {"model.path": model, "data.train": data / "train.jsonl", "data.eval": data / "test.jsonl"}
        keys["training.output_dir"] = out / "run"
    keys |= arguments.overrides
    words = [
        f"--{key}={each}" for key, value in keys.items() for each in (value if isinstance(value, list) else [value])
    ]
    lines = {
        "model": ["model", "init", "--preset", "tiny", "--pretrained", "--out", str(model)],
        "data": ["data", "convert", "easy-vqa", "--out", str(data)],
        "run": ["train", "easy_vqa_tiny", *words],
    }
    weights = "model.safetensors"
    if (model / weights).is_file() and filecmp.cmp(model / weights, PRETRAINED_TINY / weights, shallow=False):
        del lines["model"]
    steps = {name: verbs.read(line) for name, line in lines.items()}
    told = {}
    for name, step in steps.items():
        say(console, f"$ phi3v {shlex.join(lines[name])}", style="bold")
        told[name] = step.handler(step, console)
    return told
