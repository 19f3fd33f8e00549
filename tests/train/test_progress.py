"""The progress bar of a terminal and the lines of a log file."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from phi3v.train.observers.progress import ProgressObserver
from phi3v.train.state import TrainState


def run(observer: ProgressObserver, loss: float = 1.25) -> None:
    """What the loop does to an observer in a run of two steps."""
    state = TrainState(steps_per_epoch=10, max_steps=2, counts=[8.0, 8.0, 80.0, 4000.0])
    observer.on_begin(state)
    for state.step in (1, 2):
        observer.on_log(state, {"loss": loss, "grad_norm": 2.0, "learning_rate": 1e-3})
        observer.on_step(state)
    observer.close()


@pytest.mark.parametrize(("terminal", "show_bar"), [(True, True), (True, False), (False, True)])
def test_it_shows_loss_rates_memory_and_time_left(tmp_path: Path, terminal: bool, show_bar: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160)
    run(ProgressObserver(console, tmp_path / "metrics.jsonl", rank=0, show_bar=show_bar))
    shown = out.getvalue()
    for words in ("loss 1.25", "samples/s", "tokens/s", "GB", "left", "2/2"):
        assert words in shown
    # A terminal gets its cursor back; a log file, or one who wants no bar, gets no control characters.
    has_bar = terminal and show_bar
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == int(has_bar)
    assert ("\x1b" in shown) == has_bar


def test_preferences_are_on_the_line(tmp_path: Path) -> None:
    out = io.StringIO()
    observer = ProgressObserver(Console(file=out), tmp_path / "metrics.jsonl", rank=0)
    state = TrainState(steps_per_epoch=10, max_steps=2, counts=[8.0, 8.0, 80.0, 4000.0])
    values = {"rewards/chosen": 0.5, "rewards/rejected": -1.25, "rewards/margins": 1.75, "rewards/accuracies": 0.75}
    observer.on_begin(state)
    observer.on_log(state, {"loss": 0.5, "kl": 0.1, "tokens/chosen": 4.0, **values})
    observer.close()
    said = "margin +1.750  prefers chosen 75%  KL 0.100  reward of chosen +0.500  of rejected -1.250"
    assert said in out.getvalue()


def test_metrics_are_json_whatever_the_loss(tmp_path: Path) -> None:
    run(ProgressObserver(Console(file=io.StringIO()), tmp_path / "metrics.jsonl", rank=0), loss=float("nan"))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] is None
    assert lines[0]["tokens"] == 4000
