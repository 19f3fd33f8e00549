"""The formats of an export: what each needs, what runs it, and how far it may be from the float model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from phi3v.errors import UserError

# Fields of `FormatOptions` that the command line sets, and their options.
OPTIONS = {
    "bits": "--bits",
    "group_size": "--group-size",
    "calibration": "--calibrate",
    "max_length": "--max-length",
}


@dataclass(frozen=True)
class FormatOptions:
    """How a format is made; what a format does not know is refused before it is made.

    Attributes:
        format: its name in `FORMATS`, as one maker may know several.
        bits: of the decoder's weights; by default the format's own.
        group_size: weights that share a scale; 0 for a scale per output channel; by default the format's own.
        calibration: a data file whose records the rounding is fitted to (GPTQ).
        max_length: tokens that a graph has rotary tables for.
    """

    format: str
    bits: int | None = None
    group_size: int | None = None
    calibration: Path | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class Format:
    """A format of an export.

    Attributes:
        about: one line for the help.
        maker: the module in this folder whose ``make(model, folder, options)`` writes it. If it also has a
            ``check(model, options)``, that raises a `UserError` for what cannot be made, before anything is read;
            ``model`` is then the base, and may be a hub id. And a ``longest_sample(model, options)``, where a format
            takes less than the model.
        extra: of phi3v, with what it needs to be made; ``None`` where phi3v alone suffices.
        modules: what that extra makes importable.
        runs_it: programs that load the folder.
        bits: of the decoder's weights.
        proven_bits: of integers that are about as exact, where the weights are not integers; the proof's bound is
            theirs.
        group_size: weights that share a scale; ``None`` for one per output channel.
        choices: fields of `FormatOptions` that it knows.
        is_graph: run by `phi3v.runtime`, not by the model itself.
    """

    about: str
    maker: str
    extra: str | None
    modules: tuple[str, ...]
    runs_it: str
    bits: int
    group_size: int | None = None
    choices: tuple[str, ...] = ()
    is_graph: bool = False
    proven_bits: int | None = None


FORMATS = {
    "fp8": Format(
        "8-bit floats, for vLLM",
        maker="compressed",
        extra="compressed",
        modules=("compressed_tensors",),
        runs_it="vLLM, transformers",
        bits=8,
        proven_bits=5,  # a sign, three stored bits of precision and one that is not
    ),
    "w8a16": Format(
        "8-bit integers, for vLLM",
        maker="compressed",
        extra="compressed",
        modules=("compressed_tensors",),
        runs_it="vLLM, transformers",
        bits=8,
        choices=("group_size",),
    ),
    "w4a16": Format(
        "4-bit integers, for vLLM; rounded to the nearest, or fitted to data with --calibrate (GPTQ)",
        maker="compressed",
        extra="compressed",
        modules=("compressed_tensors",),
        runs_it="vLLM, transformers",
        bits=4,
        group_size=64,
        choices=("group_size", "calibration"),
    ),
    "nf4": Format(
        "4-bit NormalFloat, for transformers with bitsandbytes",
        maker="libraries",
        extra="qlora",
        modules=("bitsandbytes",),
        runs_it="transformers",
        bits=4,
        group_size=64,
    ),
    "int8": Format(
        "8-bit integers, for transformers with torchao",
        maker="libraries",
        extra="torchao",
        modules=("torchao",),
        runs_it="transformers",
        bits=8,
    ),
    "openvino": Format(
        "graphs for OpenVINO on CPUs and Intel GPUs",
        maker="openvino",
        extra="openvino",
        modules=("openvino", "nncf"),
        runs_it="phi3v.runtime",
        bits=4,
        group_size=32,
        choices=("bits", "group_size"),
        is_graph=True,
    ),
    "onnx": Format(
        "graphs for ONNX Runtime",
        maker="onnx",
        extra="onnx",
        modules=("onnx", "onnxruntime"),
        runs_it="phi3v.runtime, onnxruntime-genai",
        bits=4,
        group_size=32,
        choices=("bits", "group_size", "max_length"),
        is_graph=True,
    ),
}


def require_extra(name: str) -> None:
    """Say which extra to install where what a format needs is missing, as a `UserError`."""
    missing = [module for module in FORMATS[name].modules if find_spec(module) is None]
    if missing:
        raise UserError(
            f"needs {missing[0].replace('_', '-')}, which is not installed",
            where=f"the format {name}",
            hint=f'pip install "phi3v[{FORMATS[name].extra}]"',
        )
