"""``phi3v model``: make models."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v.config import DTYPES, torch_dtype
from phi3v.errors import UserError
from phi3v.grammar import Parser
from phi3v.model.preset_fields import PRESET_FIELDS
from phi3v.terminal import say


def add_commands(verbs: Parser) -> None:
    init = verbs.add_group("model", "make models").add_command(
        "init",
        init_model,
        "write a small or random model in the official layout, with processor and tokenizer",
        "phi3v model init --preset tiny --out tiny",
    )
    init.add_argument("--preset", choices=tuple(PRESET_FIELDS), required=True, help="which architecture")
    init.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write it")
    init.add_argument(
        "--pretrained",
        action="store_true",
        help="tiny only: the small base model that comes with the package, instead of random weights",
    )
    init.add_argument("--seed", type=int, default=0, help="seed of random weights")
    init.add_argument(
        "--dtype",
        choices=tuple(DTYPES.values()),
        help="dtype of the weights (default: float32 for tiny, bfloat16 for the real sizes)",
    )
    init.add_argument(
        "--tokenizer",
        type=Path,
        default=os.environ.get("PHI3V_TOKENIZER"),
        metavar="DIR",
        help="folder with Phi-3's tokenizer (default: $PHI3V_TOKENIZER, else a small built-in one); "
        "the tiny preset always has the built-in one",
    )


def init_model(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.model.presets import copy_pretrained, init_model

    preset, out = arguments.preset, arguments.out
    if arguments.pretrained:
        if arguments.dtype:
            raise UserError("the pretrained base is copied as it is", where="--dtype", hint="leave it out")
        parameters = copy_pretrained(preset, out)
    else:
        dtype = torch_dtype(arguments.dtype) if arguments.dtype else None
        tokenizer = arguments.tokenizer if preset != "tiny" else None
        parameters = init_model(preset, out, seed=arguments.seed, dtype=dtype, tokenizer=tokenizer)
    say(console, f"{preset}: {parameters:,} parameters in {out}")
    return {"preset": preset, "parameters": parameters, "folder": str(out)}
