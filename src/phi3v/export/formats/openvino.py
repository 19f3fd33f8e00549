"""OpenVINO graphs of a model: vision tower, projection, text embeddings, and the decoder with its cache as a state.

They are traced from the model's own modules, in the form and under the names that OpenVINO's tools give such models.
Weights stay where they are, in 16 bits and memory-mapped, until they are compressed one by one: the full-size model
never exists in float32.

Shapes: ``B`` rows, ``S`` new tokens, ``T`` tokens with those before, ``h`` heads, ``D`` head size, ``n`` crops.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from phi3v.errors import UserError
from phi3v.export.formats import FORMATS, FormatOptions
from phi3v.export.formats.files import add_to_config, copy_other_files
from phi3v.model.checkpoint import EMBEDDING, embedding_key_mapping, stored_tensors
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.processing.hd_transform import CROP_SIZE
from phi3v.runtime.openvino import DECODER, EMBEDDINGS, PROJECTION, TOWER, import_openvino, without_telemetry


class _Tower(nn.Module):
    """Features (n, 576, V) of normalised crops (n, 3, 336, 336)."""

    def __init__(self, model: Phi3VForCausalLM) -> None:
        super().__init__()
        self.vision = model.model.vision_embed_tokens.img_processor.vision_model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        embeddings = self.vision.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        first = embeddings.class_embedding.expand(pixel_values.shape[0], 1, -1)
        hidden = torch.cat([first, patches], dim=1) + embeddings.position_embedding.weight
        hidden = self.vision.pre_layrnorm(hidden)
        for layer in self.vision.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return hidden[:, 1:]


class _Decoder(nn.Module):
    """The logits (B, 1, V) of the last token, and each layer's keys and values."""

    def __init__(self, model: Phi3VForCausalLM) -> None:
        super().__init__()
        self.decoder, self.head = model.model, model.lm_head

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            inputs_embeds: (B, S, H).
            attention_mask: (B, T).
            position_ids: (B, S); the last one tells whether a row is longer than LongRoPE's short factors reach.
            past: keys and values of each layer in turn, each (B, h, T - S, D).
        """
        new, total = inputs_embeds.shape[1], attention_mask.shape[1]
        places = torch.arange(total)
        causal = places[None, :] <= places[total - new :, None]  # [S, T]
        mask = causal[None, None] & (attention_mask[:, None, None, :] != 0)  # [B, 1, S, T]
        rotary = self.decoder.rotary_emb(inputs_embeds, position_ids)
        hidden, present = inputs_embeds, []
        for index, layer in enumerate(self.decoder.layers):
            attended, *cache = _attend(
                layer.self_attn, layer.input_layernorm(hidden), rotary, mask, past[2 * index : 2 * index + 2]
            )
            present += cache
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.head(self.decoder.norm(hidden[:, -1:])), *present


def _attend(
    attention: Any,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    past: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the library's attention layer, with the cache as tensors: output (B, S, H), keys, values."""
    size, groups = attention.head_dim, attention.num_key_value_groups
    heads = attention.num_key_value_heads
    qkv = attention.qkv_proj(hidden).unflatten(-1, (heads * (groups + 2), size)).transpose(1, 2)
    query, key, value = qkv.split([heads * groups, heads, heads], dim=1)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
    all_keys, all_values = key, value
    if groups > 1:
        all_keys, all_values = (kept[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for kept in (key, value))
    output = functional.scaled_dot_product_attention(
        query, all_keys, all_values, attn_mask=mask, scale=attention.scaling
    )
    return attention.o_proj(output.transpose(1, 2).flatten(2)), key, value


def check(model: str | Path, options: FormatOptions) -> None:
    """Raise a `UserError` for options that do not go together."""
    if options.bits == 8 and options.group_size:
        raise UserError("weights of 8 bits have a scale per output channel", where="--group-size", hint="leave it out")


def make(model: Path, folder: Path, options: FormatOptions) -> None:
    """Write the graphs of a whole float model, and what is needed beside them; what `check` and the caller allow.

    Args:
        model: a folder in the official layout.
        folder: an empty one.
        options: ``bits`` (4 or 8) and ``group_size`` of the decoder's linears.
    """
    known = FORMATS["openvino"]
    bits = options.bits or known.bits
    write(model, folder, bits, known.group_size if options.group_size is None else options.group_size)


def write(model: Path, folder: Path, bits: int | None, group_size: int | None = None) -> None:
    """As `make`; without ``bits`` the weights stay as they are."""
    ov = import_openvino()
    mapped = load_mapped(model)
    for name, graph in graphs(mapped):
        if bits is not None:
            graph = compress(graph, bits if name == DECODER else 8, group_size)
        ov.save_model(graph, folder / name, compress_to_fp16=False)
    copy_other_files(model, folder)
    vision = mapped.model.vision_embed_tokens
    add_to_config(folder, {name: getattr(vision, name).tolist() for name in ("sub_GN", "glb_GN")})


def compress(graph: Any, bits: int, group_size: int | None) -> Any:
    """A graph with its weights rounded to integers; those of the head have 8 bits at least."""
    with without_telemetry():
        import nncf

    settings: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    if bits == 4:
        settings = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "ratio": 1.0, "group_size": group_size or -1}
    logging.getLogger("nncf").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):  # it draws bars there
        return nncf.compress_weights(graph, **settings)


