"""``phi3v export``: write a merged model, or check a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v.config import DTYPES
from phi3v.errors import UserError
from phi3v.grammar import Parser


def add_commands(verbs: Parser) -> None:
    command = verbs.add_command(
        "export",
        export,
        "write a tuned model in the official layout, merged and proven, or check a folder",
        "phi3v export output/mine --out models/mine",
        brief="write a merged model, proven; or check a folder",
    )
    command.add_argument(
        "source", nargs="?", metavar="RUN", help="a run, its best/ or final/, a checkpoint, an adapter or a model"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="where to write it")
    command.add_argument(
        "--dtype", choices=tuple(DTYPES.values()), help="of the weights (default: the original model's)"
    )
    command.add_argument("--adapter", action="store_true", help="the adapter alone, in PEFT's layout")
    command.add_argument(
        "--model", "--base", dest="base", metavar="MODEL", help="the model that it was tuned from, where that has moved"
    )
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file")
    command.add_argument("--samples", type=int, default=4, metavar="N", help="prompts to compare with")
    command.add_argument("--overwrite", action="store_true", help="replace what is in DIR")
    command.add_argument("--verify", type=Path, metavar="DIR", help="only check whether a folder is whole and right")


def export(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    if (arguments.source is None) == (arguments.verify is None):
        raise UserError("name what to export, or a folder with --verify", hint="phi3v export output/mine --out DIR")
    if arguments.verify is not None:
        from phi3v.export.verify import verify_folder

        report = verify_folder(arguments.verify, console)
        return report.to_json_dict() | {"exit_code": 0 if report.ok else 2}
    if arguments.out is None:
        raise UserError("where to write it is not said", where="--out", hint="phi3v export output/mine --out DIR")
    if arguments.samples < 1:
        raise UserError("at least one prompt is needed to compare with", where="--samples")
    from phi3v.export.make import export

    names = ("dtype", "adapter", "base", "max_shard_size", "samples", "overwrite")
    settings = {name: getattr(arguments, name) for name in names}
    return export(arguments.source, arguments.out, console, **settings).to_json_dict()
