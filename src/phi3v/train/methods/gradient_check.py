"""One real forward and backward before training: does each trainable tensor get a gradient, and no frozen one?

With reentrant checkpointing over frozen embeddings a decoder trains at full speed and learns nothing. That, a
detached part, or a tensor that no forward pass reaches, is found here in seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from phi3v.errors import UserError

# Softmax does not change when all keys move by the same vector, so this gradient is zero in exact arithmetic.
ZERO_BY_NATURE = ("k_proj.bias",)
# Half precision needs its loss scaled, by how much only trying tells; the gradient scaler of training does the same.
FP16_SCALES = (65536.0, 1024.0, 16.0)


def check_gradients(
    model: Any,
    batch: Mapping[str, Any],
    *,
    autocast_dtype: torch.dtype | None = None,
    loss_of: Callable[[Callable[[Mapping[str, Any]], Any], Mapping[str, Any]], torch.Tensor] | None = None,
) -> int:
    """Check the gradients of one batch and leave the model as it was.

    LoRA's B matrices start at zero, which makes the gradients of A zero; for the check they get small random values.

    Args:
        batch: model inputs with labels, with at least one image where a vision part is trained.
        loss_of: gives the loss, from what runs the model and the batch; by default the model's own.

    Returns:
        The number of trainable tensors.

    Raises:
        UserError: a trainable tensor has no gradient, a zero or a non-finite one; a frozen tensor has one; or
            nothing is trainable.
    """
    device = next(model.parameters()).device
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise UserError("nothing is trainable", where="method", hint="the method froze every tensor")
    zeroed = [p for name, p in trainable.items() if ".lora_B." in name and not p.detach().any()]
    devices = [device] if device.type == "cuda" else []
    was_training = model.training
    model.train()
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else contextlib.nullcontext()
    inputs = send_to_device({name: value for name, value in batch.items() if name != "counts"}, device)
    problems: list[str] = []
    with torch.random.fork_rng(devices):
        try:
            with torch.no_grad():
                for parameter in zeroed:
                    nn.init.normal_(parameter, std=0.02)
            for scale in FP16_SCALES if autocast_dtype == torch.float16 else (1.0,):
                model.zero_grad(set_to_none=True)
                with autocast:
                    if loss_of is None:
                        loss = model(**inputs, logits_to_keep=None, use_cache=False).loss
                    else:
                        loss = loss_of(lambda inputs: model(**inputs), inputs)
                if not torch.isfinite(loss):
                    raise UserError(f"the loss of the first batch is {loss.item()}", hint="try training.precision fp32")
                (loss * scale).backward()
                problems = [
                    f"{name}: {problem}"
                    for name, parameter in model.named_parameters()
                    if (problem := _problem(name, parameter)) is not None
                ]
                if not problems:
                    break
        finally:
            with torch.no_grad():
                for parameter in zeroed:
                    parameter.zero_()
            model.zero_grad(set_to_none=True)
            model.train(was_training)
    if problems:
        shown = "\n    ".join(problems[:10])
        raise UserError(
            f"{len(problems)} tensors would not train as the method says:\n    {shown}"
            + (f"\n    … and {len(problems) - 10} more" if len(problems) > 10 else ""),
            where="gradient check",
            hint="this run would learn less than it claims; if the model is as published, please report it",
        )
    return len(trainable)


def _problem(name: str, parameter: nn.Parameter) -> str | None:
    gradient = parameter.grad
    if not parameter.requires_grad:
        return None if gradient is None else "frozen, but has a gradient"
    if gradient is None:
        return "trainable, but has no gradient"
    if not torch.isfinite(gradient).all():
        return "its gradient is not finite"
    if not gradient.any() and not name.endswith(ZERO_BY_NATURE):
        return "trainable, but its gradient is zero"
    return None
