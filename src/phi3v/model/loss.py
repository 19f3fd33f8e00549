"""The training loss: a weighted sum over answer tokens divided by the weight of the whole step.

Never a mean of means: with weights and normaliser fixed, any split of a step into micro-batches, accumulation
steps and ranks adds up to the same loss and the same gradients.

The head runs at answer tokens only and in chunks whose logits are dropped at once and computed again in the backward
pass, so the (n, vocabulary) logits never exist: beyond the head's own gradient the loss takes the same memory whatever
the vocabulary. The second run of the head costs a third more of it, at answer tokens. Kernels that take the gradient in
the forward pass save that, but see it before fp16's loss scale, where most of it rounds to zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from phi3v.processing.conversation import IGNORE_INDEX

LossKernel = Literal["chunked", "whole", "liger"]

# 64 MiB in float32; 523 tokens of the published models. A chunk has one token at least.
LOGITS_PER_CHUNK = 2**24


def causal_lm_loss(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    loss_weights: torch.Tensor | None = None,
    normalizer: torch.Tensor | float | None = None,
    *,
    kernel: LossKernel = "chunked",
    selected: bool = False,
) -> torch.Tensor:
    """Next-token cross-entropy; the head runs only where there is something to predict.

    Args:
        hidden_states: (B, T, H), the decoder's output.
        lm_head: maps (n, H) to logits (n, vocabulary); it may carry an adapter.
        labels: (B, T) int64, aligned with the inputs; ``IGNORE_INDEX`` where nothing is to be learnt.
        loss_weights: (B, T) float, the weight of each label; ``None`` weighs every label 1.
        normalizer: the sum of weights of the whole step; ``None`` takes it from this batch, which with unit
            weights is the mean over tokens, as the official model returns.
        kernel: ``liger`` takes Liger's fused kernel where the head is a plain linear layer; an adapted or quantised
            one is ``chunked`` all the same. ``whole`` is one chunk, for when ranks must run the head equally often.
        selected: ``hidden_states`` (1, n, H) are those of the `learnt_positions` alone.

    Returns:
        A float32 scalar.
    """
    targets, learnt = labels[:, 1:], learnt_positions(labels)  # [B, T - 1]
    states = hidden_states[0] if selected else hidden_states[:, :-1][learnt]  # [n, H]
    wanted = targets[learnt]  # [n]
    weights = torch.ones(len(wanted), device=states.device)
    if loss_weights is not None:
        weights = loss_weights[:, 1:][learnt].to(weights)
    if normalizer is None:
        normalizer = weights.sum()
    if kernel == "liger" and type(lm_head) is nn.Linear:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        each = LigerFusedLinearCrossEntropyLoss(reduction="none")(lm_head.weight, states, wanted)  # [n]
        return (each.float() * weights).sum() / normalizer
    size = max(1, len(wanted) if kernel == "whole" else LOGITS_PER_CHUNK // vocabulary_size(lm_head))
    # Without anything to learn there is still one chunk, of no tokens: every rank must reduce the same tensors.
    chunks = zip(states.split(size), wanted.split(size), weights.split(size), strict=True)
    losses = [checkpoint(_weighted_sum, lm_head, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum() / normalizer


def learnt_positions(labels: torch.Tensor) -> torch.Tensor:
    """(B, T - 1) bool: where something is learnt; position t predicts token t + 1."""
    return labels[:, 1:] != IGNORE_INDEX


def vocabulary_size(lm_head: nn.Module) -> int:
    """Logits that a head makes for a token."""
    return int(lm_head.out_features)  # type: ignore[arg-type]


def _weighted_sum(
    lm_head: nn.Module, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    logits = lm_head(states).float()  # [chunk, vocabulary]
    losses = functional.cross_entropy(logits, targets, reduction="none")  # [chunk]
    return (losses * weights).sum()
