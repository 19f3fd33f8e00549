"""Other ways to compute the same: Liger's fused kernels and ``torch.compile``."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers.modeling_layers import GradientCheckpointingLayer

from phi3v.config import TrainingConfig
from phi3v.errors import UserError


def check_kernels(training: TrainingConfig, device: torch.device, precision: str) -> None:
    """Refuse kernels that this machine lacks.

    Raises:
        UserError: as said.
    """
    if training.kernels != "liger":
        return
    where, hint = "training.kernels", "use torch"
    if device.type != "cuda":
        raise UserError(f"Liger's kernels need a GPU, this is {device.type}", where=where, hint=hint)
    if precision == "fp16":  # its loss takes the gradient before fp16's loss scale, where most of it is zero
        raise UserError("Liger's loss does not train in fp16", where=where, hint=hint)
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        raise UserError("Liger is not installed", where=where, hint='pip install "phi3v[gpu]"') from None


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
