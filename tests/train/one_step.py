"""One optimizer step of the real loop, on any number of ranks; writes the gradients that the optimizer saw."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

from phi3v.config import Packing, RunConfig
from phi3v.data.batches import RowDataset
from phi3v.data.collate import LossWeighting
from phi3v.data.readers import Readers
from phi3v.data.table import open_table
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.collectives import HostCollectives
from phi3v.train.device import choose_device
from phi3v.train.engines import DataParallel
from phi3v.train.engines.choice import choose_engine
from phi3v.train.loop import TrainingLoop
from phi3v.train.methods.loading import inspect_model, load_for_training
from phi3v.train.observers.faults import StepFaults
from phi3v.train.prepare import make_plan, require_lengths


class KeepGradients(DataParallel):
    """Copies all gradients just before the optimizer uses them."""

    def step(self, norm: torch.Tensor) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        super().step(norm)


def one_step(
    model_path: Path, data: Path, out: Path, micro_batch: int, weighting: LossWeighting, packing: Packing = "none"
) -> None:
    """Learn from four samples at once, in micro-batches or packed rows."""
    config = RunConfig()
    config.model.path = str(model_path)
    config.training.batch_size = 4
    config.training.micro_batch_size = micro_batch
    config.training.max_steps = 1
    config.distributed.engine = "ddp"
    config.training.max_grad_norm = 0.0
    config.data.packing = packing
    config.data.pack_tokens = 500  # two records at most, so that ranks have several rows
    compute = choose_device("fp32")
    processor = Phi3VProcessor.from_pretrained(model_path)
    facts = inspect_model(config, compute)
    model = load_for_training(config, facts, compute)
    table = open_table(Path(data))
    plan = make_plan(config, compute, model, require_lengths(config, table, facts, processor))
    dataset = RowDataset(table, processor, weighting, packed=plan.is_packed)
    engine = KeepGradients(model, choose_engine(config, compute), config, compute)
    collectives = HostCollectives(compute.world_size, timedelta(minutes=5))
    faults = StepFaults(
        collectives,
        table,
        Console(),
        max_nonfinite_steps=1,
        can_drop=True,
        is_scaled=False,
        newest_checkpoint=lambda: "there is none",
    )
    readers = Readers(dataset.__getitem__)
    state = TrainingLoop(config, engine, plan, readers, compute, collectives, faults).run()
    loss = torch.tensor(state.mean_loss)
    total = torch.stack([gradient.norm() for gradient in engine.gradients.values()]).norm()
    if compute.rank == 0:
        save_file({**engine.gradients, "loss": loss, "total": total}, out)
