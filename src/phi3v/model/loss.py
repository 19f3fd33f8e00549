"""The training loss: a weighted sum over answer tokens divided by the weight of the whole step.

Never a mean of means: with weights and normaliser fixed, any split of a step into micro-batches, accumulation
steps and ranks adds up to the same loss and the same gradients.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from phi3v.processing.conversation import IGNORE_INDEX


def causal_lm_loss(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    loss_weights: torch.Tensor | None = None,
    normalizer: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Next-token cross-entropy; the head runs only where there is something to predict.

    Args:
        hidden_states: (B, T, H), the decoder's output.
        lm_head: maps (n, H) to logits (n, vocabulary).
        labels: (B, T) int64, aligned with the inputs; ``IGNORE_INDEX`` where nothing is to be learnt.
        loss_weights: (B, T) float, the weight of each label; ``None`` weighs every label 1.
        normalizer: the sum of weights of the whole step; ``None`` takes it from this batch, which with unit
            weights is the mean over tokens, as the official model returns.

    Returns:
        A float32 scalar.
    """
    targets = labels[:, 1:]  # [B, T - 1]; position t predicts token t + 1
    learnt = targets != IGNORE_INDEX
    logits = lm_head(hidden_states[:, :-1][learnt]).float()  # [n, vocabulary]
    losses = functional.cross_entropy(logits, targets[learnt], reduction="none")  # [n]
    weights = torch.ones_like(losses) if loss_weights is None else loss_weights[:, 1:][learnt].to(losses)
    if normalizer is None:
        normalizer = weights.sum()
    return (losses * weights).sum() / normalizer
