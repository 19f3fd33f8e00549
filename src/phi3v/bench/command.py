"""``phi3v bench``: speed and memory of training, preprocessing and generating here."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from phi3v.bench.settings import VARIANTS, BenchSettings
from phi3v.config import METHODS, PRECISIONS
from phi3v.errors import UserError
from phi3v.grammar import Parser
from phi3v.model.preset_fields import PRESET_FIELDS


def add_commands(verbs: Parser) -> None:
    group = verbs.add_group("bench", "measure speed and memory on this machine")
    usual = BenchSettings()
    train = group.add_command(
        "train",
        bench_train,
        "speed and memory of training, compared with the public recipe's training; also under torchrun",
        "phi3v bench train --methods lora --variants recipe samples shared-image --out lora.json",
        on_all_ranks=True,
    )
    train.add_argument("--methods", nargs="+", action="extend", choices=METHODS, help="(default: all)")
    train.add_argument("--variants", "--ways", nargs="+", action="extend", choices=VARIANTS, help="(default: all)")
    numbers = {
        "steps": "timed steps, after one that is not timed",
        "seconds": "maximum seconds of a row",
        "batch_size": "samples per optimizer step, over all devices",
        "num_crops": "maximum number of crops per image",
        "micro_batch": "samples computed at once by the variant padded",
        "lean_batch": "samples per step of the variant lean",
        "pack_tokens": "tokens of a packed row",
        "shared_image_max": "maximum number of questions that share a page in a step",
        "rank": "rank of the adapters",
    }
    for name, text in numbers.items():
        value = getattr(usual, name)
        train.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, metavar="N", help=text)
    train.add_argument("--precision", choices=PRECISIONS, default=usual.precision, help="precision of computation")
    train.add_argument(
        "--optimizer",
        choices=("auto", "adamw", "adamw_8bit", "adamw_bf16"),
        default=usual.optimizer,
        help="optimizer; auto: adamw, for full and frozen-vision on a GPU adamw_8bit, or adamw_bf16 without "
        "bitsandbytes. lean takes adamw_8bit, or adamw_bf16 if that is given",
    )
    train.add_argument("--kernels", choices=("torch", "liger"), default=usual.kernels, help="kernels of our variants")
    train.add_argument("--fp8", action="store_true", help="our variants compute the decoder in float8; not exact")
    train.add_argument("--compile", action="store_true", help="our variants compile their layers with torch.compile")
    train.add_argument("--memory-gb", type=float, metavar="GB", help="10^9 bytes of the GPU that torch may use")
    train.add_argument("--profile", action="store_true", help="profile one more step: kernels, gaps, waits")
    preprocess = group.add_command(
        "preprocess",
        bench_preprocess,
        "CPU time per page, compared with the official processor",
        "phi3v bench preprocess --pages 4",
    )
    preprocess.add_argument(
        "--images", type=Path, metavar="DIR", help="images to use instead of drawn pages of 1275x1650"
    )
    preprocess.add_argument("--pages", type=int, default=8, metavar="N", help="number of pages")
    preprocess.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds over the pages")
    preprocess.add_argument("--num-crops", type=int, default=16, metavar="N", help="maximum number of crops per image")
    generate = group.add_command(
        "generate",
        bench_generate,
        "speed of answering questions in batches, compared with one at a time",
        "phi3v bench generate --model output/first/final --data data/test.jsonl",
    )
    generate.add_argument("--questions", type=int, default=64, metavar="N", help="number of questions")
    generate.add_argument("--batch-size", type=int, default=64, metavar="N", help="questions answered at once")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="maximum tokens of an answer")
    generate.add_argument(
        "--num-crops", type=int, metavar="N", help="maximum number of crops per image (default: as saved)"
    )
    for command in (train, generate):
        which = command.add_mutually_exclusive_group()
        which.add_argument(
            "--preset",
            choices=tuple(PRESET_FIELDS),
            help="random weights (default: phi-3.5-vision on a GPU, else tiny)",
        )
        which.add_argument("--model", type=Path, metavar="DIR", help="a model to use instead of random weights")
        command.add_argument("--data", type=Path, metavar="FILE.jsonl", help="data to use instead of drawn pages")
    for command in (train, preprocess, generate):
        command.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there")


def bench_train(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.bench.training import bench_train

    names = [entry.name for entry in dataclasses.fields(BenchSettings)]
    result = bench_train(
        arguments.methods or METHODS,
        arguments.variants or VARIANTS,
        BenchSettings(**{name: getattr(arguments, name) for name in names}),
        console,
        preset=arguments.preset,
        model=arguments.model,
        data=arguments.data,
        out=arguments.out,
    )
    # A row that cannot run has its reason beside the others; none at all is no result.
    return result | {"exit_code": 2 if all("error" in row for row in result["rows"]) else 0}


def bench_preprocess(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.bench.pages import LETTER, draw_page
    from phi3v.bench.preprocess import bench_preprocess

    images, pages = arguments.images, arguments.pages
    if images is None:
        contents = [draw_page(seed, LETTER) for seed in range(pages)]
    elif images.is_dir():
        contents = [path.read_bytes() for path in sorted(path for path in images.iterdir() if path.is_file())[:pages]]
    else:
        raise UserError("no such folder", where=f"--images {images}")
    figures = bench_preprocess(contents, arguments.num_crops, arguments.repeats)
    return _finish("preprocess", figures, console, arguments.out)


def bench_generate(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.bench.generation import bench_generate
    from phi3v.bench.training import bench_inputs

    model, data, named = bench_inputs(arguments.preset, arguments.model, arguments.data, arguments.questions)
    names = ("questions", "batch_size", "max_new_tokens", "num_crops")
    figures = bench_generate(model, data, **{name: getattr(arguments, name) for name in names})
    return _finish("generate", {"model": named} | figures, console, arguments.out)


def _finish(name: str, figures: dict[str, Any], console: Console, out: Path | None) -> dict[str, Any]:
    from phi3v.bench.result import with_environment, write_json

    result = with_environment(name, figures)
    table = Table("figure", "value", title=f"{name} on {result['device']}")
    for key, value in figures.items():
        rows = (
            {f"{key}: {inner}": number for inner, number in value.items()} if isinstance(value, dict) else {key: value}
        )
        for figure, number in rows.items():
            table.add_row(figure, str(number))
    console.print(table)
    if out is not None:
        write_json(result, out)
    return result
