"""Getting the model: what can be known of it before it is loaded, then the loading itself."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from phi3v.config import Attention, LoraConfig, MethodConfig, RunConfig
from phi3v.errors import UserError
from phi3v.json_files import content_of, read_json
from phi3v.machine import Accelerator
from phi3v.model.attention import HALF
from phi3v.model.checkpoint import EMBEDDING, SECOND_EMBEDDING, checkpoint_shapes
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.quantised import Quantisation, quantisation_of
from phi3v.paths import find_model
from phi3v.processing.processor import Phi3VProcessor
from phi3v.runtime import graph_kind
from phi3v.runtime.onnx import CONFIG
from phi3v.train.device import RuntimeDevice
from phi3v.train.methods.optimizers import keeps_bf16_weights
from phi3v.train.methods.strategies import PART_MODULES, VISION, apply_method


@dataclass(frozen=True)
class ModelFacts:
    """What a run needs to know of its model before it loads it."""

    skeleton: Phi3VForCausalLM  # without weights
    stored_dtype: torch.dtype  # of the checkpoint; what is saved has it again
    attention: str
    attention_reason: str
    context: int  # tokens of a record that it reads at most
    quantisation: Quantisation | None = None  # of the stored weights

    def with_attention(self, attention: str) -> ModelFacts:
        """With what the self-check leaves."""
        if attention == self.attention:
            return self
        return replace(self, attention=attention, attention_reason=f"{self.attention} failed the self-check")


def inspect_model(config: RunConfig, runtime: RuntimeDevice) -> ModelFacts:
    """Look at a model without loading a weight.

    Raises:
        UserError: no model there, an adapter, another architecture, missing or damaged weights, or attention that this
            machine lacks.
    """
    where = f"model.path {config.model.path}"
    folder = Path(find_model(config.model.path, where))
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                "is an adapter, not a model",
                where=where,
                hint=f"merge it into its base first: phi3v export {folder} --out DIR",
            )
        if not (folder / "config.json").is_file():
            raise UserError("no model there: config.json is missing", where=where, hint=_MODEL_HINT)
        if (kind := graph_kind(folder)) is not None:
            raise UserError(
                f"holds graphs of a model ({kind}), which answer but have no weights to train",
                where=where,
                hint="take the model or the run that they were exported from",
            )
    model_config, skeleton = _read_config(config)
    quantisation = quantisation_of(model_config, where)
    if folder.is_dir():
        _check_weights(folder, skeleton, quantisation, where)
    attention, reason = choose_attention(config, runtime)
    dtype = model_config.dtype
    stored = dtype if isinstance(dtype, torch.dtype) else torch.float32
    return ModelFacts(skeleton, stored, attention, reason, model_config.max_position_embeddings, quantisation)


def inspect_graphs(config: RunConfig) -> ModelFacts:
    """As `inspect_model`, of a folder of graphs."""
    model_config, skeleton = _read_config(config)
    context = model_config.max_position_embeddings
    if (file := Path(config.model.path) / CONFIG).is_file():  # of onnx, whose rotary tables may be shorter
        with content_of(file):
            context = min(context, int(read_json(file)["model"]["context_length"]))
    return ModelFacts(skeleton, torch.float32, "graphs", "as exported", context)


def _read_config(config: RunConfig) -> tuple[Phi3VConfig, Phi3VForCausalLM]:
    """The model's configuration, and the model without weights."""
    try:
        model_config = Phi3VConfig.from_pretrained(config.model.path)
    except (OSError, ValueError) as error:
        where = f"model.path {config.model.path}"
        raise UserError(f"no model there: {str(error).splitlines()[0]}", where=where, hint=_MODEL_HINT) from None
    with content_of(Path(config.model.path) / "config.json"):
        return model_config, make_skeleton(model_config)


def make_skeleton(config: Phi3VConfig) -> Phi3VForCausalLM:
    """A model without weights."""
    with torch.device("meta"):
        return Phi3VForCausalLM(config)


_MODEL_HINT = "give a folder in the official layout (make one with `phi3v model init`), or a hub id"


