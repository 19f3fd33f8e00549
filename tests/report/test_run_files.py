"""Run folders: whole, unfinished, resumed, damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from phi3v.errors import UserError
from phi3v.report.run_files import MAX_POINTS, read_run
from report_page import make_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", questions=20, pictures=4, steps=20)


def write_metrics(folder: Path, lines: list[dict[str, object]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_a_finished_run_is_read_whole(folder: Path) -> None:
    run = read_run(folder)
    assert (run.name, run.status, run.missing) == ("run", "finished", [])
    assert run.curves.steps == list(range(1, 21))
    assert set(run.curves.values) >= {"loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gb"}
    assert [measured["step"] for measured in run.curves.evaluations] == [5, 10, 15, 20]
    assert set(run.evaluations) == set(run.predictions) == {"before", "after"}
    assert run.result["steps"] == 20
    assert run.setting("training", "output_dir") == str(folder)


def test_an_unfinished_run_says_what_is_missing(folder: Path) -> None:
    for name in ("eval_after.json", "predictions_after.jsonl", "log.txt"):
        (folder / name).unlink()
    (folder / "final").rmdir()
    run = read_run(folder)
    assert run.status == "unfinished"
    assert any("log.txt is missing" in note for note in run.missing)
    assert any("eval_after.json is missing" in note for note in run.missing)
    assert set(run.predictions) == {"before"}


def test_damaged_files_cost_what_they_hold_and_nothing_else(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: [", encoding="utf-8")
    (folder / "eval_before.json").write_text('{"scores": ', encoding="utf-8")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 21, "lo\n[1]\n\xff\xfe\n{"loss": 1}\n{"step": "x"}\n')
    (folder / "environment.json").write_text("[" * 100_000, encoding="utf-8")
    run = read_run(folder)
    assert run.curves.steps == list(range(1, 21))
    notes = " | ".join(run.missing)
    for part in ("config.yaml is damaged", "eval_before.json is damaged", "3 damaged lines", "environment.json is dam"):
        assert part in notes
    assert set(run.evaluations) == {"after"}


def test_steps_done_again_after_a_resume_count_once(folder: Path) -> None:
    first = [{"step": step, "loss": 1.0, "seconds": step * 2.0} for step in range(1, 9)]
    score = {"accuracy": {"value": 0.5}}
    again = [{"step": step, "loss": 2.0, "seconds": (step - 5) * 2.0} for step in range(6, 11)]
    write_metrics(folder, [*first, {"step": 8, "eval": score}, *again, {"step": 10, "eval": score}])
    curves = read_run(folder).curves
    assert curves.steps == list(range(1, 11))
    assert curves.values["loss"] == [1.0] * 5 + [2.0] * 5
    assert curves.seconds == [step * 2.0 for step in range(1, 11)]
    assert curves.resumed == [5]
    assert [measured["step"] for measured in curves.evaluations] == [10]


def test_a_resume_whose_clock_goes_on_keeps_it(folder: Path) -> None:
    write_metrics(folder, [{"step": step, "loss": 1.0, "seconds": float(step)} for step in (1, 2, 3)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.5, "seconds": 9.0}\n')
    curves = read_run(folder).curves
    assert (curves.steps, curves.seconds) == ([1, 2, 3], [1.0, 2.0, 9.0])


def test_long_curves_are_averaged_and_numbers_that_are_none_left_out(folder: Path) -> None:
    count = 2 * MAX_POINTS + 10
    lines = [{"step": step, "loss": float(step % 3), "grad_norm": None, "seconds": 1.0 * step} for step in range(count)]
    write_metrics(folder, lines)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {count}, "loss": NaN, "seconds": 1e9}}\n')
    curves = read_run(folder).curves
    assert curves.averaged == 3
    assert len(curves.steps) <= MAX_POINTS
    assert "grad_norm" not in curves.values
    assert all(value is None or math.isfinite(value) for value in curves.values["loss"])
    assert curves.values["loss"][0] == pytest.approx(1.0)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing to report"):
        read_run(tmp_path)
