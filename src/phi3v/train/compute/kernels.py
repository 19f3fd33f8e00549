"""Other ways to compute the same: Liger's fused kernels and ``torch.compile``."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer

from phi3v.config import TrainingConfig


def apply_kernels(model: Any, training: TrainingConfig) -> None:
    """Exchange what computes the layers of a loaded model, as configured; its weights and names stay.

    Liger's rotary embedding replaces transformers' in the whole process.
    """
    if training.kernels == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_phi3

        base = model.get_base_model() if isinstance(model, PeftModel) else model
        apply_liger_kernel_to_phi3(
            rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=base
        )
        base.loss_kernel = "liger"
    if training.compile:
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.compile(dynamic=True)  # lengths differ from batch to batch
