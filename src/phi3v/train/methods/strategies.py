"""What is trained: full, frozen vision, LoRA, QLoRA.

Trained tensors are held in float32 (or in bfloat16, as the optimizer wants), frozen ones in the dtype of the
computation. CLIP's last layer and final norm
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

from phi3v.config import LoraConfig, MethodConfig, Part
from phi3v.errors import UserError
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.train.methods.pissa import remember_start

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


def apply_method(model: Phi3VForCausalLM, method: MethodConfig, trained_dtype: torch.dtype = torch.float32) -> Any:
    """Choose the trainable tensors of a loaded model; wraps it in a ``PeftModel`` for adapters.

    Args:
        trained_dtype: of the trained tensors.
    """
    if method.uses_adapters:
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
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained_dtype)
    return model


def _last_clip_layer(model: nn.Module) -> int:
    layers = {
        int(match.group(1))
        for name, _ in model.named_parameters()
        if (match := re.search(r"vision_model\.encoder\.layers\.(\d+)\.", name))
    }
    return max(layers)


def trained_parts(model: Phi3VForCausalLM, method: MethodConfig) -> frozenset[str]:
    """The parts that `apply_method` would train something of.

    Raises:
        UserError: a LoRA target matches no linear layer that runs.
    """
    if method.uses_adapters:
        return frozenset(map(part_of, target_modules(model, method.lora))) | frozenset(method.lora.also_train)
    language = frozenset({"decoder", "head"})
    if method.name == "frozen-vision":
        return language | {"embeddings"} if method.train_embeddings else language
    return language | {"embeddings", "vision", "projector"}


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
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        init_lora_weights=True if lora.init == "default" else lora.init,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    if lora.init == "pissa":
        remember_start(adapted)
    return adapted


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
