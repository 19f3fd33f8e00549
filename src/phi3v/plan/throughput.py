"""Floating-point operations of a sample, and the speed they allow.

A product of (m, k) by (k, n) is 2·m·k·n operations. The backward pass of a trained layer is two more forward passes, of
a frozen one that gradients pass through one more; attention has no weights, so its backward pass is always two.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi3v.model.shape import ModelShape
from phi3v.plan.hardware import Machine
from phi3v.plan.inputs import TrainSetup
from phi3v.train.compute.activations import RECOMPUTES_ALL

# The CPU's share of its nominal rate: 14.74 samples/s of the tiny model, full training without recomputing, on 2 cores
# (benchmarks/results/quickstart.json) are 0.5 of what `training_flops` counts.
CPU_UTILISATION = 0.5


@dataclass(frozen=True)
class SampleWork:
    """The mean sample.

    Attributes:
        tokens: mean length.
        tokens_squared: mean of the squared lengths, for attention.
        image_tokens, crops, answer_tokens: means.
    """

    tokens: float
    tokens_squared: float
    image_tokens: float
    crops: float
    answer_tokens: float


@dataclass(frozen=True)
class Flops:
    """Operations of a sample's training step.

    Attributes:
        model: what the method needs.
        hardware: with what is computed again for checkpointing.
        forward: of one forward pass.
    """

    model: float
    hardware: float
    forward: float = 0.0


def training_flops(
    shape: ModelShape, setup: TrainSetup, work: SampleWork, *, tower_trained: bool, extra_forwards: int = 0
) -> Flops:
    """Operations to train on one sample.

    Args:
        extra_forwards: forward passes of a step beside that of the loss.
    """
    linear = shape.token_flops * work.tokens
    attention = 2 * shape.layers * work.tokens_squared * shape.hidden  # causal: half of 4·T²·H
    head = 2 * work.answer_tokens * shape.hidden * shape.vocabulary
    tower_linear, tower_attention = (work.crops * flops for flops in shape.crop_flops)
    projector = 2 * work.image_tokens * (4 * shape.tower_width * shape.hidden + shape.hidden**2)
    decoder_forward, tower_forward = linear + attention + head, tower_linear + tower_attention + projector

    weights = 0 if setup.is_adapter else 1  # one more forward's worth for gradients of weights
    model = decoder_forward + (1 + weights) * (linear + head) + 2 * attention + tower_forward
    if tower_trained:
        model += (1 + weights) * (tower_linear + projector) + 2 * tower_attention
    recomputed = 0.0
    if setup.checkpointing in RECOMPUTES_ALL:
        recomputed += linear + attention
    if setup.checkpointing != "none" and tower_trained:
        recomputed += tower_linear + tower_attention
    forward = decoder_forward + tower_forward
    model += extra_forwards * forward
    return Flops(model, model + recomputed, forward)


@dataclass(frozen=True)
class Speed:
    """Predicted speed and what it rests on.

    Attributes:
        samples_per_second: of all devices; 0 where the device's rate is unknown.
        utilisation: model operations a second as a share of the rate.
        basis: the assumption, in a sentence.
        forward_share: what a forward pass of a sample takes of the time to train on it.
    """

    samples_per_second: float
    utilisation: float
    basis: str
    forward_share: float = 0.0


def predict_speed(flops: Flops, machine: Machine, hardware_utilisation: float, basis: str) -> Speed:
    """Samples a second, where the hardware does ``hardware_utilisation`` of its rate, recomputing included."""
    rate = machine.gpu.tflops * 1e12 * machine.gpus
    if not rate:
        return Speed(0.0, 0.0, "the rate of this device is not in the table")
    samples = rate * hardware_utilisation / flops.hardware
    return Speed(samples, samples * flops.model / rate, basis, flops.forward / flops.hardware)
