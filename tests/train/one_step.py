"""One optimizer step of the real trainer, on any number of ranks; writes the gradients that the optimizer saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from phi3v.config import Packing, RunConfig
from phi3v.data.batches import PaddedDataset
from phi3v.data.collate import Collator, ConversationDataset, LossWeighting
from phi3v.data.packing import PackedDataset
from phi3v.data.table import open_table
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.device import choose_device
from phi3v.train.engines import DataParallel
from phi3v.train.loop import Phi3VTrainer, training_arguments
from phi3v.train.methods.loading import inspect_model, load_for_training
from phi3v.train.prepare import make_plan


class KeepGradients(TrainerCallback):
    """Copies all gradients just before the optimizer uses them."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None:
                self.gradients[name.removeprefix("module.")] = parameter.grad.clone()


def one_step(
    model_path: Path, data: Path, out: Path, micro_batch: int, weighting: LossWeighting, packing: Packing = "none"
) -> None:
    """Learn from four samples at once, in micro-batches or packed rows."""
    config = RunConfig()
    config.model.path = str(model_path)
    config.training.batch_size = 4
    config.training.micro_batch_size = micro_batch
    config.training.max_steps = 1
    config.training.max_grad_norm = 0.0
    config.data.packing = packing
    config.data.pack_tokens = 500  # two records at most, so that ranks have several rows
    compute = choose_device("fp32")
    processor = Phi3VProcessor.from_pretrained(model_path)
    model = load_for_training(config, inspect_model(config, compute), compute)
    arguments = training_arguments(
        config,
        out.parent / "run",
        precision="fp32",
        use_cpu=True,
    )
    table = open_table(Path(data))
    plan = make_plan(config, compute, model, table, processor)
    dataset: Any = PackedDataset(table, processor, weighting)
    if packing == "none":
        collator = Collator(processor.tokenizer.pad_token_id, loss_weighting=weighting)
        dataset = PaddedDataset(ConversationDataset(table, processor), collator)
    trainer = Phi3VTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        config=config,
        engine=DataParallel(compute.rank, compute.world_size),
        plan=plan,
    )
    assert trainer.args.world_size == compute.world_size  # the ranks asked for are the ranks that run
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    loss = torch.tensor(trainer.state.log_history[0]["loss"])
    total = torch.stack([gradient.norm() for gradient in keep.gradients.values()]).norm()
    if compute.rank == 0:
        save_file({**keep.gradients, "loss": loss, "total": total}, out)
