"""Floating-point operations of a sample, and the speed they allow."""

from __future__ import annotations

from dataclasses import dataclass

from phi3v.model.shape import Costs, ModelShape
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

    def at(self, costs: Costs) -> float:
        """Operations."""
        return costs.of(
            tokens=self.tokens,
            pairs=self.tokens_squared,
            crops=self.crops,
            image_tokens=self.image_tokens,
            targets=self.answer_tokens,
        )


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
    again = {
        "decoder_again": setup.checkpointing in RECOMPUTES_ALL,
        "tower_again": setup.checkpointing != "none" and tower_trained,
    }
    model, hardware = (
        work.at(shape.training_costs(tower_trained=tower_trained, adapters=setup.is_adapter, **recomputed))
        for recomputed in ({}, again)
    )
    forward = work.at(shape.forward_costs)
    return Flops(model + extra_forwards * forward, hardware + extra_forwards * forward, forward)


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


def predict_speed(
    flops: Flops, machine: Machine, hardware_utilisation: float, basis: str, *, moved: float = 0.0
) -> Speed:
    """Samples a second, where the hardware does ``hardware_utilisation`` of its rate, recomputing included.

    Args:
        moved: bytes of a sample that go to the host and come back while others are computed.
    """
    rate = machine.gpu.tflops * 1e12 * machine.gpus
    if not rate:
        return Speed(0.0, 0.0, "the rate of this device is not in the table")
    samples = rate * hardware_utilisation / flops.hardware
    if moved and machine.gpu.host_gb_s:
        copying = 2 * moved / (machine.gpu.host_gb_s * 1e9)
        computing = machine.gpus / samples
        samples = machine.gpus / max(computing, copying)
        basis += (
            f"; copies to the host and back: an estimated {copying:.2g} s a sample at PCIe's nominal "
            f"{machine.gpu.host_gb_s:g} GB/s, beside {computing:.2g} s of computing"
        )
    return Speed(samples, samples * flops.model / rate, basis, flops.forward / flops.hardware)
