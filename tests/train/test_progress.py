"""The progress bar of a terminal and the lines of a log file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from phi3v.train.observers.progress import ProgressCallback


def run(callback: ProgressCallback, loss: float = 1.25) -> None:
    """What the trainer does to a callback in a run of two steps."""
    callback.trainer = SimpleNamespace(seen={"samples": 8, "questions": 80, "tokens": 4000})  # type: ignore[assignment]
    args = SimpleNamespace(world_size=1)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=2, global_step=0, epoch=0.0)
    callback.on_train_begin(args, state, None)
    for step in (1, 2):
        state.global_step, state.epoch = step, step / 10
        callback.on_step_end(args, state, None)
        callback.on_log(args, state, None, logs={"loss": loss, "grad_norm": 2.0, "learning_rate": 1e-3})
    callback.close()


@pytest.mark.parametrize(("terminal", "show_bar"), [(True, True), (True, False), (False, True)])
def test_it_shows_loss_rates_memory_and_time_left(tmp_path: Path, terminal: bool, show_bar: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160)
    run(ProgressCallback(console, tmp_path / "metrics.jsonl", show_bar=show_bar))
    shown = out.getvalue()
    for words in ("loss 1.25", "samples/s", "tokens/s", "GB", "left", "2/2"):
        assert words in shown
    # A terminal gets its cursor back; a log file, or one who wants no bar, gets no control characters.
    has_bar = terminal and show_bar
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == int(has_bar)
    assert ("\x1b" in shown) == has_bar


def test_metrics_are_json_whatever_the_loss(tmp_path: Path) -> None:
    run(ProgressCallback(Console(file=io.StringIO()), tmp_path / "metrics.jsonl"), loss=float("nan"))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] is None
    assert lines[0]["tokens"] == 4000