def _check_weights(folder: Path, skeleton: nn.Module, quantisation: Quantisation | None, where: str) -> None:
    """A model whose file lacks tensors would otherwise train on random numbers in their place."""
    try:
        shapes = checkpoint_shapes(folder)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"the weights are damaged: {error}", where=where, hint="copy or download them again") from None
    if not shapes:
        raise UserError("there are no weights (model.safetensors)", where=where, hint=_MODEL_HINT)
    keys = set(shapes) | ({EMBEDDING} if SECOND_EMBEDDING in shapes else set())
    packed: set[str] = set()
    if quantisation is not None:
        keys = quantisation.float_names(keys)
        packed = {f"{layer}.weight" for layer in quantisation.layers(shapes)}
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    missing = sorted(expected.keys() - keys)
    if missing:
        raise UserError(
            f"{len(missing)} tensors are missing from the weights, first {missing[0]}",
            where=where,
            hint="the copy is incomplete, or config.json belongs to another model",
        )
    other = [name for name in sorted(expected.keys() & shapes.keys() - packed) if shapes[name] != expected[name]]
    if other:
        raise UserError(
            f"{len(other)} tensors are of another shape than by config.json, first {other[0]}",
            where=where,
            hint="copy config.json again from where the weights are from",
        )


def load_processor(config: RunConfig) -> Phi3VProcessor:
    """The model's processor, with the configured number of crops and use of EXIF orientations.

    Raises:
        UserError: there is none at ``model.path``.
    """
    try:
        processor = Phi3VProcessor.from_pretrained(config.model.path, num_crops=config.model.num_crops)
    except OSError as error:
        raise UserError(
            f"no processor there: {str(error).splitlines()[0]}",
            where=f"model.path {config.model.path}",
            hint=_MODEL_HINT,
        ) from None
    processor.image_processor.exif_orientation = config.data.exif_orientation
    return processor


def load_for_training(config: RunConfig, facts: ModelFacts, runtime: RuntimeDevice) -> Any:
    """The model as the method wants it: quantised, with adapters, with the right tensors trainable.

    Raises:
        UserError: the weights do not fit the configuration.
    """
    method = config.method
    loaded_dtype, trained_dtype = weight_dtypes(config, facts.stored_dtype, runtime)
    kwargs: dict[str, Any] = {"attn_implementation": facts.attention, "dtype": loaded_dtype}
    if method.name == "qlora":
        kwargs["quantization_config"] = quantization(method.lora, runtime.dtype)
    if method.name == "qlora" or runtime.device.type == "cuda":
        # Straight to the device, not through the host's memory. With qlora a CPU takes this way too.
        kwargs["device_map"] = {"": runtime.device}
    model = load_weights(config.model.path, **kwargs)
    if method.name == "qlora":
        keep_trainable_layout(model)
    return apply_method(model, method, trained_dtype)


def weight_dtypes(config: RunConfig, stored: torch.dtype, runtime: RuntimeDevice) -> tuple[torch.dtype, torch.dtype]:
    """What a model's weights are loaded in, and what those that are trained are held in.

    Args:
        stored: of the checkpoint.
    """
    trained = torch.bfloat16 if keeps_bf16_weights(config.training) else torch.float32
    if trained == torch.bfloat16 and config.method.name == "full":
        return stored, trained  # what never trains is saved as it was
    return loaded_dtype(config.method, stored, runtime.dtype), trained


def loaded_dtype(method: MethodConfig, stored: torch.dtype, computed: torch.dtype) -> torch.dtype:
    """What weights are loaded in where those that are trained are held in float32.

    Args:
        stored: of the checkpoint.
        computed: of the run's precision.
    """
    if computed == torch.float32 or method.name == "full":
        # Full training updates what it computes with, and half precision would round small updates away.
        return torch.float32
    if method.name != "frozen-vision":
        return computed  # frozen weights under adapters may be rounded
    # Frozen weights that are saved again must stay what they were; autocast mixes no two kinds of half precision.
    return stored if stored in (torch.float32, computed) else torch.float32


def load_weights(path: str, **kwargs: Any) -> Phi3VForCausalLM:
    """The model at ``path``; arguments as of ``from_pretrained``.

    Raises:
        UserError: it cannot be read, or tensors are missing.
    """
    try:
        model, info = Phi3VForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"cannot be loaded: {error}", where=f"model.path {path}") from error
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise UserError(f"{len(info['missing_keys'])} tensors are missing, first {first}", where=f"model.path {path}")
    loaded: Phi3VForCausalLM = model
    return loaded


def choose_attention(config: RunConfig, runtime: RuntimeDevice) -> tuple[str, str]:
    """The decoder's attention, as transformers knows it, and the reason for it.

    Raises:
        UserError: what is asked for cannot run there.
    """
    if config.data.packing == "none":
        return _choose_padded_attention(config.model.attention, runtime.gpu, runtime.dtype)
    shares = config.data.packing == "shared-image" or config.objective.is_preference  # answers share their prompt
    return choose_packed_attention(config.model.attention, runtime.gpu, runtime.dtype, shares_prefixes=shares)


