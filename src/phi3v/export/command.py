"""``phi3v export``: write a merged model, in the official layout or in others, or check a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v.config import DTYPES
from phi3v.errors import UserError
from phi3v.export.formats import FORMATS, OPTIONS
from phi3v.grammar import Parser


def add_commands(verbs: Parser) -> None:
    command = verbs.add_command(
        "export",
        export,
        "export a fine-tuned model, merged and verified, in the official layout or in others; or check a folder",
        "phi3v export output/mine --out models/mine --format hf w4a16",
        brief="export a merged, verified model; or check a folder",
    )
    command.add_argument(
        "source", nargs="?", metavar="RUN", help="a run, its best/ or final/, a checkpoint, an adapter or a model"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="where to write it")
    command.add_argument(
        "--format",
        nargs="+",
        action="extend",
        choices=("hf", *FORMATS),
        metavar="NAME",
        help="formats; several go to a folder each in DIR. hf: the official layout (default); "
        + "; ".join(f"{name}: {format_.about}" for name, format_ in FORMATS.items()),
    )
    command.add_argument(
        "--dtype", choices=tuple(DTYPES.values()), help="dtype of the weights (default: the original model's)"
    )
    command.add_argument("--adapter", action="store_true", help="export only the adapter, in PEFT's layout")
    command.add_argument("--model", "--base", dest="base", metavar="MODEL", help="the base model, if it has moved")
    command.add_argument("--max-shard-size", metavar="SIZE", help="maximum size of a file of hf (default: 5GB)")
    command.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="number of the run's own questions to verify with (default: 4; 32 for other formats than hf)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace what is in DIR")
    other = command.add_argument_group("other formats than hf")
    other.add_argument("--bits", type=int, choices=(4, 8), help="bits of the decoder's weights (openvino, onnx: 4)")
    other.add_argument(
        "--group-size", type=int, metavar="N", help="weights that share a scale; 0: one scale per output channel"
    )
    other.add_argument(
        "--calibrate",
        dest="calibration",
        type=Path,
        metavar="FILE.jsonl",
        help="fit the rounding to the answers of this data (GPTQ, for w4a16)",
    )
    other.add_argument("--max-length", type=int, metavar="N", help="longest prompt and answer that a graph is made for")
    other.add_argument(
        "--questions", type=int, metavar="N", help="questions of the run's evaluation data to score (default: 200)"
    )
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
    if arguments.format is not None and len(arguments.format) > 1 and (arguments.push or arguments.serve_check):
        where = "--push" if arguments.push else "--serve-check"
        raise UserError("is about one folder", where=where, hint="name one format; later: --verify DIR/FORMAT")
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
    from phi3v.export.divergence import PROOF, PROOF_FACTS
    from phi3v.json_files import read_json

    other = [name for name in arguments.format or () if name != "hf"]
    if arguments.verify is not None and (arguments.verify / PROOF / PROOF_FACTS).is_file():
        other = [read_json(arguments.verify / PROOF / PROOF_FACTS).get("format")]
    if other:
        raise UserError(
            f"is about the official layout, not about {other[0]}",
            where="--serve-check",
            hint="leave it out, or export --format hf alone",
        )
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
    if arguments.samples is not None and arguments.samples < 1:
        raise UserError("at least one prompt is needed", where="--samples")
    formats = arguments.format or ["hf"]
    if arguments.questions is not None and arguments.questions < 0:
        raise UserError("cannot be negative", where="--questions", hint="0 scores none")
    settings = {name: getattr(arguments, name) for name in ("dtype", "base", "base_id", "overwrite")}
    if arguments.max_shard_size is not None:
        if "hf" not in formats:
            raise UserError("is about the format hf", where="--max-shard-size", hint="leave it out")
        settings["max_shard_size"] = arguments.max_shard_size
    samples = {"samples": arguments.samples} if arguments.samples is not None else {}
    options = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    if formats == ["hf"]:
        others = [OPTIONS[name] for name in options] + ["--questions"] * (arguments.questions is not None)
        for option in others:
            raise UserError("is about other formats than hf", where=option, hint="name one with --format")
        from phi3v.export.make import export

        for_hub = arguments.push is not None
        kwargs = settings | samples | {"adapter": arguments.adapter, "for_hub": for_hub}
        return export(arguments.source, arguments.out, console, **kwargs).to_json_dict()
    if arguments.adapter:
        raise UserError("an adapter has no other format", where="--adapter", hint="leave it out, or leave --format out")
    from phi3v.export.deploy import deploy

    questions = {"questions": arguments.questions} if arguments.questions is not None else {}
    made = deploy(arguments.source, arguments.out, formats, options, console, **settings, **samples, **questions)
    told = [result.to_json_dict() for result in made]
    return told[0] if len(formats) == 1 else {"exports": told}
