"""The training loop: transformers' Trainer with an exact loss and counters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from phi3v.config import RunConfig
from phi3v.data.packing import PackedDataset, PackedLoader, PackingPlan
from phi3v.train.optimizers import StochasticAdamW
from phi3v.train.tracking import PROJECT


class Phi3VTrainer(Trainer):
    """Divides the weighted loss by the weight of the whole optimizer step.

    A step's weight is summed over its micro-batches and over all ranks before the first of them runs, so every split
    of the same samples gives the same gradients (see ``model/loss.py``).

    Args:
        lean: step in the backward pass.
        plan: packs the rows of a `PackedDataset`; a step's rows differ in number, so the library counts each step as
            one batch and `training_step` goes through its rows.
    """

    def __init__(self, *args: Any, lean: bool = False, plan: PackingPlan | None = None, **kwargs: Any) -> None:
        self.plan = plan
        super().__init__(*args, **kwargs)
        self.lean = lean
        # The loss comes normalised; without this the Trainer would divide it by the accumulation steps again.
        self.model_accepts_loss_kwargs = True
        self._counts = torch.zeros(4, dtype=torch.float64, device=self.args.device)

    @property
    def seen(self) -> dict[str, int]:
        """Samples, questions and tokens that all ranks have taken since the start; waits for the device."""
        return dict(zip(("samples", "questions", "tokens"), map(int, self._counts[1:].tolist()), strict=True))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The library's, with its groups; in lean mode it steps in the backward pass."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.lean and isinstance(optimizer, StochasticAdamW) and not optimizer.in_backward:
            optimizer.step_in_backward()
        return optimizer

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """The step's weight: the sum of ``loss_weights`` over its micro-batches on all ranks.

        The counts come from the host and stay on the device, so no step waits for them.
        """
        rows = [row for batch in batch_samples for row in batch.get("rows", [batch])]
        sums = [sum(row["counts"][index] for row in rows) for index in range(4)]
        counts = torch.tensor(sums, dtype=torch.float64, device=self._counts.device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        self._counts += counts
        return counts[0].float()

    def get_train_dataloader(self) -> DataLoader[Any]:
        if self.plan is None:
            return super().get_train_dataloader()
        assert isinstance(self.train_dataset, PackedDataset)
        # The plan deals rows to ranks already, so accelerate has nothing to share out.
        return PackedLoader(
            self.train_dataset,
            self.plan,
            self.args.process_index,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The next step: of packed rows, this rank's rows as one batch."""
        if self.plan is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = []
        for row in epoch_iterator:
            rows.append(row)
            if row.pop("ends_step"):
                break
        batch = [{"rows": rows}]
        return batch, self._get_num_items_in_batch(batch, device)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if "rows" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        *earlier, last = inputs["rows"]
        loss = torch.zeros((), device=self.args.device)
        for row in earlier:
            with self.accelerator.no_sync(model):  # ranks meet once a step, however many rows each has
                loss += super().training_step(model, row, num_items_in_batch)
        loss += super().training_step(model, last, num_items_in_batch)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return sum(super(Phi3VTrainer, self).floating_point_ops(row) for row in inputs.get("rows", [inputs]))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss.

        Data-parallel engines average gradients over ranks, so each rank's share is multiplied by their number.
        """
        inputs = {name: value for name, value in inputs.items() if name != "counts"}
        if num_items_in_batch is not None:
            inputs["loss_normalizer"] = num_items_in_batch / self.args.world_size
        outputs = model(**inputs, logits_to_keep=None, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def training_arguments(
    config: RunConfig, run_folder: Path, *, precision: str, use_cpu: bool, accumulation: int, num_workers: int
) -> TrainingArguments:
    """The configuration in the library's terms."""
    training = config.training
    arguments = TrainingArguments(
        output_dir=str(run_folder),
        seed=training.seed,
        data_seed=training.seed,
        use_cpu=use_cpu,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_steps,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_bnb_8bit" if training.optimizer == "adamw_8bit" else "adamw_torch",
        logging_steps=training.logging_steps,
        logging_first_step=True,
        # A loss that is not finite must be seen, not smoothed over.
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=["tensorboard", *training.report_to],
        run_name=run_folder.resolve().name,
        project=PROJECT,
        remove_unused_columns=False,
        dataloader_num_workers=num_workers,
        dataloader_persistent_workers=num_workers > 0,
        dataloader_pin_memory=not use_cpu,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        average_tokens_across_devices=False,  # the weight is summed over ranks above
    )
    # Without torchrun the library would spread one process over all GPUs (DataParallel) and tear batches apart.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
