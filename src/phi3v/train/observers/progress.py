"""What a person sees while it trains, and the lines of ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from phi3v.terminal import progress_bar
from phi3v.train.state import Observer, TrainState


def peak_memory_gb() -> float:
    """Highest memory so far in GB (10**9 bytes): the allocator's on a GPU, the process's on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9  # needs a card: its allocator counts
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


class ProgressObserver(Observer):
    """A progress bar on a terminal, plain lines elsewhere, and a line of ``metrics.jsonl`` a logging step; on rank 0.

    Args:
        console: where they are shown.
        metrics_file: ``metrics.jsonl`` of the run.
        show_bar: false for plain lines on a terminal too.
    """

    def __init__(self, console: Console, metrics_file: Path, *, rank: int, show_bar: bool = True) -> None:
        self.console = console
        self.metrics_file = metrics_file
        self.rank = rank
        self.bar = progress_bar(console, enabled=show_bar)
        self.task: Any = None
        self.start = self.last = 0.0
        self.counted: dict[str, int] = {}

    def on_begin(self, state: TrainState) -> None:
        self.start = self.last = time.perf_counter()
        if self.rank == 0:
            self.bar.start()
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.step, extra="")

    def on_step(self, state: TrainState) -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=state.step)

    def on_log(self, state: TrainState, values: dict[str, float]) -> None:
        if self.rank > 0:
            return
        now = time.perf_counter()
        seen = state.seen
        rates = {
            f"{name}_per_second": round((count - self.counted.get(name, 0)) / max(now - self.last, 1e-9), 2)
            for name, count in seen.items()
        }
        line = {
            "step": state.step,
            "epoch": round(state.epoch, 4),
            **values,
            **seen,
            **rates,
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "seconds": round(now - self.start, 2),
        }
        self.counted, self.last = seen, now
        # JSON has no infinity; fp16's first steps have gradients that do.
        self.write({key: value if math.isfinite(value) else None for key, value in line.items()})
        text = (
            f"loss {values['loss']:.4f}  {rates['samples_per_second']:.1f} samples/s  "
            f"{rates['tokens_per_second']:,.0f} tokens/s  {line['peak_memory_gb']:.2f} GB"
        )
        shown = (
            ("rewards/margins", "margin", "+.3f"),
            ("rewards/accuracies", "prefers chosen", ".0%"),
            ("kl", "KL", ".3f"),
            ("rewards/chosen", "reward of chosen", "+.3f"),  # last: a narrow terminal cuts the line
            ("rewards/rejected", "of rejected", "+.3f"),
        )
        text += "".join(f"  {label} {values[name]:{how}}" for name, label, how in shown if name in values)
        if not self.bar.disable:
            self.bar.update(self.task, extra=text)
        else:
            left = (now - self.start) / max(state.step, 1) * (state.max_steps - state.step)
            said = f"step {state.step}/{state.max_steps}  {text}  {left:.0f} s left"
            self.console.print(said, highlight=False, soft_wrap=True)

    def write(self, line: dict[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``; where that fails, as on a full disk, say so and let training go on."""
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            text = f"step {line['step']} is missing in {self.metrics_file}: {error.strerror}; training goes on"
            self.console.print(text, style="bold red", highlight=False, markup=False, soft_wrap=True)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs for its counts and times to go on."""
        now = time.perf_counter()
        return {"counted": self.counted, "seconds": now - self.start, "since_last": now - self.last}

    def on_resume(self, saved: dict[str, Any]) -> None:
        now, state = time.perf_counter(), saved["progress"]
        self.counted, self.start, self.last = state["counted"], now - state["seconds"], now - state["since_last"]

    @property
    def seconds(self) -> float:
        """Time spent on training so far, over all parts of a run that was resumed."""
        return time.perf_counter() - self.start

    def leave_out(self, seconds: float) -> None:
        """Do not count time that went into something else than training."""
        self.start += seconds
        self.last += seconds

    def close(self) -> None:
        """Give the terminal back, however training ended."""
        if self.task is not None:
            self.bar.stop()
