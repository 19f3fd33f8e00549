"""The training loop: transformers' Trainer with an exact loss and counters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers.trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from phi3v.config import RunConfig
from phi3v.data.batches import BatchPlan, StepLoader
from phi3v.data.readers import Readers
from phi3v.errors import UserError
from phi3v.train.checkpoints.random_state import set_random_state
from phi3v.train.checkpoints.weights import read_trained
from phi3v.train.collectives import HostCollectives
from phi3v.train.engines import Engine
from phi3v.train.methods.optimizers import StochasticAdamW, divide_groups, has_several_rates
from phi3v.train.observers.faults import StepFaults
from phi3v.train.observers.tracking import PROJECT
from phi3v.train.schedule import warmup_steps

if TYPE_CHECKING:
    from phi3v.train.checkpoints.resume import ResumePoint
    from phi3v.train.checkpoints.writer import Checkpointer


class _CheckEngine(TrainerCallback):
    """Looks, when training begins, whether the engine that was chosen is what runs."""

    def __init__(self, trainer: Phi3VTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.engine.check(self.trainer)


class Phi3VTrainer(Trainer):
    """Divides the weighted loss by the weight of the whole optimizer step.

    A step's weight is summed over its micro-batches and over all ranks before the first of them runs, so every split
    of the same samples gives the same gradients (see ``model/loss.py``).

    Args:
        config: of the run.
        engine: how the ranks hold model and optimizer.
        collectives: what the ranks tell each other.
        faults: watches the steps; without it nothing does.
        plan: the rows that ``train_dataset`` makes. A step's rows differ in number, so the library counts each step as
            one batch and `training_step` goes through its rows.
        readers: fetch rows from ``train_dataset``; without them it is read here.
    """

    def __init__(
        self,
        *args: Any,
        config: RunConfig,
        engine: Engine,
        plan: BatchPlan,
        readers: Readers | None = None,
        collectives: HostCollectives | None = None,
        faults: StepFaults | None = None,
        **kwargs: Any,
    ) -> None:
        self.config = config
        self.plan = plan
        self.readers = readers or Readers(kwargs["train_dataset"].__getitem__)
        self.engine = engine
        super().__init__(*args, **kwargs)
        engine.adopt(self)
        self.add_callback(_CheckEngine(self))
        self.collectives = collectives or HostCollectives(self.args.world_size, timedelta(minutes=30))
        self.faults = faults
        self.checkpoints: Checkpointer | None = None
        self.point: ResumePoint | None = None
        # The loss comes normalised; without this the Trainer would divide it by the accumulation steps again.
        self.model_accepts_loss_kwargs = True
        self.counts = [0.0] * 4  # weight, samples, questions, tokens of all ranks since the start
        self.steps_per_epoch = 0
        self._logged = (0.0, 0)  # the sum of all losses that were logged, and of how many steps
        self._logged_to = 0
        self.skipped: list[tuple[str, str]] = []  # records that were left out, and why

    @property
    def seen(self) -> dict[str, int]:
        """Samples, questions and tokens that all ranks have taken since the start."""
        return dict(zip(("samples", "questions", "tokens"), map(int, self.counts[1:]), strict=True))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The library's, with its groups; in lean mode it steps in the backward pass."""
        self.engine.shard(self.model)
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if has_several_rates(self.config) and "name" not in optimizer.param_groups[0]:
            divide_groups(optimizer, self.model, self.config)
        if self.config.training.lean and isinstance(optimizer, StochasticAdamW) and not optimizer.in_backward:
            optimizer.step_in_backward()
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """The library's, with the warm-up of a run of so many steps."""
        self.args.warmup_steps = warmup_steps(self.config.training, num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def _get_num_items_in_batch(self, steps: list[list[dict[str, Any]]], device: torch.device) -> torch.Tensor:
        """The step's weight: the sum of the loss weights over its rows on all ranks.

        The counts come from the hosts and go over them, so no step waits for a device.
        """
        counts = [row["counts"] for rows in steps for row in rows]
        skipped = [entry for own in counts for entry in own.skipped]
        sums = [sum(own[index] for own in counts) for index in range(4)]
        *totals, num_skipped = self.collectives.sum([*sums, len(skipped)])
        self.counts = [before + now for before, now in zip(self.counts, totals, strict=True)]
        if num_skipped and self.faults is not None:
            self.skipped += self.faults.report_skipped(skipped)
        # Of a step in which no record could be read every loss is 0.
        return torch.tensor(totals[0] or 1.0, device=device)

    def get_train_dataloader(self) -> Any:
        """The steps of this rank. The plan deals rows to ranks, so accelerate has nothing to share out."""
        assert self.train_dataset is not None
        return StepLoader(
            self.train_dataset,
            self.plan,
            self.args.process_index,
            self.readers,
            equal=self.engine.meets_in_every_row,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The next step, as one batch that is the list of this rank's rows.

        Raises:
            UserError: a rank cannot read a record. All ranks raise it, after what was learnt so far has been saved.
        """
        if self.faults is not None:
            self.faults.begin_step()
        wrong: str | None = None
        steps: list[list[dict[str, Any]]] = []
        try:
            steps = [next(epoch_iterator)]
        except UserError as error:
            wrong = str(error)
        if self.collectives.sum([wrong is not None])[0]:
            if self.checkpoints is not None and self.state.global_step not in (0, self.checkpoints.last_step):
                self.checkpoints.save(self)
                self.checkpoints.wait()
            what = next(text for text in self.collectives.all_gather(wrong) if text is not None)
            raise UserError(what)
        return steps, self._get_num_items_in_batch(steps, device)

    def training_step(self, model: Any, rows: list[dict[str, Any]], num_items_in_batch: Any = None) -> torch.Tensor:
        *earlier, last = rows
        loss = torch.zeros((), device=self.args.device)
        is_last = self.accelerator.gradient_state._set_sync_gradients  # as the library tells an engine
        is_last(False)
        for row in earlier:
            with self.accelerator.no_sync(model):  # DDP meets once a step, however many rows each rank has
                loss += self._micro_step(model, row, num_items_in_batch)
        is_last(True)
        loss += self._micro_step(model, last, num_items_in_batch)
        return loss

    def _micro_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        tensors = {name: value for name, value in inputs.items() if name != "counts"}
        loss = super().training_step(model, tensors, num_items_in_batch)
        if self.faults is not None:
            self.faults.add(inputs["counts"].records, loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradient's norm; the last look at a step before it changes the weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        step, is_scaled = self.state.global_step + 1, self.accelerator.scaler is not None
        if self.faults is not None and self.faults.must_drop(step, norm, is_scaled=is_scaled):
            for parameter in model.parameters():
                parameter.grad = None
        return norm

    # Saving and going on: the library's loop, with our files and random numbers in place of its own.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Not within a row of steps that were dropped: a resumed run would not count them.
        if self.checkpoints is not None and not (self.faults is not None and self.faults.in_a_row):
            self.checkpoints.save(self)

    @property
    def mean_loss(self) -> float:
        """Over all steps, but for logging steps with one that was not finite."""
        total, steps = self._logged
        rest, more = float(self._tr_loss), self.state.global_step - self._logged_to
        if math.isfinite(rest):
            total, steps = total + rest, steps + more
        return total / max(steps, 1)

    def loop_state(self, collectives: HostCollectives) -> dict[str, Any]:
        """The losses that are not logged yet, of every rank, and those that are; a collective."""
        losses = collectives.all_gather(self._tr_loss.item())
        return {"losses": losses, "logged": list(self._logged), "logged_to": self._logged_to}

    def restore_loop(self, loop: dict[str, Any]) -> None:
        """What `loop_state` gave; on another number of ranks each gets the mean, which is what is logged."""
        losses, ranks = loop["losses"], self.args.world_size
        self._tr_loss += losses[self.args.process_index] if len(losses) == ranks else sum(losses) / len(losses)
        self._logged = (loop["logged"][0], loop["logged"][1])
        self._logged_to = self._globalstep_last_logged = loop["logged_to"]

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.point is not None:
            # To the library this only says that it resumes: what it would read there is taken up below.
            kwargs["resume_from_checkpoint"] = str(self.point.folder)
        return super()._inner_training_loop(*args, **kwargs)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, resume_from_checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """Gives the epoch to begin with and the batches of it that are done."""
        super()._init_training_state(max_steps, steps_per_epoch, num_epochs, None, trial)
        self.steps_per_epoch = steps_per_epoch
        if self.point is None:
            return 0, 0
        state, step = self.point.state, self.point.step
        if state["steps_per_epoch"] != steps_per_epoch:
            raise UserError(
                f"an epoch had {state['steps_per_epoch']} steps when it was saved and has {steps_per_epoch} now",
                where=str(self.point.folder),
                hint="go on with the number of ranks that it was saved with",
            )
        self.state.global_step, self.state.epoch = step, state["epoch"]
        return step // steps_per_epoch, step % steps_per_epoch

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.point is not None:
            self._check_engine_of_checkpoint(self.point)
            folder = self.point.folder if self.args.process_index == 0 else None
            tensors = read_trained(self.model, folder / "model") if folder is not None else None
            self.engine.load_full_state_dict(self.model, tensors)
            self.engine.load_optimizer(self, folder / "optimizer" if folder is not None else None)
        return prepared

    def _check_engine_of_checkpoint(self, point: ResumePoint) -> None:
        """Engines that divide the optimizer save it alike, the others too, but not as those."""
        saved, now = point.state["engine"], self.engine.name
        if (saved in ("none", "ddp")) != (now in ("none", "ddp")):
            raise UserError(
                f"it was saved by the engine {saved}, whose optimizer {now} cannot take up",
                where=str(point.folder),
                hint="go on with the same engine, on at least two processes if it divides the model",
            )

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.point is not None and (self.point.stopped_early or self.state.global_step >= self.state.max_steps):
            self.control.should_training_stop = True  # saved when all steps were taken
            return
        with _skipping_our_way():
            super()._run_epoch(**kwargs)

    def _load_rng_state(self, checkpoint: Any) -> None:
        """Go on drawing as when it was saved: after the batches that are done have been passed over."""
        assert self.point is not None
        if self.args.process_index < len(self.point.randoms) and len(self.point.randoms) == self.args.world_size:
            set_random_state(self.point.randoms[self.args.process_index])

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Where parts have learning rates of their own, all of them are logged beside that of the first group."""
        if "loss" in logs:
            self._add_to_mean(logs["loss"])
        if "learning_rate" in logs and has_several_rates(self.config):
            # What the schedule multiplies is the same for all; it may have been stepped since.
            first = self.lr_scheduler.base_lrs[0]
            for group, peak in zip(self.optimizer.param_groups, self.lr_scheduler.base_lrs, strict=True):
                logs[f"learning_rate_{group['name']}"] = logs["learning_rate"] * peak / first
        super().log(logs, *args, **kwargs)

    def _add_to_mean(self, loss: float) -> None:
        steps, self._logged_to = self.state.global_step - self._logged_to, self.state.global_step
        if math.isfinite(loss):
            self._logged = (self._logged[0] + loss * steps, self._logged[1] + steps)
        else:
            self._tr_loss.zero_()  # the library subtracts it from itself, which of a NaN leaves a NaN

    def floating_point_ops(self, inputs: list[dict[str, Any]]) -> int:
        return sum(super(Phi3VTrainer, self).floating_point_ops(row) for row in inputs)

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
        if num_items_in_batch is not None:
            inputs = inputs | {"loss_normalizer": num_items_in_batch / self.args.world_size}
        outputs = model(**inputs, logits_to_keep=None, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def skip_first_steps(loader: StepLoader, num_batches: int) -> StepLoader:
    """A loader that begins so many steps later."""
    loader.first_step = num_batches
    return loader


@contextlib.contextmanager
def _skipping_our_way() -> Iterator[None]:
    """The library's loop passes over batches with a function that would read their images."""
    library = transformers.trainer.skip_first_batches
    transformers.trainer.skip_first_batches = skip_first_steps
    try:
        yield
    finally:
        transformers.trainer.skip_first_batches = library


def training_arguments(config: RunConfig, run_folder: Path, *, precision: str, use_cpu: bool) -> TrainingArguments:
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
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        lr_scheduler_type=training.schedule,
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
        dataloader_pin_memory=not use_cpu,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        average_tokens_across_devices=False,  # the weight is summed over ranks above
    )
    # Without torchrun the library would spread one process over all GPUs (DataParallel) and tear batches apart.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
