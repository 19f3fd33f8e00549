"""Quantised models: what ``config.json`` says of them, which of their layers are quantised, and how they compute."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phi3v.errors import UserError
from phi3v.model.checkpoint import checkpoint_shapes
from phi3v.model.configuration import Phi3VConfig

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a model are stored.

    Attributes:
        name: of the format, as ``phi3v export`` calls it where it makes it.
        library: that reads it, as Python imports it.
        extra: of phi3v, which installs the library.
        part: matches the names of tensors that only quantised layers have; its group is the layer.
        needed: parts of a layer without which its weight cannot be had.
    """

    name: str
    library: str
    extra: str
    part: str
    needed: Sequence[str]

    def layers(self, names: Iterable[str]) -> set[str]:
        """The quantised layers, by the ``names`` of the stored tensors."""
        return {found[1] for name in names if (found := re.fullmatch(self.part, name))}

    def float_names(self, names: Iterable[str]) -> set[str]:
        """The names of the same tensors in a float model; a weight of which a part is missing is left out."""
        stored = set(names)
        layers = self.layers(stored)
        weights = {f"{layer}.weight" for layer in layers}
        whole = {f"{layer}.weight" for layer in layers if all(f"{layer}{part}" in stored for part in self.needed)}
        return whole | {name for name in stored - weights if not re.fullmatch(self.part, name)}

    def loaded_layers(self, model: nn.Module) -> set[str]:
        """The quantised layers of a loaded model, by their types and the types of their weights."""
        return {name for name, module in model.named_modules() if self._is_quantised(module)}

    def _is_quantised(self, module: nn.Module) -> bool:
        if self.library == "compressed_tensors":
            return getattr(module, "quantization_scheme", None) is not None
        weight = getattr(module, "weight", None)
        if self.library == "bitsandbytes":
            from bitsandbytes.nn import Linear4bit, Params4bit

            return isinstance(module, Linear4bit) or isinstance(weight, Params4bit)
        from torchao.utils import TorchAOBaseTensor

        return isinstance(weight, TorchAOBaseTensor)

    def require_library(self, where: str) -> None:
        """Raise a `UserError` if the library is not installed."""
        if importlib.util.find_spec(self.library) is None:
            what = f"is quantised ({self.name}), and {self.library}, which reads that, is not installed"
            raise UserError(what, where=where, hint=f'pip install "phi3v[{self.extra}]"')

    def settle(self, model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
        """Make a loaded model compute in ``dtype``.

        Depending on its version the library leaves some of what is not quantised in the stored dtype. Layers of
        bitsandbytes compute in the dtype that they were made with, and on some CPUs in bfloat16 whatever that is.

        Args:
            folder: it was loaded from, or a hub id.

        Raises:
            UserError: other layers are quantised than those that are stored so.
        """
        loaded = self.loaded_layers(model)
        stored = self.layers(checkpoint_shapes(folder)) if folder.is_dir() else loaded  # else it is on the hub
        if loaded != stored:
            raise UserError(
                f"quantization_config does not fit the weights: {len(stored)} layers are stored as {self.name} and "
                f"{len(loaded)} are loaded so, first {min(loaded ^ stored)}",
                where=str(folder / "config.json"),
                hint="copy the folder again, or export the model again",
            )
        for parameter in model.parameters():
            if type(parameter) is nn.Parameter and parameter.dtype in FLOATS:
                parameter.data = parameter.data.to(dtype)
        for name in loaded if self.library == "bitsandbytes" else ():
            layer: Any = model.get_submodule(name)
            layer.compute_dtype, layer.compute_type_is_set, layer.support_avx512bf16_for_cpu = dtype, True, False


def decoder_linears(model: nn.Module) -> set[str]:
    """The linear layers of the decoder's blocks, of a float or a quantised model: what our own exports quantise."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }


def quantisation_of(config: Phi3VConfig, where: str) -> Quantisation | None:
    """How the weights of a model with this configuration are quantised; ``None``: they are floats.

    Raises:
        UserError: in a way that is not known here.
    """
    fields = getattr(config, "quantization_config", None)
    if fields is None:
        return None
    fields = fields if isinstance(fields, dict) else {}
    match fields.get("quant_method"):
        case "bitsandbytes" if fields.get("load_in_4bit"):
            kind = f"{fields.get('bnb_4bit_quant_type')}"
            needed = [".weight", ".weight.absmax", ".weight.quant_map", f".weight.quant_state.bitsandbytes__{kind}"]
            return Quantisation(kind, "bitsandbytes", "qlora", r"(.+)\.weight\..+", needed)
        case "torchao" if "Int8WeightOnlyConfig" in str(fields.get("quant_type")):
            return Quantisation(
                "int8", "torchao", "torchao", r"(.+)\._weight_\w+", ["._weight_qdata", "._weight_scale"]
            )
        case "compressed-tensors" if fields.get("format") in ("float-quantized", "pack-quantized"):
            is_float = fields["format"] == "float-quantized"
            bits = 4 if "'num_bits': 4" in str(fields.get("config_groups")) else 8
            parts = [".weight", ".weight_scale"] if is_float else [".weight_packed", ".weight_scale", ".weight_shape"]
            name = "fp8" if is_float else f"w{bits}a16"
            return Quantisation(name, "compressed_tensors", "compressed", r"(.+)\.weight_\w+", parts)
    raise UserError(
        "its weights are quantised in a way that is not known here (quantization_config in config.json)",
        where=where,
        hint="give the float model; `phi3v export --format` quantises it",
    )
