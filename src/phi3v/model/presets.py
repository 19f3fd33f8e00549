"""Models with random weights in the official layout: the real sizes, and a tiny one of the same architecture."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from phi3v.errors import UserError
from phi3v.model.checkpoint import checkpoint_shapes, make_weights_readable
from phi3v.model.configuration import HD_EMBEDDING, Phi3VConfig
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.preset_fields import NUM_CROPS, PRESET_FIELDS
from phi3v.processing.image_processor import Phi3VImageProcessor
from phi3v.processing.tiny_tokenizer import save_tiny_tokenizer
from phi3v.processing.tokenizer import TOKEN_IDS, TOKENIZER_FILES

# Made by benchmarks/tiny_base.py.
PRETRAINED_TINY = Path(__file__).parent / "tiny_base"
# Their sizes are known without asking the hub, under whatever name that has one of these in it.
RELEASED = ("phi-3.5-vision", "phi-3-vision")


def preset_config(preset: str, **overrides: Any) -> Phi3VConfig:
    """The configuration of a preset.

    Raises:
        UserError: there is no such preset.
    """
    if preset not in PRESET_FIELDS:
        raise UserError(f"unknown preset {preset!r}", hint=f"choose one of {', '.join(PRESET_FIELDS)}")
    fields = PRESET_FIELDS[preset]
    return Phi3VConfig(
        **(fields | {"embd_layer": dict(HD_EMBEDDING), "architectures": ["Phi3VForCausalLM"]} | overrides)
    )


def planned_config(path: str) -> tuple[Phi3VConfig, str]:
    """The configuration of the model at ``path`` and where it is from; nothing is downloaded for a released model.

    Raises:
        UserError: there is no model, and it is not a released one.
    """
    if Path(path).is_dir():
        try:
            return Phi3VConfig.from_pretrained(path), str(path)
        except (OSError, ValueError) as error:
            raise UserError(f"no model there: {str(error).splitlines()[0]}", where=f"model.path {path}") from None
    for preset in RELEASED:
        if preset in path.lower():
            return preset_config(preset), f"the released {preset}"
    raise UserError(
        "no model there, and it is not one of the released models",
        where=f"model.path {path}",
        hint="give a folder in the official layout, microsoft/Phi-3.5-vision-instruct or …/Phi-3-vision-128k-instruct",
    )


def init_model(
    preset: str,
    out: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """Write a model with random weights, its processor and tokenizer to ``out``.

    Weights are drawn in ``dtype`` (default: float32 for ``tiny``, bfloat16 for the real sizes) and written in shards,
    so the memory stays a little above the size of the model.

    Args:
        tokenizer: a folder with the real tokenizer; by default the built-in small one, for the real sizes with the
            chat tokens at their official ids.
        device: what draws the weights; each kind draws others. The real sizes take a CPU minutes, a GPU seconds.

    Returns:
        The number of parameters.

    Raises:
        UserError: unknown preset, ``out`` holds a model already, or ``tokenizer`` has no tokenizer.json.
    """
    _require_no_model(out)
    is_tiny = preset == "tiny"
    # Errors before anything is written.
    preset_config(preset)
    if tokenizer is not None:
        if not (tokenizer / "tokenizer.json").is_file():
            raise UserError("no tokenizer.json here", where=str(tokenizer))
        ids = {token: _token_id(tokenizer, token) for token in TOKEN_IDS}
        size = max(ids.values()) + 1
        out.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, out / name)
    else:
        out.mkdir(parents=True, exist_ok=True)
        made = save_tiny_tokenizer(out, official_ids=not is_tiny)
        ids = {token: made.get_vocab()[token] for token in TOKEN_IDS}
        size = max(made.get_vocab().values()) + 1
    overrides: dict[str, Any] = {}
    if is_tiny:
        # A multiple of 64 keeps the head's matrix friendly to every kernel.
        overrides = {
            "vocab_size": -(-size // 64) * 64,
            "eos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "image_token_id": ids["<|image|>"],
        }
    config = preset_config(preset, **overrides)
    set_seed(seed)
    dtype = dtype or (torch.float32 if is_tiny else torch.bfloat16)
    with torch.device(device):
        model = Phi3VForCausalLM._from_config(config, dtype=dtype)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = [ids["<|end|>"], ids["<|endoftext|>"]]
        model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(out, max_shard_size="1GB")
    make_weights_readable(out)
    processor = Phi3VImageProcessor(num_crops=NUM_CROPS[preset])
    processor.processor_class = "Phi3VProcessor"
    processor.save_pretrained(out)
    return sum(parameter.numel() for parameter in model.parameters())


def copy_pretrained(preset: str, out: Path) -> int:
    """Write the pretrained base that the package ships to ``out``; its card tells what it can do.

    Returns:
        The number of parameters.

    Raises:
        UserError: the package ships none of this preset, or ``out`` holds a model already.
    """
    if preset != "tiny":
        raise UserError(
            f"no pretrained {preset} comes with the package",
            where="--pretrained",
            hint="Microsoft publishes the real weights: name microsoft/Phi-3.5-vision-instruct as model.path",
        )
    _require_no_model(out)
    out.mkdir(parents=True, exist_ok=True)
    for file in PRETRAINED_TINY.iterdir():
        shutil.copyfile(file, out / file.name)
    return sum(map(math.prod, checkpoint_shapes(out).values()))


def _require_no_model(out: Path) -> None:
    if (out / "config.json").exists():
        raise UserError("there is a model already", where=str(out), hint="choose another --out, or remove it first")


def _token_id(folder: Path, token: str) -> int:
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    for entry in added:
        if entry["content"] == token:
            return int(entry["id"])
    raise UserError(f"the tokenizer has no {token}", where=str(folder), hint="give the folder of Phi-3's tokenizer")
