"""What is trained: full, frozen vision, LoRA, QLoRA.

Trained tensors are held in float32, frozen ones in the dtype of the computation. CLIP's last layer and final norm
are never trained: no forward pass runs them.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn

from phi3v.config import LoraConfig, MethodConfig, ModelConfig, Part
from phi3v.errors import UserError
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.modeling import Phi3VForCausalLM

# The linear layers of each part, by the names they have in the checkpoint.
PART_TARGETS: dict[Part, tuple[str, ...]] = {
    "decoder": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "head": ("lm_head",),
    "vision": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "projector": ("img_projection.0", "img_projection.2"),
}
# The module of a part that is trained in full beside adapters.
PART_MODULES = {"vision": "img_processor", "projector": "img_projection"}

VISION = "model.vision_embed_tokens."
EMBEDDINGS = "model.embed_tokens."


def part_of(name: str) -> str:
    """The part of the model that a module or parameter belongs to."""
    if "vision_embed_tokens." in name:
        return "projector" if "img_projection" in name or name.endswith("_GN") else "vision"
    if "embed_tokens" in name:
        return "embeddings"
    return "head" if "lm_head" in name else "decoder"


@dataclass(frozen=True)
class TrainablePart:
    """How much of a part is trained."""

    part: str
    trainable: int
    total: int
    adapters: dict[str, int]  # adapted layer name → how many


def load_for_training(
    model_config: ModelConfig, method: MethodConfig, *, compute_dtype: torch.dtype, device: torch.device
) -> Any:
    """The model as the method wants it: quantised, with adapters, with the right tensors trainable.

    Raises:
        UserError: a LoRA target matches nothing, or an optional library is missing.
    """
    kwargs: dict[str, Any] = {"attn_implementation": choose_attention(model_config.attention, device, compute_dtype)[0]}
    # Full training updates what it computes with, and bf16 alone would round small updates away.
    kwargs["dtype"] = torch.float32 if method.name == "full" else compute_dtype
    if method.name == "qlora":
        kwargs["quantization_config"] = quantization(method.lora, compute_dtype)
        kwargs["device_map"] = {"": device}
    model = Phi3VForCausalLM.from_pretrained(model_config.path, **kwargs)
    if method.name == "qlora":
        keep_trainable_layout(model)
    else:
        model = model.to(device)
    return apply_method(model, method)


def stored_dtype(model_config: ModelConfig) -> torch.dtype:
    """The dtype that the model's checkpoint names; float32 where it names none."""
    dtype = Phi3VConfig.from_pretrained(model_config.path).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The decoder's attention and the reason for it."""
    if wanted != "auto":
        return wanted, "as configured"
    if device.type != "cuda":
        return "sdpa", f"flash attention needs a GPU, this is {device.type}"
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return "sdpa", "flash-attn is not installed"
    if dtype == torch.float32:
        return "sdpa", "flash attention does not compute in fp32"
    return "flash_attention_2", f"flash-attn is installed and the precision is {dtype}"


def quantization(lora: LoraConfig, compute_dtype: torch.dtype) -> Any:
    """4-bit NormalFloat for every frozen linear layer but the head (QLoRA, arXiv 2305.14314).

    Raises:
        UserError: bitsandbytes is missing.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError("qlora needs bitsandbytes", where="method.name", hint='pip install "phi3v[qlora]"') from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=lora.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_trainable_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first inference on the CPU.

    Its packed layout is for inference only: trained after an evaluation, a repacked layer passes no gradient on.
    """
    flag = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, flag):
            setattr(module, flag, False)


def enable_checkpointing(model: Any) -> None:
    """Recompute every layer's activations in the backward pass.

    Never the reentrant kind: behind frozen embeddings it gives no gradients.
    """
    # The library's new name for it; the old one warns.
    name = "activation_checkpointing"
    if not hasattr(model, f"{name}_enable"):
        name = "gradient_checkpointing"
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})


