"""Which activations are kept for the backward pass and which are computed again.

Always torch's non-reentrant checkpointing: the reentrant kind gives no gradients behind frozen embeddings.

Shapes: ``T`` tokens, ``H`` width of the decoder, ``I`` of its MLP, ``V`` width of the tower.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from phi3v.config import Checkpointing
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.vision import PATCHES

Policy = Literal["none", "vision", "selective", "full"]

# What `selective` keeps in the decoder: products of matrices and attention. All else is cheap to compute again.
KEPT = {
    "aten.mm",
    "aten.addmm",
    "aten.bmm",
    "aten.baddbmm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_attention_math",
    "aten._flash_attention_forward",
    "aten._scaled_mm",
    "torch_attn._varlen_attn",
    "flash_attn._flash_attn_forward",
    "flash_attn._flash_attn_varlen_forward",
    "bitsandbytes.gemv_4bit",
}
# Fragmentation, the loss, and what kernels need for themselves.
USABLE_SHARE = 0.8
PATCHES_PER_CROP = PATCHES**2 + 1


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(getattr(operation, "overloadpacket", operation))
    return CheckpointPolicy.MUST_SAVE if name in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_RECOMPUTE_ALL = functools.partial(checkpoint, use_reentrant=False)
_RECOMPUTE_CHEAP = functools.partial(
    checkpoint,
    use_reentrant=False,
    context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_products),
)


def apply_checkpointing(model: nn.Module, policy: Policy) -> None:
    """Set what every layer of the model recomputes.

    Args:
        policy: ``none`` keeps all; ``vision`` recomputes the tower's layers; ``selective`` those, and of the decoder's
            layers all but products of matrices and attention; ``full`` every layer.
    """
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        is_vision = isinstance(layer, CLIPEncoderLayer)
        layer.gradient_checkpointing = policy != "none" and (is_vision or policy != "vision")
        recompute_all = is_vision or policy == "full"
        layer._gradient_checkpointing_func = _RECOMPUTE_ALL if recompute_all else _RECOMPUTE_CHEAP


def activation_bytes(config: Phi3VConfig, policy: Policy, *, tokens: int, crops: int, bytes_per_value: int) -> int:
    """About how much the activations of one forward pass take, counted from what each layer saves.

    A decoder layer keeps its input; the input and output of two norms, which compute in float32; q, k and v before and
    after rotation; attention's output; gate and up, their activation and product: 12 H + 4 I values and 2 H of float32.
    ``selective`` keeps its input and the products' results: 7 H + 2 I. A layer of the tower keeps 14 V and twice its
    MLP's width. Where a layer is recomputed, its whole activations exist once.

    Args:
        tokens: of the decoder, at a time.
        crops: through the tower, at a time.
        bytes_per_value: of the computation's dtype.
    """
    vision = config.vision_config()
    size, hidden, inner = bytes_per_value, config.hidden_size, config.intermediate_size
    layer = tokens * (size * (12 * hidden + 4 * inner) + 8 * hidden)
    of_layer = {
        "none": layer,
        "vision": layer,
        "selective": tokens * size * (7 * hidden + 2 * inner),
        "full": tokens * size * hidden,
    }[policy]
    patches = crops * PATCHES_PER_CROP
    vision_layer = patches * size * (14 * vision.hidden_size + 2 * vision.intermediate_size)
    of_vision_layer = vision_layer if policy == "none" else patches * size * vision.hidden_size
    once = (layer if policy in ("selective", "full") else 0) + (vision_layer if policy != "none" else 0)
    return config.num_hidden_layers * of_layer + (vision.num_hidden_layers - 1) * of_vision_layer + once


def free_bytes(model: nn.Module, device: torch.device, ranks: int, state_bytes: int) -> int:
    """What is left for activations: free memory less gradients and optimizer state.

    Args:
        ranks: processes that share the host's memory, where the device is the CPU.
        state_bytes: of a trained parameter: its gradient and the optimizer's moments.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available // ranks
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return int(free) - trained * state_bytes


def choose_checkpointing(
    wanted: Checkpointing, config: Phi3VConfig, *, tokens: int, crops: int, bytes_per_value: int, free: int
) -> tuple[Policy, str]:
    """The policy and the reason for it: of those that fit, the one that recomputes least.

    Args:
        tokens, crops, bytes_per_value: as of `activation_bytes`.
        free: bytes for activations, see `free_bytes`.
    """
    if wanted != "auto":
        return wanted, "as configured"
    policies: tuple[Policy, ...] = ("none", "vision", "selective", "full")
    needs = {
        policy: activation_bytes(config, policy, tokens=tokens, crops=crops, bytes_per_value=bytes_per_value)
        for policy in policies
    }
    fitting: list[Policy] = [policy for policy in policies if needs[policy] <= USABLE_SHARE * free]
    chosen = fitting[0] if fitting else "full"
    reason = f"{tokens:,} tokens and {crops} crops at a time need about {needs[chosen] / 1e9:.2f} GB"
    if chosen != "none":
        reason += f", {needs['none'] / 1e9:.2f} GB if all were kept"
    return chosen, f"{reason}; {max(free, 0) / 1e9:.2f} GB are free"
