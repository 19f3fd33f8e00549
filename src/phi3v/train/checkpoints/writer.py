"""When a checkpoint is saved and how; and ending a run by a signal, on all ranks at the same step."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from phi3v.paths import free_space
from phi3v.train.checkpoint_folder import (
    checkpoint_name,
    checkpoints,
    link_tree,
    newest_checkpoint,
    publish,
    remove_older,
    tensor_bytes,
    unfinished_folder,
    write_state,
)
from phi3v.train.checkpoints.random_state import random_state
from phi3v.train.device import library_versions
from phi3v.train.engines import DeferredWrite, to_host
from phi3v.train.engines.sharded import without_weights
from phi3v.train.methods.optimizers import moment_bytes
from phi3v.train.methods.weights import WRITE_ERRORS, IncompleteSaveError, failure_text, save_final
from phi3v.train.observers.evaluation import EvaluationObserver
from phi3v.train.observers.faults import StepFaults
from phi3v.train.observers.progress import ProgressObserver
from phi3v.train.observers.signals import Signals
from phi3v.train.prepare import PreparedRun
from phi3v.train.state import Observer, TrainState

logger = logging.getLogger("phi3v")

# At the end of training a checkpoint is saved if that much would have to be trained again without it.
WORTH_SAVING = 60.0
# Of free memory that a copy of what is saved may take.
MEMORY_SHARE = 0.8


class Checkpointer(Observer):
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
        run: PreparedRun,
        signals: Signals,
        progress: ProgressObserver,
        during: EvaluationObserver | None,
        faults: StepFaults,
    ) -> None:
        self.run = run
        self.config = run.config
        self.engine = run.engine
        self.collectives = run.collectives
        self.signals = signals
        self._skeleton = without_weights(run.model)  # for the thread that writes: it may touch nothing that trains
        self.rank = run.runtime.rank
        self.folder = run.folder
        self.console = run.console
        self.progress = progress
        self.during = during
        self.faults = faults
        self.stopped_by: str | None = None
        self.failed = 0
        self.last_failure: str | None = None
        self.last_step = -1
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def on_begin(self, state: TrainState) -> None:
        self._last = time.monotonic()

    def on_step(self, state: TrainState) -> None:
        wanted = self.config.checkpoint
        since = time.monotonic() - self._last
        is_late = wanted.save_minutes is not None and since >= 60 * wanted.save_minutes
        mine = self.signals.received
        # The clock is rank 0's, and a signal to one rank is a signal to all.
        late, worth_it, signalled = self.collectives.sum(
            [self.rank == 0 and is_late, self.rank == 0 and since >= WORTH_SAVING, mine is not None]
        )
        if wanted.save_steps is not None:
            is_due = state.step % wanted.save_steps == 0 or state.is_last
        else:
            is_due = state.is_last and worth_it > 0
        if signalled:
            names = [name for name in self.collectives.all_gather(mine.name if mine is not None else None) if name]
            self.stopped_by = names[0]
            state.should_stop = True
        if is_due or late or signalled:
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Save a checkpoint of the step that has just ended, if it is not saved; a collective.

        Not within a row of steps that were dropped: a resumed run would not count them.
        """
        self.faults.settle()
        if self.faults.in_a_row or state.step in (0, self.last_step):
            return
        self.wait()
        started = time.monotonic()
        self._last = started
        step = self.last_step = state.step
        tensors = self.engine.full_state_dict()
        randoms = self.collectives.all_gather(random_state())
        facts = self._facts(state)
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
        in_thread = not (state.is_last and state.loss.device.type == "cpu") and self._may_wait_for_thread(needed)
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
        rest = self.engine.save_optimizer(unfinished / "optimizer", copy=in_thread)
        if tensors is None:
            return
        if in_thread:
            tensors = to_host(tensors)

        def write() -> None:
            self._write(unfinished, tensors, rest, facts, randoms, started)

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

    def _write(
        self,
        unfinished: Path,
        tensors: dict[str, torch.Tensor],
        rest: DeferredWrite,
        facts: dict[str, Any],
        randoms: list[dict[str, Any]],
        started: float,
    ) -> None:
        try:
            save_final(self._skeleton, self.run.processor, unfinished / "model", tensors)
            rest()
            write_state(unfinished, facts, randoms)
            folder = publish(unfinished)
            remove_older(self.folder, self.config.checkpoint.keep_last)
        except IncompleteSaveError:
            raise
        except WRITE_ERRORS as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            self._report_failure(facts["step"], failure_text(error))
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
            text = f"checkpoint of step {step} not saved: {why}; {newest_checkpoint(self.folder)}, and training goes on"
            logger.error("%s", text)
            self.console.print(text, style="bold red", highlight=False, markup=False, soft_wrap=True)

    def _needed(self, tensors: dict[str, torch.Tensor]) -> int:
        """Bytes of a checkpoint: as the last one, or weights and moments if there is none."""
        for folder in checkpoints(self.folder)[:1]:
            return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        trained = sum(p.numel() for p in self.engine.model.parameters() if p.requires_grad)
        return tensor_bytes(tensors) + trained * moment_bytes(self.config.training)

    def _obstacle(self, needed: int) -> str | None:
        free = free_space(self.folder)
        if free >= needed:
            return None
        return f"it takes {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free in {self.folder.resolve()}"

    def _may_wait_for_thread(self, needed: int) -> bool:
        """Whether to copy and go on; a copy that does not fit into memory would end the run."""
        if not self.config.checkpoint.asynchronous:
            return False
        return needed < MEMORY_SHARE * psutil.virtual_memory().available

    def _facts(self, state: TrainState) -> dict[str, Any]:
        return {
            **state.to_json(self.collectives),
            "engine": self.engine.name,
            "config": dataclasses.asdict(self.config),
            "evaluation": self.during.state() if self.during is not None else None,
            "progress": self.progress.state(),
            "data": self.run.contents,
            "versions": library_versions(),
        }