def _choose_padded_attention(wanted: Attention, gpu: Accelerator, dtype: torch.dtype) -> tuple[str, str]:
    if wanted == "varlen":
        hint = "set data.packing to samples or shared-image, or leave attention at auto"
        raise UserError("varlen is for packed rows only", where="model.attention", hint=hint)
    if wanted == "flex":
        if gpu.type != "cuda":
            raise UserError(
                f"flex cannot run: it needs a GPU, this is {gpu.type}", where="model.attention", hint="use sdpa"
            )
        return "flex_attention", "as configured"
    if wanted not in ("auto", "flash_attention_2"):
        return wanted, "as configured"
    obstacle = flash_obstacle(gpu, dtype, "flash_attn")
    if obstacle is None:
        return "flash_attention_2", "as configured" if wanted != "auto" else f"flash-attn is installed, {dtype}"
    if wanted == "auto":
        return "sdpa", obstacle
    raise UserError(
        f"flash_attention_2 cannot run: {obstacle}", where="model.attention", hint="leave it at auto, or use sdpa"
    )


def choose_packed_attention(
    wanted: Attention, gpu: Accelerator, dtype: torch.dtype, *, shares_prefixes: bool
) -> tuple[str, str]:
    """The implementation for packed rows and the reason for it.

    Raises:
        UserError: what is asked for cannot run there.
    """
    names = {
        "eager": "packed_mask",
        "sdpa": "packed_segments",
        "flex": "packed_flex",
        "varlen": "packed_varlen",
        "flash_attention_2": "packed_fa2",
    }
    if wanted != "auto":
        obstacle = packed_obstacle(names[wanted], gpu, dtype)
        if obstacle is None:
            return names[wanted], "as configured"
        raise UserError(
            f"{wanted} cannot run: {obstacle}", where="model.attention", hint="leave it at auto, or use sdpa"
        )
    # FlexAttention reads a shared prefix where it lies; the others would copy its keys for every branch.
    order = ["packed_varlen", "packed_fa2", "packed_flex"]
    if shares_prefixes:
        order.insert(0, order.pop())
    obstacles: list[str] = []
    for name in order:
        obstacle = packed_obstacle(name, gpu, dtype)
        if obstacle is None:
            first = "rows share prefixes" if shares_prefixes else "rows of separate samples"
            return name, "; ".join([f"{first}, {dtype} on {gpu.name}", *obstacles])
        obstacles.append(obstacle)
    return "packed_segments", "; ".join(dict.fromkeys(obstacles))


def packed_obstacle(name: str, gpu: Accelerator, dtype: torch.dtype) -> str | None:
    """Why a backend cannot train on ``gpu`` in ``dtype``, or None."""
    if name in ("packed_mask", "packed_segments"):
        return None
    if gpu.type != "cuda":
        return f"flash and flex attention need a GPU, this is {gpu.type}"
    if name == "packed_flex":
        if not gpu.has("triton"):
            return "FlexAttention needs triton, which is not installed"
        return None if gpu.flash_attention else f"FlexAttention is not used on {gpu.name}"
    return flash_obstacle(gpu, dtype, "flash_attn" if name == "packed_fa2" else "torch.nn.attention.varlen")


def flash_obstacle(gpu: Accelerator, dtype: torch.dtype, module: str) -> str | None:
    """Why flash attention of ``module`` cannot run on ``gpu`` in ``dtype``, or None."""
    if gpu.type != "cuda":
        return f"flash attention needs a GPU, this is {gpu.type}"
    if not gpu.flash_attention:
        return f"flash attention has no kernels for {gpu.name}"
    if not gpu.has(module):
        return (
            "flash-attn is not installed" if module == "flash_attn" else "this torch has no variable-length attention"
        )
    return "flash attention does not compute in fp32" if dtype not in HALF else None


def require_bitsandbytes() -> None:
    """Say which extra to install where bitsandbytes is missing, as a `UserError`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("qlora needs bitsandbytes", where="method.name", hint='pip install "phi3v[qlora]"')


def quantization(lora: LoraConfig, compute_dtype: torch.dtype) -> Any:
    """4-bit NormalFloat for every frozen linear layer but the head (QLoRA, arXiv 2305.14314).

    Raises:
        UserError: bitsandbytes is missing.
    """
    from transformers import BitsAndBytesConfig

    require_bitsandbytes()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=lora.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        # What is trained in full cannot be stored in four bits.
        llm_int8_skip_modules=["lm_head", *(VISION + PART_MODULES[part] for part in lora.also_train)],
    )


def keep_trainable_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first inference on the CPU.

    Its packed layout is for inference only: trained after an evaluation, a repacked layer passes no gradient on.
    """
    flag = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, flag):
            setattr(module, flag, False)