def apply_method(model: Phi3VForCausalLM, method: MethodConfig) -> Any:
    """Choose the trainable tensors of a loaded model; wraps it in a ``PeftModel`` for adapters."""
    if method.name in ("lora", "qlora"):
        model = add_adapters(model, method.lora)
    else:
        for name, parameter in model.named_parameters():
            frozen = method.name == "frozen-vision" and (
                name.startswith(VISION) or (name.startswith(EMBEDDINGS) and not method.train_embeddings)
            )
            parameter.requires_grad_(not frozen)
    never_run = re.compile(rf"encoder\.layers\.{_last_clip_layer(model)}\.|post_layernorm\.")
    for name, parameter in model.named_parameters():
        # By name, for the copies too that PEFT makes of modules trained in full beside adapters.
        if never_run.search(name):
            parameter.requires_grad_(False)
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return model


def _last_clip_layer(model: nn.Module) -> int:
    layers = {
        int(match.group(1))
        for name, _ in model.named_parameters()
        if (match := re.search(r"vision_model\.encoder\.layers\.(\d+)\.", name))
    }
    return max(layers)


def target_modules(model: Phi3VForCausalLM, lora: LoraConfig) -> list[str]:
    """Full names of the layers that get adapters.

    Raises:
        UserError: a target matches no linear layer that runs.
    """
    unused = {name.rsplit(".", 1)[0] for name, _ in model.unused_parameters()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in unused]
    in_full = set(lora.also_train)
    if lora.targets is not None:
        wanted = [(target, linear) for target in lora.targets]
    else:
        wanted = [
            (target, [name for name in linear if part_of(name) == part])
            for part in lora.parts
            if part not in in_full
            for target in PART_TARGETS[part]
        ]
    chosen: list[str] = []
    for target, candidates in wanted:
        hits = [name for name in candidates if name == target or name.endswith(f".{target}")]
        if not hits:
            names = sorted({leaf for part in PART_TARGETS.values() for leaf in part})
            near = difflib.get_close_matches(target, names, n=1)
            raise UserError(
                f"LoRA target {target!r} matches no linear layer of the model",
                where="method.lora.targets" if lora.targets is not None else "method.lora.parts",
                hint=f"did you mean {near[0]!r}?" if near else f"layers are called {', '.join(names)}",
            )
        chosen += [name for name in hits if part_of(name) not in in_full]
    if not chosen:
        raise UserError("no layer is left to adapt", where="method.lora", hint="name a part that is not in also_train")
    return sorted(set(chosen))


def add_adapters(model: Phi3VForCausalLM, lora: LoraConfig) -> PeftModel:
    """LoRA on the chosen layers, and the parts of ``also_train`` as full copies that travel with the adapter."""
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # One expression of full names: PEFT's suffix matching would also take CLIP's last layer, which never runs.
        target_modules="|".join(re.escape(name) for name in target_modules(model, lora)),
        modules_to_save=[PART_MODULES[part] for part in lora.also_train] or None,
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def summarize(model: nn.Module) -> list[TrainablePart]:
    """Trainable and total parameters and adapted layers of each part, in a fixed order."""
    trainable: Counter[str] = Counter()
    total: Counter[str] = Counter()
    adapters: dict[str, Counter[str]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        # 4-bit weights are stored two to a byte; their real size stands in the quantisation state.
        state = getattr(parameter, "quant_state", None)
        size = state.shape.numel() if state is not None else parameter.numel()
        total[part] += size
        trainable[part] += size if parameter.requires_grad else 0
        if name.endswith("lora_A.default.weight"):
            module = name.removesuffix(".lora_A.default.weight")
            leaf = next(t for targets in PART_TARGETS.values() for t in targets if module.endswith(t))
            adapters.setdefault(part, Counter())[leaf] += 1
    order = ("vision", "projector", "embeddings", "decoder", "head")
    return [
        TrainablePart(part, trainable[part], total[part], dict(adapters.get(part, {}))) for part in order if total[part]
    ]