def load_mapped(folder: Path) -> Phi3VForCausalLM:
    """The model with the weights of its files mapped into memory, in the dtype that they have."""
    config = Phi3VConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = Phi3VForCausalLM(config).eval()
    renamed = embedding_key_mapping(folder) or {}
    wanted = model.state_dict().keys()
    weights = {}
    for _, name, tensor in stored_tensors(folder):
        weights[EMBEDDING if renamed and name not in wanted else name] = tensor
    model.load_state_dict({name: weights[name] for name in wanted if name in weights}, assign=True, strict=False)
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    return model.requires_grad_(False)


def graphs(model: Phi3VForCausalLM) -> Iterator[tuple[str, Any]]:
    """The file name and the graph of each part, with the weights as they are."""
    config = model.config
    vision = model.model.vision_embed_tokens
    ids, merged = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, vision.glb_GN.shape[-1])
    crops = torch.zeros(1, 3, CROP_SIZE, CROP_SIZE)
    yield EMBEDDINGS, _convert(model.model.embed_tokens, {"input": ids}, "inputs_embeds")
    yield PROJECTION, _convert(vision.img_projection, {"input": merged}, "last_hidden_state")
    yield TOWER, _convert(_Tower(model), {"pixel_values": crops}, "last_hidden_state")
    size = config.hidden_size // config.num_attention_heads
    past = torch.zeros(1, config.num_key_value_heads, 2, size)
    example = {
        "inputs_embeds": torch.zeros(1, 3, config.hidden_size),
        "attention_mask": torch.ones(1, 5, dtype=torch.int64),
        "position_ids": torch.arange(2, 5)[None],
        "past": [past] * (2 * config.num_hidden_layers),
    }
    decoder = _convert(_Decoder(model), example, "logits")
    _make_stateful(decoder, past.shape[1], size)
    yield DECODER, decoder


def _convert(module: nn.Module, example: dict[str, Any], output: str) -> Any:
    ov = import_openvino()
    from openvino.frontend.pytorch import ModuleExtension

    # Each linear becomes one operation on its weights as they are; none of them is read while the module is traced.
    linear = ModuleExtension(
        nn.Linear,
        "ov_ext::linear",
        evaluate=lambda module, x, *rest: x.new_zeros(*x.shape[:-1], module.out_features),
        convert=lambda module, operation, x: operation(x, module.weight, module.bias),
    )
    embedding = ModuleExtension(
        nn.Embedding,
        "ov_ext::embedding",
        evaluate=lambda module, weight, ids, *rest: torch.zeros(*ids.shape, module.embedding_dim),
        convert=lambda module, operation, ids: operation(module.weight, ids, module.padding_idx, False, False),
    )
    with torch.no_grad(), without_telemetry(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: that shapes which are none here would be constants
        graph = ov.convert_model(module, example_input=example, extension=[linear, embedding])
    graph.outputs[0].get_tensor().set_names({output})
    for port, name in zip(graph.inputs, example, strict=False):
        port.get_tensor().set_names({name})
    return graph


def _make_stateful(graph: Any, heads: int, size: int) -> None:
    """Turn the inputs and outputs of keys and values, each (B, h, T, D), into states, at first empty.

    A further input, ``beam_idx`` (B,), says which row of the states each row goes on from.
    """
    from openvino import PartialShape, Type, op
    from openvino import opset13 as ops
    from openvino.op.util import Variable, VariableInfo

    embeddings, _, _, *past = graph.get_parameters()
    _, *present = graph.get_results()
    beams = ops.parameter([-1], np.int32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beams])
    rows = ops.gather(ops.shape_of(embeddings, Type.i64), ops.constant([0], Type.i64), ops.constant(0, Type.i64))
    shape = ops.concat([rows, ops.constant([heads, 0, size], Type.i64)], 0)
    empty = ops.broadcast(ops.constant(0, Type.f32), shape)
    zero = ops.constant(0, Type.i64)
    for index, (parameter, result) in enumerate(zip(past, present, strict=True)):
        info = VariableInfo()
        info.variable_id = f"past_key_values.{index // 2}.{'value' if index % 2 else 'key'}"
        info.data_type, info.data_shape = Type.f32, PartialShape([-1, heads, -1, size])
        variable = Variable(info)
        kept = ops.gather(op.read_value(empty, variable), beams, zero)
        for consumer in parameter.output(0).get_target_inputs():
            consumer.replace_source_output(kept.output(0))
        graph.add_variables([variable])
        graph.add_sinks([op.assign(result.input_value(0).get_node(), variable)])
        graph.remove_parameter(parameter)
        graph.remove_result(result)
    graph.validate_nodes_and_infer_types()
