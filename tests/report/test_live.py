"""The report that a run writes by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_helpers import block

from phi3v.cli import main
from phi3v.report import live
from phi3v.report.live import LiveReport
from phi3v.train.state import TrainState


def arguments(model: Path, data: Path, folder: Path, **settings: Any) -> list[str]:
    values: dict[str, Any] = {
        "model.path": model,
        "data.train": data / "train.jsonl",
        "data.eval": data / "test.jsonl",
        "training.output_dir": folder,
        "training.max_steps": 2,
        "training.batch_size": 2,
        "training.micro_batch_size": 2,
        "training.logging_steps": 1,
        "evaluation.max_questions": 4,
        "evaluation.max_new_tokens": 4,
    }
    return ["train", *(part for name, value in (values | settings).items() for part in (f"--{name}", str(value)))]


def test_a_run_refreshes_its_report_and_ends_with_the_whole(
    small_model_dir: Path, easy_vqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    refreshed: list[tuple[str, list[float]]] = []
    write_report = live.write_report

    def seen(runs: Any, out: Path) -> int:
        size = write_report(runs, out)
        [held] = block(out, "runs")["runs"]
        refreshed.append((held["status"], held["curves"]["steps"]))
        if len(refreshed) == 2:
            raise RuntimeError("the disk is full")
        return size

    monkeypatch.setattr(live, "write_report", seen)
    monkeypatch.setattr(live, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(live, "REST", 0.0)
    assert main(arguments(small_model_dir, easy_vqa, folder)) == 0
    assert refreshed[:2] == [("running", [1.0]), ("running", [1.0, 2.0])]
    assert "the report could not be refreshed" in (folder / "log.txt").read_text()
    [held] = block(folder / "report.html", "runs")["runs"]
    assert (held["status"], held["missing"], held["result"]["steps"]) == ("finished", [], 2)
    predictions = block(folder / "report.html", "predictions")
    assert len(predictions["galleries"][0]["ids"]) == 4
    assert predictions["thumbnails"][0]
    # A run that is refused leaves an earlier one's report alone.
    written = (folder / "report.html").read_bytes()
    assert main(arguments(small_model_dir, easy_vqa, folder)) == 2
    assert (folder / "report.html").read_bytes() == written


def test_refreshes_rest_a_hundred_times_as_long_as_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def slow(*given: Any, **more: Any) -> Any:
        nonlocal now
        now += 2.0
        raise OSError("no space")

    monkeypatch.setattr(live.time, "perf_counter", lambda: now)
    monkeypatch.setattr(live, "read_run", slow)
    report = LiveReport(tmp_path)
    report.on_step(TrainState(steps_per_epoch=1, max_steps=1))
    assert report.refreshes == 0  # not begun
    report.started = True
    for _ in range(300):
        report.on_step(TrainState(steps_per_epoch=1, max_steps=1))
        now += 1.0
    assert report.refreshes == 2
    assert report.seconds == 4.0
