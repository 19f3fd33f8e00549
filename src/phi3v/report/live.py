"""The report of a run: refreshed while it trains, complete at its end, and never in its way."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import TracebackType

from accelerate import PartialState
from rich.console import Console

from phi3v.config import RunConfig
from phi3v.plan.forecast import forecast
from phi3v.report.report import REPORT_FILE, report, write_report
from phi3v.report.run_files import read_run
from phi3v.terminal import say
from phi3v.train.checkpoints.resume import FinishedRun
from phi3v.train.result import RunResult
from phi3v.train.run import run_training
from phi3v.train.state import Observer, TrainState

logger = logging.getLogger("phi3v")

SECONDS_BETWEEN = 30.0
# A refresh waits at least so many times as long as the last one took: at most 1 % of the time goes into them.
REST = 100.0


class LiveReport(Observer):
    """Writes ``report.html`` after steps, now and then, without the predictions, and at the end with them.

    A context manager around training: leaving it writes the last report, however training ended. What goes wrong here
    is logged and never raised.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = False  # the folder is this run's, not an earlier one's
        self.refreshes = 0
        self.seconds = 0.0  # spent on refreshing
        self._next = 0.0

    def on_begin(self, state: TrainState) -> None:
        self.started = PartialState().is_main_process

    def on_step(self, state: TrainState) -> None:
        start = time.perf_counter()
        if not self.started or start < self._next:
            return
        try:
            run = read_run(self.folder, with_predictions=False)
            run.status = "running"
            run.missing = [note for note in run.missing if "predictions" not in note and "eval_after" not in note]
            write_report([run], self.folder / REPORT_FILE)
        except Exception:
            logger.warning("the report could not be refreshed", exc_info=True)
        took = time.perf_counter() - start
        self.refreshes += 1
        self.seconds += took
        self._next = time.perf_counter() + max(SECONDS_BETWEEN, REST * took)

    def __enter__(self) -> LiveReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.started:
            return
        try:
            report([self.folder])
        except Exception:
            logger.warning("the report could not be written", exc_info=True)


def train_with_report(config: RunConfig, console: Console, resume: str | None = None) -> RunResult | FinishedRun:
    """`run_training`, with its report in the run folder."""
    live = LiveReport(Path(config.training.output_dir))
    with live:
        result = run_training(config, console, resume, observers=[live], forecast=forecast)
    written = live.folder / REPORT_FILE
    if live.started and written.is_file():
        say(console, f"report: {written}")
    return result
