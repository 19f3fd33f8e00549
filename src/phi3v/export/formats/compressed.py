"""fp8, w8a16 and w4a16 in the layout of compressed-tensors, as vLLM and transformers read it.

The decoder's linear layers are rounded to the nearest, or for w4a16 fitted to data (`gptq`); everything else stays as
it is. One layer is in float32 at a time.

Shapes: ``O`` outputs and ``I`` inputs of a layer, ``G`` groups of its inputs that share a scale (1: all of them).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from phi3v.errors import UserError
from phi3v.export.formats import FORMATS, FormatOptions
from phi3v.export.formats.files import WeightFiles, add_to_config, copy_other_files
from phi3v.export.formats.gptq import fit_weights, read_calibration
from phi3v.model.checkpoint import EMBEDDING, SECOND_EMBEDDING, checkpoint_shapes, stored_tensors
from phi3v.train.methods.strategies import PART_TARGETS

# A layer's whole name, here and in vLLM, whose vision tower has layers that end alike.
LINEARS = rf"(language_model\.)?model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(PART_TARGETS['decoder'])})$"
IGNORED = ["lm_head", r"re:.*vision_embed_tokens\..*"]
# What vLLM has kernels for on every GPU, beside one scale for each output channel.
GROUP_SIZES = (32, 64, 128)


def check(model: str, options: FormatOptions) -> None:
    """Whether the format can be made of ``model``, a folder or a hub id.

    Raises:
        UserError: vLLM has no kernels for such groups, or the calibration data cannot be used.
    """
    if options.group_size and options.group_size not in GROUP_SIZES:
        raise UserError(
            "vLLM has no kernels for groups of this size",
            where=f"--group-size {options.group_size}",
            hint=f"choose {', '.join(map(str, GROUP_SIZES))}, or 0 for one scale for each output",
        )
    if options.calibration is not None:
        read_calibration(model, options.calibration)


def make(model: Path, folder: Path, options: FormatOptions) -> None:
    """Write the model of the folder ``model`` to the empty ``folder``; what `check` and the caller allow."""
    group_size = FORMATS[options.format].group_size if options.group_size is None else options.group_size
    layer = Layer(options.format, group_size or None)
    files = WeightFiles(folder)
    linears = [name for name in checkpoint_shapes(model) if is_quantised(name)]
    for name, tensor in _other_tensors(model, linears):
        files.add(name, tensor)
    rounded: Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]
    if options.calibration is None:
        rounded = ((name, weight, None) for _, name, weight in stored_tensors(model, linears))
    else:
        rounded = fit_weights(model, read_calibration(str(model), options.calibration), linears, layer)
    for name, weight, scales in rounded:
        for part, tensor in layer.compress(weight, scales).items():
            files.add(f"{name.removesuffix('weight')}{part}", tensor)
    files.close()
    copy_other_files(model, folder)
    add_to_config(folder, {"quantization_config": layer.config()})


def is_quantised(name: str) -> bool:
    """Whether a tensor of the official layout is a weight that these formats quantise."""
    layer, _, parameter = name.rpartition(".")
    return parameter == "weight" and re.match(LINEARS, layer) is not None


def _other_tensors(model: Path, linears: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """All that stays as it is, the embeddings under their first name."""
    names = set(checkpoint_shapes(model)) - set(linears)
    if EMBEDDING in names:
        names.discard(SECOND_EMBEDDING)
    for _, name, tensor in stored_tensors(model, names):
        yield EMBEDDING if name == SECOND_EMBEDDING else name, tensor


class Layer:
    """How a layer's weight is stored: symmetrically, without zero points.

    Args:
        name: ``fp8`` (8-bit floats, and inputs that are rounded token by token), ``w8a16`` or ``w4a16`` (integers).
        group_size: inputs that share a scale; ``None`` for all.
    """

    def __init__(self, name: str, group_size: int | None) -> None:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        self.bits, self.group_size = FORMATS[name].bits, group_size
        is_float = name == "fp8"
        self.layout = "float-quantized" if is_float else "pack-quantized"
        weights = {"num_bits": self.bits, "type": "float" if is_float else "int", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
        inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
        self._group = {
            "targets": [f"re:{LINEARS}"],
            "weights": weights,
            "input_activations": inputs if is_float else None,
        }
        self._scheme = QuantizationScheme.model_validate(self._group)
        self._compressor = BaseCompressor.get_value_from_registry(self.layout)

    def config(self) -> dict[str, Any]:
        """``quantization_config`` of the model's configuration."""
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": self.layout,
            "config_groups": {"group_0": self._group},
            "ignore": IGNORED,
        }

    def scales(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(O, G) of a ``weight`` (O, I), in the model's own dtype: it is loaded in that."""
        from compressed_tensors.quantization.utils import calculate_qparams

        groups = weight.float().unflatten(1, (-1, self.group_size or weight.shape[1]))  # [O, G, group size]
        scales, _ = calculate_qparams(*groups.aminmax(dim=2), self._scheme.weights)
        return scales.to(dtype).clamp(min=torch.finfo(dtype).smallest_normal)

    def compress(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The tensors that stand for ``weight`` (O, I), by their names in the layer.

        Args:
            scales: as of `scales`, which gives them by default.
        """
        scales = self.scales(weight, weight.dtype) if scales is None else scales
        # Half precision would round the quotient before it is rounded.
        state = {"weight": weight.float(), "weight_scale": scales.float()}
        return self._compressor.compress(state, self._scheme) | {"weight_scale": scales}
