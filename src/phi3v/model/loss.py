"""The training loss: a weighted sum over answer tokens divided by the weight of the whole step.

Never a mean of means: with weights and normaliser fixed, any split of a step into micro-batches, accumulation
steps and ranks adds up to the same loss and the same gradients.

The head runs at answer tokens only and in chunks whose logits are dropped at once and computed again in the backward
pass, so the (n, vocabulary) logits never exist: beyond the head's own gradient the loss takes the same memory whatever
the vocabulary. The second run of the head costs a third more of it, at answer tokens. Kernels that take the gradient in
the forward pass save that, but see it before fp16's loss scale, where most of it rounds to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    targets: torch.Tensor | None = None,
    selected: bool = False,
) -> torch.Tensor:
    """Next-token cross-entropy; the head runs only where there is something to predict.

    Args:
        hidden_states: (B, T, H), the decoder's output.
        lm_head: maps (n, H) to logits (n, vocabulary); it may carry an adapter.
        labels: (B, T) int64, aligned with the inputs; ``IGNORE_INDEX`` where there is no target.
        loss_weights: (B, T) float, the weight of each label; ``None`` weighs every label 1.
        normalizer: the sum of weights of the whole step; ``None`` takes it from this batch, which with unit
            weights is the mean over tokens, as the official model returns.
        kernel: ``liger`` takes Liger's fused kernel where the head is a plain linear layer; an adapted or quantised
            one is ``chunked`` all the same. ``whole`` is one chunk, for when ranks must run the head equally often.
        targets: (n,) int64, see `find_targets`; by default they are read from ``labels``, for which the device is
            waited for.
        selected: ``hidden_states`` (1, n, H) are those before the targets alone.

    Returns:
        A float32 scalar.
    """
    total, _, weights = target_losses(
        hidden_states, lm_head, labels, loss_weights, kernel=kernel, targets=targets, selected=selected
    )
    return total / (weights.sum() if normalizer is None else normalizer)


def target_losses(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    loss_weights: torch.Tensor | None = None,
    *,
    kernel: LossKernel = "chunked",
    targets: torch.Tensor | None = None,
    selected: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weighted sum of the losses of `causal_lm_loss`, whose arguments these are, and what it is made of.

    Returns:
        A float32 scalar; and without a gradient (n,) the weighted loss of each target, and its weight.
    """
    if targets is None:
        targets = find_targets(labels)
    states = hidden_states.flatten(0, 1)  # [B * T, H]
    if not selected:
        states = states.index_select(0, targets - 1)  # [n, H]
    wanted = labels.flatten()[targets]  # [n]
    weights = torch.ones(len(wanted), device=states.device)
    if loss_weights is not None:
        weights = loss_weights.flatten()[targets].to(weights)
    if kernel == "liger" and type(lm_head) is nn.Linear:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        each = LigerFusedLinearCrossEntropyLoss(reduction="none")(lm_head.weight, states, wanted)  # [n]
        each = each.float() * weights
        return each.sum(), each.detach(), weights
    size = max(1, len(wanted) if kernel == "whole" else LOGITS_PER_CHUNK // vocabulary_size(lm_head))
    # Without a target there is still one chunk, of no tokens: every rank must reduce the same tensors.
    chunks = zip(states.split(size), wanted.split(size), weights.split(size), strict=True)
    sums, losses = zip(
        *(checkpoint(_weighted_sum, lm_head, *chunk, use_reentrant=False) for chunk in chunks), strict=True
    )
    return torch.stack(sums).sum(), torch.cat(losses), weights


def group_sums(losses: torch.Tensor, weights: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(2, G) the sums of the losses and of the weights of each group.

    Args:
        losses, weights: (n,) of each target.
        groups: (G, n) bool, which targets a group has.
    """
    # Sums over a mask: adding into places by index would not be repeatable on a GPU.
    return (groups * torch.stack([losses, weights])[:, None]).sum(-1)


def answer_log_probs(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    answer_tokens: Sequence[int],
    *,
    kernel: LossKernel = "chunked",
    targets: torch.Tensor | None = None,
    selected: bool = False,
) -> torch.Tensor:
    """(answers,) float32: the log-probability of each answer, the sum over its tokens; the head runs as for the loss.

    Args:
        answer_tokens: the number of targets of each answer, in the order in which they stand in ``labels``.
        hidden_states, lm_head, labels, targets, selected: as of `causal_lm_loss`.
        kernel: ``liger`` is ``chunked``.

    Raises:
        ValueError: the answers have another number of targets than ``labels``.
    """
    if targets is None:
        targets = find_targets(labels)
    if sum(answer_tokens) != len(targets):
        raise ValueError(f"answers of {list(answer_tokens)} tokens came with {len(targets)} targets")
    states = hidden_states.flatten(0, 1)  # [B * T, H]
    if not selected:
        states = states.index_select(0, targets - 1)  # [n, H]
    wanted = labels.flatten()[targets]  # [n]
    size = max(1, len(wanted) if kernel == "whole" else LOGITS_PER_CHUNK // vocabulary_size(lm_head))
    chunks = zip(states.split(size), wanted.split(size), strict=True)
    losses = [checkpoint(_losses, lm_head, *chunk, use_reentrant=False) for chunk in chunks]
    # A sum of slices, in a fixed order: adding into places by index would not be repeatable on a GPU.
    return -torch.stack([part.sum() for part in torch.cat(losses).split(list(answer_tokens))])


def find_targets(labels: torch.Tensor) -> torch.Tensor:
    """(n,) int64: the places, in (B, T) laid out flat, of labels to predict, each from the token before it.

    The first of a row has no token before it and is none.
    """
    targets = labels != IGNORE_INDEX
    targets[:, 0] = False
    return targets.flatten().nonzero()[:, 0]


def vocabulary_size(lm_head: nn.Module) -> int:
    """Logits that a head makes for a token."""
    return int(lm_head.out_features)  # type: ignore[arg-type]


def _weighted_sum(
    lm_head: nn.Module, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    losses = _losses(lm_head, states, targets) * weights
    return losses.sum(), losses.detach()


def _losses(lm_head: nn.Module, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = lm_head(states).float()  # [chunk, vocabulary]
    return functional.cross_entropy(logits, targets, reduction="none")  # [chunk]
