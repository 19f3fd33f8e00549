"""When a checkpoint is saved and how; and ending a run by a signal, on all ranks at the same step."""

from __future__ import annotations

import dataclasses
import functools
import logging
import secrets
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
    link_tree,
    newest_checkpoint,
    publish,
    remove_older,
    unfinished_folder,
    write_state,
)
from phi3v.train.checkpoints.formats import CheckpointFormat, Known
from phi3v.train.checkpoints.random_state import random_state
from phi3v.train.device import library_versions
from phi3v.train.methods.weights import WRITE_ERRORS, IncompleteSaveError, failure_text
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
        form: CheckpointFormat,
    ) -> None:
        self.run = run
        self.config = run.config
        self.engine = run.engine
        self.collectives = run.collectives
        self.signals = signals
        self.format = form
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
        self.format.take()
        randoms = self.collectives.all_gather(random_state())
        facts = self._facts(state)
        obstacle = self._obstacle(self.format.disk_bytes()) if self.rank == 0 else None
        obstacle, attempt = self.collectives.broadcast((obstacle, secrets.token_hex(4)))
        if obstacle is not None:
            self._report_failure(step, obstacle)
            return
        # On a CPU the copy lies beside what it is of, for nothing if no step follows.
        in_thread = self._may_copy() and not (state.is_last and state.loss.device.type == "cpu")
        unfinished = unfinished_folder(self.folder, step, attempt)
        try:
            if self.rank == 0:
                self._begin(unfinished)
        except OSError as error:
            obstacle = failure_text(error)
        obstacle = self.collectives.broadcast(obstacle)
        if obstacle is not None:
            self._report_failure(step, obstacle)
            return
        rest = self.format.stage(unfinished, copy=in_thread)
        if rest is None:
            return
        write = functools.partial(self._write, unfinished, rest, facts, randoms, started)
        if in_thread:
            self._thread = threading.Thread(target=self._guarded, args=(write,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            write()

    def _begin(self, unfinished: Path) -> None:
        """Make the folder, with what is there already."""
        (unfinished / self.format.subfolder).mkdir(parents=True)
        if self.during is not None and self.during.best_folder.is_dir():
            link_tree(self.during.best_folder, unfinished / "best")
        if self.progress.metrics_file.is_file():
            shutil.copyfile(self.progress.metrics_file, unfinished / "metrics.jsonl")

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

    def abandon(self) -> None:
        """Wait for no save of several ranks, one of which is lost: others may wait for this process to end."""
        if self.format.collectives is not None:
            self._thread = None

    def _write(
        self,
        unfinished: Path,
        rest: Callable[[], Known],
        facts: dict[str, Any],
        randoms: list[dict[str, Any]],
        started: float,
    ) -> None:
        why: str | None = None
        try:
            known = rest()
            if self.rank == 0:
                write_state(unfinished, facts, randoms)
                publish(unfinished, known)
        except IncompleteSaveError:
            raise
        except WRITE_ERRORS as error:
            why = failure_text(error)
        if self.format.collectives is not None:  # whether it has its name is for rank 0 to say
            why = self.format.collectives.broadcast(why)
        if why is not None:
            if self.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            self._report_failure(facts["step"], why)
            return
        self.last_failure = None
        if self.rank == 0:
            took = time.monotonic() - started
            name = checkpoint_name(facts["step"])
            logger.info("saved %s in %.2f s", self.folder / name, took)
            self.console.print(f"saved {name} ({took:.1f} s)", highlight=False)
            try:
                remove_older(self.folder, self.config.checkpoint.keep_last)
            except OSError as error:  # this one is saved all the same, and the next save tries again
                logger.warning("older checkpoints could not be removed: %s", error)

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            device = self.run.runtime.device
            if device.type == "cuda":  # a new thread's is the first, where DCP would make a context of this rank
                torch.cuda.set_device(device)
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

    def _obstacle(self, needed: int) -> str | None:
        free = free_space(self.folder)
        if free >= needed:
            return None
        return f"it takes {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free in {self.folder.resolve()}"

    def _may_copy(self) -> bool:
        """Whether to copy and go on; a copy that does not fit into a rank's memory would end the run."""
        if not self.config.checkpoint.asynchronous:
            return False
        tight = self.format.memory_bytes() >= MEMORY_SHARE * psutil.virtual_memory().available
        return not self.collectives.sum([tight])[0]

    def _facts(self, state: TrainState) -> dict[str, Any]:
        return {
            **state.to_json(self.collectives),
            "engine": self.engine.name,
            "config": dataclasses.asdict(self.config),
            "evaluation": self.during.state() if self.during is not None else None,
            "progress": self.progress.state(),
            "data": self.run.contents,
            "versions": library_versions(),
            **self.format.facts(),
        }
