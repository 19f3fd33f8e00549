"""``onnx``: graphs for ONNX Runtime, alone (`phi3v.runtime`) or under onnxruntime-genai.

Three graphs, as onnxruntime-genai's model type ``phi3v`` has them: ``vision.onnx`` (crops of all images to their
features), ``embeddings.onnx`` (ids and features to embeddings), ``decoder.onnx`` (embeddings and a cache to logits).
The decoder's linear layers have 4- or 8-bit weights. The others are stored in the dtype of the checkpoint, and
all else computes in float32.

The graphs are written here, not exported or built: onnxruntime-genai's own builder of the decoder holds the whole model
in float32, and knows neither the vision part nor a way to shorten the rotary tables of 131,072 positions.

Shapes: ``B`` rows, ``S`` new tokens, ``P`` earlier ones, ``H`` hidden, ``V`` width of the tower, ``N`` images, ``C``
crops of an image (global crop not counted).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch.nn import functional

from phi3v.errors import UserError
from phi3v.export.divergence import longest_prompt
from phi3v.export.formats import FORMATS, FormatOptions
from phi3v.export.formats.files import copy_other_files
from phi3v.export.formats.onnx_graph import GraphWriter, Operand, Value
from phi3v.model.attention import Phi3VRotaryEmbedding
from phi3v.model.checkpoint import EMBEDDING, SECOND_EMBEDDING
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.vision import PATCHES, TOKENS
from phi3v.processing.conversation import stop_token_ids
from phi3v.processing.hd_transform import CROP_SIZE, TOKENS_PER_CROP
from phi3v.processing.tokenizer import TOKENIZER_FILE
from phi3v.runtime.onnx import CONFIG, DECODER, EMBEDDINGS, VISION

DEFAULT_MAX_LENGTH = 8192
BITS = (4, 8)
BLOCKS = (16, 32, 64, 128, 256)  # the sizes that MatMulNBits has kernels for
ACTIVATIONS = {"quick_gelu": "QuickGelu", "gelu": "Gelu"}

Tensors = Callable[[str], torch.Tensor]


def check(model: str | Path, options: FormatOptions) -> None:
    """Whether ``model`` can be written so.

    Raises:
        UserError: it cannot.
    """
    config = Phi3VConfig.from_pretrained(model)
    bits, block, max_length = _choices(config, options)
    if bits not in BITS:
        raise UserError(f"{bits}: the graphs' kernels know weights of 4 and of 8 bits", where="--bits")
    widths = (config.hidden_size, config.intermediate_size)
    if block not in BLOCKS or any(width % block for width in widths):
        fitting = [str(size) for size in BLOCKS if not any(width % size for width in widths)]
        raise UserError(
            f"{block}: the graphs' kernels know groups of {', '.join(map(str, BLOCKS))}, and they must divide the "
            f"{' and the '.join(map(str, widths))} inputs of a layer",
            where="--group-size",
            hint=f"choose {' or '.join(fitting)}" if fitting else "this model cannot be written in this format",
        )
    least = min(longest_prompt(config.long_context_start), config.max_position_embeddings)
    if not least <= max_length <= config.max_position_embeddings:
        raise UserError(
            f"{max_length}: the model takes {config.max_position_embeddings:,} tokens, and the proof has prompts of "
            f"{least:,}",
            where="--max-length",
            hint="choose a number in between",
        )
    if config.hidden_act != "silu" or config.vision_config().hidden_act not in ACTIVATIONS:
        raise UserError("has other activations than Phi-3-vision", where=f"{model}: config.json")
    if config.sliding_window is not None and config.sliding_window < max_length:
        what = f"has a sliding window of {config.sliding_window} tokens, which these graphs have not"
        raise UserError(what, where=f"{model}: config.json", hint="choose a --max-length within it")


def _choices(config: Phi3VConfig, options: FormatOptions) -> tuple[int, int, int]:
    """Bits, block size and length."""
    format_ = FORMATS["onnx"]
    block = format_.group_size or 0 if options.group_size is None else options.group_size
    max_length = min(DEFAULT_MAX_LENGTH, config.max_position_embeddings)
    return options.bits or format_.bits, block, max_length if options.max_length is None else options.max_length


def longest_sample(model: Path, options: FormatOptions) -> int:
    """Tokens that the graphs take."""
    return _choices(Phi3VConfig.from_pretrained(model), options)[2]


def make(model: Path, folder: Path, options: FormatOptions) -> None:
    """Write the graphs of a whole float model, and what is needed beside them.

    Args:
        model: a folder in the official layout.
        folder: an empty one.
    """
    check(model, options)
    config = Phi3VConfig.from_pretrained(model)
    bits, block, max_length = _choices(config, options)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(model.glob("*.safetensors"))]
        stored = {name: (file, name) for file in files for name in file.keys()}  # noqa: SIM118 - no dictionary
        if EMBEDDING not in stored:
            stored[EMBEDDING] = stored[SECOND_EMBEDDING]

        def tensors(name: str) -> torch.Tensor:
            file, stored_name = stored[name]
            tensor: torch.Tensor = file.get_tensor(stored_name)
            return tensor

        write_vision(folder / VISION, tensors, config)
        write_embeddings(folder / EMBEDDINGS, tensors, config)
        write_decoder(folder / DECODER, tensors, config, bits, block, max_length)
    copy_other_files(model, folder)
    stops = stop_token_ids(Tokenizer.from_file(str(model / TOKENIZER_FILE)))
    text = json.dumps(genai_config(config, stops, max_length), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def genai_config(config: Phi3VConfig, stops: list[int], max_length: int) -> dict[str, Any]:
    """What onnxruntime-genai has to know of the graphs.

    Its own image processor is left out, so that asking for it is an error: it cuts every page into up to 16 crops and
    leaves out the BOS before the text after an image, neither of which the model was trained with.
    """

    def same(*names: str) -> dict[str, str]:
        return {name: name for name in names}

    cache = [
        {f"{time}_{part}_names": f"{prefix}.%d.{part}" for part in ("key", "value")}
        for time, prefix in (("past", "past_key_values"), ("present", "present"))
    ]
    return {
        "model": {
            "type": "phi3v",
            "bos_token_id": config.bos_token_id,
            "eos_token_id": stops,
            "pad_token_id": stops[-1],
            "vocab_size": config.vocab_size,
            "context_length": max_length,
            "vision": {
                "filename": VISION,
                "inputs": same("pixel_values", "image_sizes"),
                "outputs": same("image_features"),
            },
            "embedding": {
                "filename": EMBEDDINGS,
                "inputs": same("input_ids", "image_features"),
                "outputs": same("inputs_embeds"),
            },
            "decoder": {
                "filename": DECODER,
                "head_size": config.hidden_size // config.num_attention_heads,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
                "inputs": same("inputs_embeds", "attention_mask") | cache[0],
                "outputs": same("logits") | cache[1],
            },
        },
        "search": {"max_length": max_length, "do_sample": False, "past_present_share_buffer": True},
    }


def quantise_blocks(weight: torch.Tensor, bits: int, block: int) -> dict[str, torch.Tensor]:
    """Weights rounded to the nearest of ``2 ** bits`` steps between each block's least and greatest, 0 among them.

    Args:
        weight: (out, in); ``in`` is a multiple of ``block``.

    Returns:
        The inputs of the operator MatMulNBits: values uint8 (out, blocks, block * bits / 8), scales float32
        (out, blocks), zero points uint8 (out, bytes). Of two 4-bit numbers in a byte, the first is the lower half.
    """
    top = 2**bits - 1
    blocks = weight.float().unflatten(1, (-1, block))  # [out, blocks, block]
    low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
    scales = (high - low) / top
    scales = torch.where(scales > 0, scales, 1.0)  # of zeros alone
    zero_points = (-low / scales).round()
    values = (blocks / scales[..., None] + zero_points[..., None]).round().clamp(0, top)
    return {"values": _packed(values, bits), "scales": scales, "zero_points": _packed(zero_points, bits)}


def _packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    numbers = numbers.to(torch.uint8)
    if bits == 8:
        return numbers
    if numbers.shape[-1] % 2:
        numbers = functional.pad(numbers, (0, 1))
    return numbers[..., 0::2] | numbers[..., 1::2] << 4


def write_decoder(
    path: Path, tensors: Tensors, config: Phi3VConfig, bits: int | None, block: int, max_length: int
) -> None:
    """``inputs_embeds`` (B, S, H), ``attention_mask`` (B, P + S) and a cache to logits (B, 1, vocabulary) of the last.

    As in our model, a sample of more than 4,096 tokens has LongRoPE's long factors. ``P + S`` tells, so at the switch
    the whole sample is to be run again: its cache was made with the short ones.

    Args:
        bits: of the linear layers' weights; ``None`` leaves them as they are.
    """
    graph = GraphWriter(path)
    head_size = config.hidden_size // config.num_attention_heads

    def linear(name: str, value: Value) -> Value:
        weight = tensors(f"{name}.weight")  # [out, in]
        if bits is None:
            return graph.node("MatMul", value, graph.weight(f"{name}.weight", weight.T))
        parts = quantise_blocks(weight, bits, block).items()
        return graph.node(
            "MatMulNBits",
            *(value, *(graph.tensor(f"{name}.{part}", tensor) for part, tensor in parts)),
            N=weight.shape[0],
            K=weight.shape[1],
            bits=bits,
            block_size=block,
            accuracy_level=4,  # kernels may round activations to 8 bits; those for 8-bit weights crawl if they may not
        )

    def add_and_norm(name: str, hidden: Value, added: Value) -> tuple[Value, Value]:
        """The sum, normalised, and the sum."""
        scale, total = graph.weight(f"{name}.weight", tensors(f"{name}.weight")), f"{name}.sum"
        normed = graph.node(
            "SkipSimplifiedLayerNormalization",
            *(hidden, added, scale),
            outputs=["", "", "", total],
            epsilon=config.rms_norm_eps,
        )
        return normed, Value(graph, total)

    hidden, mask = Value(graph, "inputs_embeds"), Value(graph, "attention_mask")
    total = graph.node("Shape", mask, start=1)  # [1], P + S
    last = graph.node("ReduceSum", mask, [1], keepdims=0) - 1
    lengths = [value.to(torch.int32) for value in (last, graph.node("Squeeze", total))]
    tables = _rotary_tables(graph, config, total, max_length)
    first = "model.layers.0.input_layernorm.weight"
    normed = graph.node(
        "SimplifiedLayerNormalization", hidden, graph.weight(first, tensors(first)), epsilon=config.rms_norm_eps
    )
    pasts: list[str] = []
    presents: list[str] = []
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        pasts += [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        presents += [f"present.{index}.{part}" for part in ("key", "value")]
        packed = linear(f"{layer}.self_attn.qkv_proj", normed)
        given: list[Operand] = [packed, "", "", *pasts[-2:], *lengths, *tables]
        attended = graph.node(
            "GroupQueryAttention",
            *given,
            outputs=["", *presents[-2:]],
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=head_size**-0.5,
            do_rotary=1,
        )
        added = linear(f"{layer}.self_attn.o_proj", attended)
        normed, hidden = add_and_norm(f"{layer}.post_attention_layernorm", hidden, added)
        gate = graph.node(
            "Split",
            linear(f"{layer}.mlp.gate_up_proj", normed),
            outputs=[f"{layer}.gate", f"{layer}.up"],
            axis=-1,
            num_outputs=2,
        )
        gated = gate * graph.node("Sigmoid", gate) * Value(graph, f"{layer}.up")
        added = linear(f"{layer}.mlp.down_proj", gated)
        is_last = index + 1 == config.num_hidden_layers
        following = "model.norm" if is_last else f"model.layers.{index + 1}.input_layernorm"
        normed, hidden = add_and_norm(following, hidden, added)
    head = graph.weight("lm_head.weight", tensors("lm_head.weight").T)
    graph.node("MatMul", normed.take([-1], axis=1), head, outputs=["logits"])
    embeds, cache = ["rows", "tokens", config.hidden_size], ["rows", config.num_key_value_heads, "past", head_size]
    inputs: dict[str, Any] = {
        "inputs_embeds": (torch.float32, embeds),
        "attention_mask": (torch.int64, ["rows", "total"]),
    }
    outputs: dict[str, Any] = {"logits": (torch.float32, ["rows", 1, config.vocab_size])}
    graph.save(
        inputs | dict.fromkeys(pasts, (torch.float32, cache)),
        outputs | {name: (torch.float32, [*cache[:2], "total", head_size]) for name in presents},
    )


def _rotary_tables(graph: GraphWriter, config: Phi3VConfig, total: Value, max_length: int) -> list[Value]:
    """Cosines and sines of the positions below ``total``: rows of the short factors, or of the long ones after them."""
    rotary = Phi3VRotaryEmbedding(config)
    switch = min(config.long_context_start, max_length)
    rows = torch.cat([torch.arange(switch), torch.arange(max_length if max_length > switch else 0)])
    is_long = torch.arange(len(rows)) >= switch
    begin = (total > [switch]).to(torch.int64) * [switch]
    return [
        graph.node("Slice", graph.tensor(name, table[0, :, : table.shape[2] // 2]), begin, begin + total, [0])
        for name, table in zip(
            ("cosines", "sines"), rotary(torch.empty(0), rows[None], is_long[None]), strict=True
        )  # both halves of a row are the same
    ]


def write_embeddings(path: Path, tensors: Tensors, config: Phi3VConfig) -> None:
    """``input_ids`` (B, S), image k as a run of -k, and ``image_features`` (tokens, H) to ``inputs_embeds`` (B, S, H).

    The features take the places of the negative ids in order. Without any, they are (0, H).
    """
    graph = GraphWriter(path)
    ids = Value(graph, "input_ids")
    weight = graph.tensor("model.embed_tokens.weight", tensors("model.embed_tokens.weight"))
    words = weight.take(graph.node("Max", ids, 0)).to(torch.float32)
    is_image = ids < 0
    place = graph.node("CumSum", is_image.to(torch.int64).reshape(-1), 0) - 1
    blank = graph.node("ConstantOfShape", [1, config.hidden_size])  # so that there is something to take from
    features = graph.node("Concat", "image_features", blank, axis=0)
    images = features.take(graph.node("Reshape", graph.node("Max", place, 0), graph.node("Shape", ids)))
    graph.node("Where", graph.node("Unsqueeze", is_image, [-1]), images, words, outputs=["inputs_embeds"])
    graph.save(
        {
            "input_ids": (torch.int64, ["rows", "tokens"]),
            "image_features": (torch.float32, ["image_tokens", config.hidden_size]),
        },
        {"inputs_embeds": (torch.float32, ["rows", "tokens", config.hidden_size])},
    )


def write_vision(path: Path, tensors: Tensors, config: Phi3VConfig) -> None:
    """``pixel_values`` (N, C + 1, 3, 336, 336) and ``image_sizes`` (N, 2) to the features (tokens of all images, H).

    Without a loop over images: each place of the sequence is computed from its number, that is, which token of which
    crop stands there, or which separator. So one call takes any number of images of any sizes.
    """
    graph = GraphWriter(path)
    prefix = "model.vision_embed_tokens."

    def weight(name: str) -> Value:
        return graph.weight(name, tensors(prefix + name))

    def dense(name: str, value: Value) -> Value:
        matrix = graph.weight(f"{name}.weight", tensors(f"{prefix}{name}.weight").T)
        return graph.node("MatMul", value, matrix) + weight(f"{name}.bias")

    pixels, sizes = Value(graph, "pixel_values"), Value(graph, "image_sizes")
    rows, columns = ((sizes.take(side, axis=1)) // CROP_SIZE for side in (0, 1))  # [N]
    # A page of one crop that is its own global view goes through the tower once.
    differs = graph.node("Not", pixels.take(0, axis=1).equals(pixels.take(1, axis=1))).to(torch.int32)
    differs = graph.node("ReduceMax", differs.reshape(0, -1), [1], keepdims=0).to(torch.int64)  # [N]
    extra = graph.node("Max", differs, ((rows * columns) > 1).to(torch.int64))  # 0 where it is, else 1
    seen = rows * columns * extra + 1
    number = graph.node("Range", 0, graph.node("Squeeze", graph.node("Shape", pixels, start=1, end=2)), 1)
    is_real = (number < graph.node("Unsqueeze", seen, [1])).reshape(-1)
    crops = graph.node("Compress", pixels.reshape(-1, 3, CROP_SIZE, CROP_SIZE), is_real, axis=0)
    merged = _tower(graph, weight, dense, crops, config)  # [n * 144, 4V]

    page = rows * TOKENS * (columns * TOKENS + 1)  # [N], tokens of the page alone
    ends = graph.node("CumSum", page + (1 + TOKENS * (TOKENS + 1)), 0)
    place = graph.node("Range", 0, graph.node("Squeeze", ends.take([-1])), 1)  # [tokens]
    is_after = graph.node("Not", graph.node("Unsqueeze", place, [1]) < ends).to(torch.int64)
    image = graph.node("ReduceSum", is_after, [1], keepdims=0)  # of each place
    begin = graph.node("Concat", [0], ends, axis=0).take(image)
    first_crop = (graph.node("CumSum", seen, 0) - seen).take(image)
    in_page = place - begin
    in_view = in_page - page.take(image) - 1  # -1 at the separator
    is_page = in_view < -1
    offset = graph.node("Where", is_page, in_page, graph.node("Max", in_view, 0))
    columns = columns.take(image)
    line = graph.node("Where", is_page, columns * TOKENS, TOKENS) + 1
    row, column = offset // line, offset % line
    crop = (row // TOKENS) * columns + column // TOKENS + extra.take(image)
    crop = first_crop + graph.node("Where", is_page, crop, 0)
    source = crop * TOKENS_PER_CROP + (row % TOKENS) * TOKENS + column % TOKENS
    separators = graph.node("Shape", merged, end=1)  # where they stand: after the crops' tokens
    source = graph.node("Where", column.equals(line - 1), separators, source)
    source = graph.node("Where", in_view.equals(-1), separators + 1, source)
    ends_of_rows, between = (weight(name).reshape(1, -1) for name in ("sub_GN", "glb_GN"))
    tokens = graph.node("Concat", merged, ends_of_rows, between, axis=0).take(source)
    projected = dense("img_projection.2", graph.node("Gelu", dense("img_projection.0", tokens)))
    graph.node("Identity", projected, outputs=["image_features"])
    graph.save(
        {
            "pixel_values": (torch.float32, ["images", "crops", 3, CROP_SIZE, CROP_SIZE]),
            "image_sizes": (torch.int64, ["images", 2]),
        },
        {"image_features": (torch.float32, ["image_tokens", config.hidden_size])},
    )


def _tower(
    graph: GraphWriter,
    weight: Callable[[str], Value],
    dense: Callable[[str, Value], Value],
    crops: Value,
    config: Phi3VConfig,
) -> Value:
    """`ClipVisionModel` and `merge_patches`: crops (n, 3, 336, 336) to tokens (n * 144, 4V)."""
    clip = config.vision_config()
    width, tower = clip.hidden_size, "img_processor.vision_model"

    def norm(name: str, value: Value) -> Value:
        parameters = (weight(f"{name}.{part}") for part in ("weight", "bias"))
        return graph.node("LayerNormalization", value, *parameters, epsilon=clip.layer_norm_eps)

    kernel = weight(f"{tower}.embeddings.patch_embedding.weight")
    patches = graph.node("Conv", crops, kernel, strides=[clip.patch_size] * 2).reshape(0, width, -1)
    patches = graph.node("Transpose", patches, perm=[0, 2, 1])  # [n, 576, V]
    shape = graph.node("Concat", graph.node("Shape", crops, end=1), [1, width], axis=0)
    first = graph.node("Expand", weight(f"{tower}.embeddings.class_embedding"), shape)
    hidden = graph.node("Concat", first, patches, axis=1)
    hidden = norm(f"{tower}.pre_layrnorm", hidden + weight(f"{tower}.embeddings.position_embedding.weight"))
    for index in range(clip.num_hidden_layers - 1):  # the last is never run
        layer = f"{tower}.encoder.layers.{index}"
        normed = norm(f"{layer}.layer_norm1", hidden)
        parts = (dense(f"{layer}.self_attn.{part}_proj", normed) for part in "qkv")
        attended = graph.node("MultiHeadAttention", *parts, num_heads=clip.num_attention_heads)
        hidden += dense(f"{layer}.self_attn.out_proj", attended)
        inner = dense(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", hidden))
        hidden += dense(f"{layer}.mlp.fc2", graph.node(ACTIVATIONS[clip.hidden_act], inner))
    features = graph.node("Slice", hidden, [1], [1 + PATCHES**2], [1])  # without the class token
    merged = features.reshape(-1, TOKENS, 2, TOKENS, 2, width)
    return graph.node("Transpose", merged, perm=[0, 1, 3, 2, 4, 5]).reshape(-1, 4 * width)
