"""When a checkpoint is saved and how; and ending a run by a signal, on all ranks at the same step."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from transformers import TrainerCallback

from phi3v.config import RunConfig
from phi3v.data.features import free_space
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.checkpoints.folder import (
    checkpoint_name,
    checkpoints,
    link_tree,
    publish,
    remove_older,
    tensor_bytes,
    unfinished_folder,
    write_state,
)
from phi3v.train.checkpoints.random_state import random_state
from phi3v.train.checkpoints.weights import WRITE_ERRORS, IncompleteSaveError, failure_text, save_final
from phi3v.train.collectives import HostCollectives
from phi3v.train.engines import DeferredWrite, Engine, to_host
from phi3v.train.engines.sharded import without_weights
from phi3v.train.methods.optimizers import moment_bytes
from phi3v.train.observers.signals import Signals
from phi3v.train.run_folder import environment

if TYPE_CHECKING:
    from phi3v.train.loop import Phi3VTrainer
    from phi3v.train.observers.evaluation import EvaluationCallback
    from phi3v.train.observers.progress import ProgressCallback

logger = logging.getLogger("phi3v")

# At the end of training a checkpoint is saved if that much would have to be trained again without it.
WORTH_SAVING = 60.0
# Of free memory that a copy of what is saved may take.
MEMORY_SHARE = 0.8


class Checkpointer(TrainerCallback):
    """Saves checkpoints, and tells training to stop after a step in which a signal came.

    One save is in flight at most. One that fails takes nothing with it: the earlier checkpoints stay, training goes
    on, and the next save is tried in its turn.

    Attributes:
        stopped_by: the signal that ended training.
        failed: saves that could not be written.
        last_step: that a save was tried of.
        last_failure: why the newest save could not be written; None if it could.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        collectives: HostCollectives,
        signals: Signals,
        *,
        model: Any,
        processor: Phi3VProcessor,
        rank: int,
        folder: Path,
        console: Console,
        progress: ProgressCallback,
        during: EvaluationCallback | None,
        contents: dict[str, str],
    ) -> None:
        self.config = config
        self.engine = engine
        self.collectives = collectives
        self.signals = signals
        self.model = model
        self._skeleton = without_weights(model)  # for the thread that writes: it may touch nothing that trains
        self.processor = processor
        self.rank = rank
        self.folder = folder
        self.console = console
        self.progress = progress
        self.during = during
        self.stopped_by: str | None = None
        self.failed = 0
        self.last_failure: str | None = None
        self._contents = contents
        self.last_step = -1
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()
        assert self.progress.trainer is not None
        point = self.progress.trainer.point
        if point is not None:
            self._load_state(self.progress.trainer, point.state)

    def _load_state(self, trainer: Phi3VTrainer, state: dict[str, Any]) -> None:
        """What a checkpoint holds beside weights, optimizer and random numbers."""
        trainer.counts = list(state["counts"])
        trainer.skipped = [tuple(entry) for entry in state["skipped"]]
        trainer.restore_loop(state["loop"])
        self.progress.load_state(state["progress"])
        if self.during is not None and state["evaluation"] is not None:
            self.during.load_state(state["evaluation"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wanted = self.config.checkpoint
        since = time.monotonic() - self._last
        is_late = wanted.save_minutes is not None and since >= 60 * wanted.save_minutes
        mine = self.signals.received
        # The clock is rank 0's, and a signal to one rank is a signal to all.
        late, worth_it, signalled = self.collectives.sum(
            [self.rank == 0 and is_late, self.rank == 0 and since >= WORTH_SAVING, mine is not None]
        )
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if signalled:
            names = [name for name in self.collectives.all_gather(mine.name if mine is not None else None) if name]
            self.stopped_by = names[0]
            control.should_training_stop = True
        if wanted.save_steps is not None:
            is_due = state.global_step % wanted.save_steps == 0 or is_last
        else:
            is_due = is_last and worth_it > 0
        if is_due or late or signalled:
            control.should_save = True

    def save(self, trainer: Phi3VTrainer) -> None:
        """Save a checkpoint of the step that has just ended; a collective."""
        self.wait()
        started = time.monotonic()
        self._last = started
        step = self.last_step = trainer.state.global_step
        tensors = self.engine.full_state_dict(self.model)
        randoms = self.collectives.all_gather(random_state())
        state = self._state(trainer)
        unfinished = self.folder / f".{checkpoint_name(step)}.new"
        obstacle, needed = None, 0
        if self.rank == 0:
            assert tensors is not None
            needed = self._needed(tensors)
            obstacle = self._obstacle(needed)
        obstacle, needed = self.collectives.broadcast((obstacle, needed))
        if obstacle is not None:
            self._report_failure(step, obstacle)
            return
        # On a CPU the copy lies beside what it is of, for nothing if no step follows.
        is_last = trainer.state.global_step >= trainer.state.max_steps or trainer.control.should_training_stop
        in_thread = not (is_last and trainer.args.device.type == "cpu") and self._may_wait_for_thread(needed)
        try:
            if self.rank == 0:
                unfinished_folder(self.folder, step)
                if self.during is not None and self.during.best_folder.is_dir():
                    link_tree(self.during.best_folder, unfinished / "best")
                if self.progress.metrics_file.is_file():
                    shutil.copyfile(self.progress.metrics_file, unfinished / "metrics.jsonl")
        except OSError as error:
            obstacle = failure_text(error)
        obstacle = self.collectives.broadcast(obstacle)
        if obstacle is not None:
            self._report_failure(step, obstacle)
            return
        rest = self.engine.save_optimizer(trainer, unfinished / "optimizer", copy=in_thread)
        if tensors is None:
            return
        if in_thread:
            tensors = to_host(tensors)

        def write() -> None:
            self._write(unfinished, tensors, rest, state, randoms, started)

        if in_thread:
            self._thread = threading.Thread(target=self._guarded, args=(write,), name="checkpoint")
            self._thread.start()
        else:
            write()

    def wait(self) -> None:
        """Until no save is in flight.

        Raises:
            IncompleteSaveError: the one that was held other weights than were trained.
        """
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """As `wait`, without a word about how it went: another error is on its way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def newest(self) -> str:
        """The newest checkpoint, in words."""
        saved = checkpoints(self.folder)
        return f"the newest checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"

    def _write(
        self,
        unfinished: Path,
        tensors: dict[str, torch.Tensor],
        rest: DeferredWrite,
        state: dict[str, Any],
        randoms: list[dict[str, Any]],
        started: float,
    ) -> None:
        try:
            save_final(self._skeleton, self.processor, unfinished / "model", tensors)
            rest()
            write_state(unfinished, state, randoms)
            folder = publish(unfinished)
            remove_older(self.folder, self.config.checkpoint.keep_last)
        except IncompleteSaveError:
            raise
        except WRITE_ERRORS as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            self._report_failure(state["step"], failure_text(error))
            return
        self.last_failure = None
        took = time.monotonic() - started
        logger.info("saved %s in %.2f s", folder, took)
        self.console.print(f"saved {folder.name} ({took:.1f} s)", highlight=False)

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # raised again by whoever waits
            self._error = error

    def _report_failure(self, step: int, why: str) -> None:
        self.failed += 1
        self.last_failure = why
        if self.rank == 0:
            text = f"checkpoint of step {step} not saved: {why}; {self.newest()}, and training goes on"
            logger.error("%s", text)
            self.console.print(text, style="bold red", highlight=False, markup=False, soft_wrap=True)

    def _needed(self, tensors: dict[str, torch.Tensor]) -> int:
        """Bytes of a checkpoint: as the last one, or weights and moments if there is none."""
        for folder in checkpoints(self.folder)[:1]:
            return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return tensor_bytes(tensors) + trained * moment_bytes(self.config.training)

    def _obstacle(self, needed: int) -> str | None:
        free = free_space(self.folder)
        if free >= needed:
            return None
        return f"it takes {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free in {self.folder.resolve()}"

    def _may_wait_for_thread(self, needed: int) -> bool:
        """Whether to copy and go on; a copy that does not fit into memory would end the run."""
        if not (self.config.checkpoint.asynchronous and self.engine.asynchronous):
            return False
        return needed < MEMORY_SHARE * psutil.virtual_memory().available

    def _state(self, trainer: Phi3VTrainer) -> dict[str, Any]:
        state = trainer.state
        return {
            "step": state.global_step,
            "epoch": state.epoch,
            "max_steps": state.max_steps,
            "steps_per_epoch": trainer.steps_per_epoch,
            "world_size": self.collectives.world_size,
            "engine": self.engine.name,
            "config": dataclasses.asdict(self.config),
            "data": self._contents,
            "counts": trainer.counts,
            "skipped": trainer.skipped,
            "loop": trainer.loop_state(self.collectives),
            "evaluation": self.during.state() if self.during is not None else None,
            "progress": self.progress.state(),
            "versions": environment()["versions"],
        }
