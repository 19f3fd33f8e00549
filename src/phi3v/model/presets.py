"""Models with random weights in the official layout: the real sizes, and a tiny one of the same architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from phi3v.errors import UserError
from phi3v.model.checkpoint import make_weights_readable
from phi3v.model.configuration import HD_EMBEDDING, Phi3VConfig
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.processing.image_processor import Phi3VImageProcessor
from phi3v.processing.processor import TOKENIZER_FILES
from phi3v.processing.tiny_tokenizer import CHAT_TOKENS, save_tiny_tokenizer

# LongRoPE factors as published in each model's config.json.
PHI_35_ROPE = {
    "long_factor": [
        1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115,
        1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863,
        4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137,
        17.670000076293945, 24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523,
        32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156,
        50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457,
        62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457,
        63.77000427246094, 63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688,
        64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938, 64.4800033569336,
        64.51000213623047, 64.52999877929688, 64.83999633789062,
    ],
    "short_factor": [
        1.08, 1.1, 1.1300000000000001, 1.2800000000000002, 1.3100000000000003, 1.4500000000000004,
        1.4500000000000004, 1.9500000000000008, 2.030000000000001, 2.4299999999999926, 2.5699999999999896,
        2.9499999999999815, 3.729999999999965, 3.869999999999962, 4.189999999999955, 4.43999999999995,
        4.6399999999999455, 4.979999999999938, 5.159999999999934, 5.279999999999932, 5.759999999999922,
        5.889999999999919, 5.889999999999919, 5.969999999999917, 6.089999999999915, 6.2799999999999105,
        6.7699999999999, 6.8899999999998975, 7.109999999999893, 7.129999999999892, 7.179999999999891,
        7.289999999999889, 7.339999999999888, 7.559999999999883, 7.619999999999882, 7.69999999999988,
        7.879999999999876, 7.879999999999876, 7.879999999999876, 7.939999999999875, 7.949999999999875,
        7.979999999999874, 8.19999999999987, 8.439999999999864, 8.469999999999864, 8.589999999999861,
        8.809999999999857, 8.999999999999853,
    ],
    "type": "su",
}  # fmt: skip
PHI_3_ROPE = {
    "long_factor": [
        1.0299999713897705, 1.0499999523162842, 1.0499999523162842, 1.0799999237060547, 1.2299998998641968,
        1.2299998998641968, 1.2999999523162842, 1.4499999284744263, 1.5999999046325684, 1.6499998569488525,
        1.8999998569488525, 2.859999895095825, 3.68999981880188, 5.419999599456787, 5.489999771118164,
        5.489999771118164, 9.09000015258789, 11.579999923706055, 15.65999984741211, 15.769999504089355,
        15.789999961853027, 18.360000610351562, 21.989999771118164, 23.079999923706055, 30.009998321533203,
        32.35000228881836, 32.590003967285156, 35.56000518798828, 39.95000457763672, 53.840003967285156,
        56.20000457763672, 57.95000457763672, 59.29000473022461, 59.77000427246094, 59.920005798339844,
        61.190006256103516, 61.96000671386719, 62.50000762939453, 63.3700065612793, 63.48000717163086,
        63.48000717163086, 63.66000747680664, 63.850006103515625, 64.08000946044922, 64.760009765625,
        64.80001068115234, 64.81001281738281, 64.81001281738281,
    ],
    "short_factor": [
        1.05, 1.05, 1.05, 1.1, 1.1, 1.1, 1.2500000000000002, 1.2500000000000002, 1.4000000000000004,
        1.4500000000000004, 1.5500000000000005, 1.8500000000000008, 1.9000000000000008, 2.000000000000001,
        2.000000000000001, 2.000000000000001, 2.000000000000001, 2.000000000000001, 2.000000000000001,
        2.000000000000001, 2.000000000000001, 2.000000000000001, 2.000000000000001, 2.000000000000001,
        2.000000000000001, 2.000000000000001, 2.000000000000001, 2.000000000000001, 2.000000000000001,
        2.000000000000001, 2.000000000000001, 2.000000000000001, 2.1000000000000005, 2.1000000000000005, 2.2,
        2.3499999999999996, 2.3499999999999996, 2.3499999999999996, 2.3499999999999996, 2.3999999999999995,
        2.3999999999999995, 2.6499999999999986, 2.6999999999999984, 2.8999999999999977, 2.9499999999999975,
        3.049999999999997, 3.049999999999997, 3.049999999999997,
    ],
    "type": "su",
}  # fmt: skip


def _full_size(rope_scaling: dict[str, Any], sliding_window: int) -> dict[str, Any]:
    return {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": rope_scaling,
        "sliding_window": sliding_window,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 32000,
    }


# The same architecture at about a third of a thousandth of the size; fast on two cores.
TINY: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {
        "long_factor": [1.1 + 3.9 * i for i in range(16)],
        "short_factor": [1.05 + 0.13 * i for i in range(16)],
        "type": "su",
    },
    "sliding_window": 262144,
    "bos_token_id": 1,
    "clip_vision_config": {
        "hidden_size": 128,
        "image_size": 336,
        "patch_size": 14,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 64,
    },
}

PRESETS = ("tiny", "phi-3.5-vision", "phi-3-vision")
NUM_CROPS = {"tiny": 1, "phi-3.5-vision": 4, "phi-3-vision": 16}


def preset_config(preset: str, **overrides: Any) -> Phi3VConfig:
    """The configuration of a preset.

    Raises:
        UserError: there is no such preset.
    """
    if preset == "tiny":
        fields = TINY
    elif preset == "phi-3.5-vision":
        fields = _full_size(PHI_35_ROPE, 262144)
    elif preset == "phi-3-vision":
        fields = _full_size(PHI_3_ROPE, 131072)
    else:
        raise UserError(f"unknown preset {preset!r}", hint=f"choose one of {', '.join(PRESETS)}")
    return Phi3VConfig(
        **(fields | {"embd_layer": dict(HD_EMBEDDING), "architectures": ["Phi3VForCausalLM"]} | overrides)
    )


def init_model(
    preset: str,
    out: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
) -> int:
    """Write a model with random weights, its processor and tokenizer to ``out``.

    Weights are drawn in ``dtype`` (default: float32 for ``tiny``, bfloat16 for the real sizes) and written in shards,
    so the memory stays a little above the size of the model.

    Args:
        tokenizer: a folder with the real tokenizer; by default the built-in small one, for the real sizes with the
            chat tokens at their official ids.

    Returns:
        The number of parameters.

    Raises:
        UserError: unknown preset, ``out`` holds a model already, or ``tokenizer`` has no tokenizer.json.
    """
    if (out / "config.json").exists():
        raise UserError("there is a model already", where=str(out), hint="choose another --out, or remove it first")
    is_tiny = preset == "tiny"
    # Errors before anything is written.
    preset_config(preset)
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        raise UserError("no tokenizer.json here", where=str(tokenizer))
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, out / name)
        ids = {token: _token_id(out, token) for token in CHAT_TOKENS}
        size = max(ids.values()) + 1
    else:
        made = save_tiny_tokenizer(out, official_ids=not is_tiny)
        ids = {token: made.get_vocab()[token] for token in CHAT_TOKENS}
        size = max(made.get_vocab().values()) + 1
    overrides: dict[str, Any] = {}
    if is_tiny:
        # A multiple of 64 keeps the head's matrix friendly to every kernel.
        overrides = {
            "vocab_size": -(-size // 64) * 64,
            "eos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
        }
    config = preset_config(preset, **overrides)
    set_seed(seed)
    dtype = dtype or (torch.float32 if is_tiny else torch.bfloat16)
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


def _token_id(folder: Path, token: str) -> int:
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    for entry in added:
        if entry["content"] == token:
            return int(entry["id"])
    raise UserError(f"the tokenizer has no {token}", where=str(folder), hint="give the folder of Phi-3's tokenizer")
