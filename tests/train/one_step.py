"""One optimizer step of the real loop, on any number of ranks; writes the gradients that the optimizer saw."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from phi3v.config import ObjectiveName, Packing, RunConfig
from phi3v.data.collate import LossWeighting
from phi3v.data.readers import Readers
from phi3v.train.collectives import HostCollectives
from phi3v.train.device import choose_device
from phi3v.train.engines import DataParallel
from phi3v.train.loop import TrainingLoop
from phi3v.train.observers.faults import StepFaults
from phi3v.train.prepare import prepare
from phi3v.train.reference import reference_log_probs

# Float32 sums in another order. Relative to the largest gradient of a tensor where that is above 1: a unit in the last
# place of a gradient of 8 is 1e-6 already.
TOLERANCE = 1e-6


def assert_same(got: dict[str, Any], reference: dict[str, Any], what: str) -> None:
    assert got.keys() == reference.keys()
    worst = max(
        ((got[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1.0)).item()
        for name, gradient in reference.items()
    )
    assert worst < TOLERANCE, f"{what}: {worst}"


class KeepGradients(DataParallel):
    """Copies all gradients just before the optimizer uses them."""

    def step(self, norm: torch.Tensor) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        super().step(norm)


class StandsStill(DataParallel):
    """Keeps the gradients of every step, and the weights as they are."""

    @cached_property
    def gradients(self) -> list[dict[str, torch.Tensor]]:
        return []

    def step(self, norm: torch.Tensor) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
        self.optimizer.zero_grad()


def one_step(
    model_path: Path,
    data: Path,
    out: Path,
    micro_batch: int,
    weighting: LossWeighting,
    packing: Packing = "none",
    objective: ObjectiveName = "sft",
) -> None:
    """Learn from four samples at once, in micro-batches or packed rows."""
    config = RunConfig()
    config.objective.name = objective
    config.model.path = str(model_path)
    config.training.batch_size = 4
    config.training.micro_batch_size = micro_batch
    config.training.max_steps = 1
    config.distributed.engine = "ddp"
    config.training.max_grad_norm = 0.0
    config.data.packing = packing
    config.data.pack_tokens = 500  # two records at most, so that ranks have several rows
    config.data.train, config.data.eval = str(data), None
    config.data.num_workers = 0
    config.training.loss_weighting = weighting
    config.training.output_dir = str(out.parent / "run")
    runtime = choose_device("fp32")
    run = prepare(config, Console(quiet=True), runtime, HostCollectives(runtime.world_size))
    engine = KeepGradients(run.model, run.engine.choice, config, runtime)
    run = replace(run, engine=engine)
    reference = None
    if config.objective.needs_reference:
        run.folder.mkdir(parents=True, exist_ok=True)
        # Not the model's own, or KTO's estimate would be 0.
        reference = reference_log_probs(run)
        reference -= torch.arange(len(reference)) % 5
    state = TrainingLoop(run, Readers(run.dataset(reference=reference).__getitem__), StepFaults(run)).run()
    loss = torch.tensor(state.mean_loss)
    total = torch.stack([gradient.norm() for gradient in engine.gradients.values()]).norm()
    if runtime.rank == 0:
        save_file({**engine.gradients, "loss": loss, "total": total}, out)
