"""Which activations are kept for the backward pass and which are computed again.

Always torch's non-reentrant checkpointing: the reentrant kind gives no gradients behind frozen embeddings.
"""

from __future__ import annotations

import functools
from collections.abc import Container
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from phi3v.train.compute.activations import RECOMPUTES_ALL, Activations, MicroBatch, Policy
from phi3v.train.compute.offload import Offload, checkpoint_offloaded

# What `selective` keeps in the decoder: products of matrices, but for adapters' large ones, and attention. All else is
# cheap to compute again.
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


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(getattr(operation, "overloadpacket", operation))
    return (
        CheckpointPolicy.MUST_SAVE if name in KEPT and not _is_narrow(name, args) else CheckpointPolicy.PREFER_RECOMPUTE
    )


def _is_narrow(name: str, args: Any) -> bool:
    """Whether a product sums over few numbers for each that it gives: an adapter's second, as large as the layer's own.

    To compute it again costs next to nothing, to keep it as much as the layer's.
    """
    return name == "aten.mm" and 8 * args[0].shape[1] < args[1].shape[1]


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
            layers all but products of matrices and attention; ``full`` every layer; ``offload`` too, and their inputs
            wait in the host's memory.
    """
    recompute_all = checkpoint_offloaded(Offload()) if policy == "offload" else _RECOMPUTE_ALL
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        is_vision = isinstance(layer, CLIPEncoderLayer)
        layer.gradient_checkpointing = policy != "none" and (is_vision or policy != "vision")
        is_whole = is_vision or policy in RECOMPUTES_ALL
        # `gradient_checkpointing_enable` would give all layers of a model one policy.
        layer._gradient_checkpointing_func = recompute_all if is_whole else _RECOMPUTE_CHEAP


def free_bytes(model: nn.Module, device: torch.device, ranks: int, state_bytes: int) -> int:
    """What is left for activations: free memory less gradients and optimizer state.

    Args:
        ranks: processes of this machine, which share its memory where the device is the CPU.
        state_bytes: of a trained parameter: its gradient and the optimizer's moments.
    """
    free = psutil.virtual_memory().available // ranks
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit = torch.cuda.get_per_process_memory_fraction(device) * total
        free = min(free, int(limit) - torch.cuda.memory_allocated(device))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return int(free) - trained * state_bytes


def free_pinned_bytes(device: torch.device, ranks: int) -> int:
    """Host memory that a rank may pin: half of its share of what is free; none where the device is the host.

    Args:
        ranks: processes of this machine.
    """
    return psutil.virtual_memory().available // (2 * ranks) if device.type == "cuda" else 0


def choose_checkpointing(
    activations: Activations,
    batch: MicroBatch,
    free: int,
    *,
    pinned: int = 0,
    least: Policy = "none",
    without: Container[Policy] = (),
) -> tuple[Policy, str]:
    """The policy and the reason for it: of those that fit, the one that recomputes least, and `offload` last.

    Args:
        batch: the largest of the run.
        free: bytes for activations, see `free_bytes`.
        pinned: as of `free_pinned_bytes`.
        least: what is recomputed at least.
        without: what is not to be used.
    """
    policies: list[Policy] = ["none", "vision", "selective", "full"]
    policies = policies[policies.index(least) :]
    if activations.pinned(batch) <= pinned:
        policies.append("offload")
    policies = [policy for policy in policies if policy not in without]
    needs = {policy: activations.peak(policy, batch) for policy in policies}
    chosen = next((policy for policy in policies if needs[policy] <= USABLE_SHARE * free), policies[-1])
    reason = f"{batch.tokens:,} tokens and {batch.crops} crops at a time need about {needs[chosen] / 1e9:.2f} GB"
    if chosen == "offload":
        reason += f" and {activations.pinned(batch) / 1e9:.2f} GB of the host's memory"
    if chosen != least:
        reason += f", {activations.peak('none', batch) / 1e9:.2f} GB if all were kept"
    return chosen, f"{reason}; {max(free, 0) / 1e9:.2f} GB are free"
