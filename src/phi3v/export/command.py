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
        "export a fine-tuned model, merged, in the official layout and verified; or check a folder",
        "phi3v export output/mine --out models/mine",
        brief="export a merged, verified model; or check a folder",
    )
    command.add_argument(
        "source", nargs="?", metavar="RUN", help="a run, its best/ or final/, a checkpoint, an adapter or a model"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="where to write it")
    command.add_argument(
        "--dtype", choices=tuple(DTYPES.values()), help="dtype of the weights (default: the original model's)"
    )
    command.add_argument("--adapter", action="store_true", help="export only the adapter, in PEFT's layout")
    command.add_argument("--model", "--base", dest="base", metavar="MODEL", help="the base model, if it has moved")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="maximum size of a file")
    command.add_argument("--samples", type=int, default=4, metavar="N", help="number of prompts to verify with")
    command.add_argument("--overwrite", action="store_true", help="replace what is in DIR")
    command.add_argument("--verify", type=Path, metavar="DIR", help="only check that a folder is complete and correct")
    command.add_argument(
        "--serve-check", action="store_true", help="then start vLLM on DIR and compare its answers; also with --verify"
    )
    command.add_argument("--vllm", metavar="PATH", help="its executable (default: $PHI3V_VLLM, else that on the path)")
    command.add_argument(
        "--base-id", metavar="OWNER/NAME", help="the base model's name on the hub, if it was trained from a folder"
    )
    command.add_argument(
        "--push", metavar="OWNER/NAME", help="then upload it to the hub, after asking; also with --verify"
    )
    command.add_argument("--private", action="store_true", help="make the repository of --push a private one")
    command.add_argument("--yes", action="store_true", help="upload without asking")


def export(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    if (arguments.source is None) == (arguments.verify is None):
        raise UserError("name what to export, or a folder with --verify", hint="phi3v export output/mine --out DIR")
    if arguments.push is not None:
        from phi3v.export.push import check_push, push

        check_push(arguments.push, yes=arguments.yes)
    elif arguments.private or arguments.yes:
        raise UserError("is about --push", where="--private" if arguments.private else "--yes", hint="add it")
    vllm = _vllm(arguments) if arguments.serve_check or arguments.vllm is not None else None
    if arguments.verify is not None:
        if arguments.base_id is not None:
            raise UserError("is written when an export is made", where="--base-id", hint="export it again with it")
        from phi3v.export.verify import verify_folder

        report = verify_folder(arguments.verify, console, base=arguments.base)
        told, folder = report.to_json_dict() | {"exit_code": 0 if report.ok else 2}, arguments.verify
        if not report.ok:
            return told
    else:
        told, folder = _make(arguments, console), arguments.out
    if vllm is not None:
        from phi3v.export.serving import serve_check

        told["served"] = serve_check(folder, vllm, console).to_json_dict()
    if arguments.push is not None:
        told["pushed"] = push(folder, arguments.push, console, private=arguments.private, yes=arguments.yes)
    return told


def _vllm(arguments: argparse.Namespace) -> Path:
    """The executable that is to serve the export, before that is made."""
    if not arguments.serve_check:
        raise UserError("is about --serve-check", where="--vllm", hint="add it")
    if arguments.adapter or (arguments.verify is not None and (arguments.verify / "adapter_config.json").is_file()):
        raise UserError("vLLM serves a merged model", where="--serve-check", hint="export without --adapter")
    from phi3v.export.serving import find_vllm, require_servable
    from phi3v.model.configuration import Phi3VConfig
    from phi3v.train.finetuned import resolve_model

    vllm = find_vllm(arguments.vllm)
    if arguments.verify is None:
        require_servable(Phi3VConfig.from_pretrained(resolve_model(arguments.source, arguments.base).base))
    return vllm


def _make(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    if arguments.out is None:
        raise UserError("the output folder is missing", where="--out", hint="phi3v export output/mine --out DIR")
    if arguments.samples < 1:
        raise UserError("at least one prompt is needed", where="--samples")
    from phi3v.export.make import export

    names = ("dtype", "adapter", "base", "base_id", "max_shard_size", "samples", "overwrite")
    settings = {name: getattr(arguments, name) for name in names}
    for_hub = arguments.push is not None
    return export(arguments.source, arguments.out, console, for_hub=for_hub, **settings).to_json_dict()
