"""The first minutes on a GPU, without one: what goes wrong in a stage stays there, and nothing is measured twice."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks  # noqa: F401 - its server has imported what the stages need

import gpu_first
import gpu_table
from gpu_first import Process, Start, begin, measure, not_run, run_stage
from gpu_stages import BY_NAME, STAGES, NotThereError, Place, Stage, end_with, run_parts

ROOT = Path(__file__).parents[2]


class Forked:
    """A process of this test's own, which has imported everything."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if found else None
        return self.code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code


def forking(place: Place) -> Start:
    def start(stage: Stage, parts: Sequence[str], events: Path, log: Path) -> Process:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                with log.open("wb") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                threading.Thread(target=end_with, args=(parent,), daemon=True).start()
                run_parts(stage, list(parts), place, events)
                code = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)
        with contextlib.suppress(PermissionError):  # it has done so itself
            os.setpgid(pid, pid)
        return Forked(pid)

    return start


class Served:
    """A process from the server that `ranks` forks from, which has no thread of this one."""

    def __init__(self, stage: str, parts: Sequence[str], place: Place, events: Path, log: Path) -> None:
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_serve, args=(stage, list(parts), place, events, log), daemon=True
        )
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


def _serve(stage: str, parts: list[str], place: Place, events: Path, log: Path) -> None:
    os.setpgid(0, 0)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run_parts(BY_NAME[stage], parts, place, events)


def parts_of(stage: Stage, place: Place, seconds: float, earlier: Any = None) -> dict[str, Any]:
    told: list[str] = []
    entry = run_stage(stage, seconds, forking(place), lambda entry: told.append(entry["status"]), earlier or {})
    assert len(told) >= len([name for name in stage.parts if (earlier or {}).get(name, {}).get("status") != "done"])
    parts: dict[str, Any] = entry["parts"]
    return parts


def fine(_place: Place) -> dict[str, Any]:
    return {"figure": 1}


def absent(_place: Place) -> dict[str, Any]:
    raise NotThereError("nothing is not installed")


def crash(_place: Place) -> dict[str, Any]:
    os.write(1, b"about to crash\n")
    os.kill(os.getpid(), signal.SIGKILL)


def wrong(_place: Place) -> dict[str, Any]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def hang(_place: Place) -> dict[str, Any]:
    os.write(1, b"waiting\n")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


def babble(place: Place) -> dict[str, Any]:
    os.write(1, b"\xff\x00{]\x1b[31mno json\n" * 3)
    (events,) = place.folder.glob("*/events.jsonl")
    with events.open("ab") as file:
        file.write(b"\xff{]\nnull\n[1]\n")
    os._exit(0)


def test_what_goes_wrong_in_a_part_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    parts = {"a": fine, "b": crash, "c": wrong, "d": absent, "e": babble, "f": fine}
    found = parts_of(Stage("stage", "", 1, parts), Place("tiny", tmp_path), 60)
    assert {name: part["status"] for name, part in found.items()} == {
        "a": "done",
        "b": "failed",
        "c": "failed",
        "d": "not there",
        "e": "failed",
        "f": "done",
    }
    assert found["f"]["figures"] == {"figure": 1}
    assert "about to crash" in found["b"]["last_lines"]
    assert found["b"]["reason"] == f"its process ended with {-signal.SIGKILL}"
    assert found["c"]["last_lines"][-1] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert found["d"]["reason"] == "nothing is not installed"
    assert "no json" in found["e"]["last_lines"][-1]
    json.dumps(found)


def test_a_part_that_hangs_leaves_time_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets two thirds of three seconds, and ignores SIGTERM."""
    monkeypatch.setattr(gpu_first, "PATIENCE", 0.1)
    found = parts_of(Stage("stage", "", 1, {"a": hang, "b": hang, "c": fine}), Place("tiny", tmp_path), 3)
    assert [part["status"] for part in found.values()] in (
        ["timed out", "timed out", "no time left"],
        ["timed out", "no time left", "no time left"],
    )
    assert found["a"]["last_lines"] == ["waiting"]
    assert found["a"]["seconds"] <= 3


def test_what_was_settled_is_not_done_again(tmp_path: Path) -> None:
    earlier = {"a": {"status": "done", "figures": {"figure": 7}}, "b": {"status": "failed"}}
    found = parts_of(Stage("stage", "", 1, {"a": crash, "b": fine}), Place("tiny", tmp_path), 60, earlier)
    assert found["a"] == earlier["a"]
    assert found["b"]["figures"] == {"figure": 1}


def test_a_killed_run_is_gone_on_with(tmp_path: Path) -> None:
    """By SIGKILL within a stage, whose own process ends too; what was done before is kept."""
    out, mark = tmp_path / "result.json", tmp_path / "pid"

    def tell_and_hang(place: Place) -> dict[str, Any]:
        if (place.folder / "again").exists():
            return {"figure": 2}
        mark.write_text(str(os.getpid()))
        return hang(place)

    stages = [Stage("first", "", 1, {"a": fine}), Stage("second", "", 1, {"b": fine, "c": tell_and_hang})]
    empty: Any = {"stages": {stage.name: not_run(stage) for stage in stages}}
    pid = os.fork()
    if pid == 0:
        measure(empty, stages, 60, forking(Place("tiny", tmp_path)), out)
        os._exit(0)
    until = time.monotonic() + 30
    while not (mark.is_file() and mark.read_text() and '"b": {\n          "status": "done"' in out.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    child = int(mark.read_text())
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.05)
    held = json.loads(out.read_text())
    assert held["stages"]["first"]["status"] == "done"
    assert held["stages"]["second"]["parts"]["b"]["status"] == "done"
    assert held["stages"]["second"]["parts"]["c"] == {"status": "not run"}
    dates = held["stages"]["first"]["parts"]["a"]

    (tmp_path / "again").touch()
    measure(held, stages, 60, forking(Place("tiny", tmp_path)), out)
    assert held == json.loads(out.read_text())
    assert held["stages"]["second"]["parts"]["c"]["figures"] == {"figure": 2}
    assert held["stages"]["first"]["parts"]["a"] == dates


def test_another_machine_begins_anew(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    facts = dict.fromkeys(gpu_first.IDENTITY, "this") | {"date": "today"}
    about = {"is_rehearsal": False, "model": "m", "minutes": 12}
    result = begin(out, facts, about, resume=False)
    assert {stage["status"] for stage in result["stages"].values()} == {"not run"}
    result["stages"]["lora"]["status"] = "done"
    gpu_first.write(result, out)
    assert begin(out, facts, about | {"minutes": 5}, resume=True)["stages"]["lora"]["status"] == "done"
    for other in ({"driver": "another"}, {"versions": {"torch": "3"}}):
        assert begin(out, facts | other, about, resume=True)["stages"]["lora"]["status"] == "not run"
    with pytest.raises(SystemExit, match="--resume"):
        begin(out, facts, about, resume=False)


def test_a_rehearsal(small_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages; the rest has its own test."""
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "result.json"
    given = ["--cpu", "--model", str(small_model_dir), "--out", str(out), "--folder", str(tmp_path)]
    before = signal.getsignal(signal.SIGTERM)

    def starting(given: Any, folder: Path) -> Start:
        place = Place(given.preset, folder, is_small=True, model=given.model)
        return lambda stage, parts, events, log: Served(stage.name, parts, place, events, log)

    try:
        assert gpu_first.main([*given, "--only", "profile", "attention", "preprocess"], starting) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    result = json.loads(out.read_text())
    assert list(result["stages"]) == [stage.name for stage in STAGES]
    assert result["is_rehearsal"] is True
    table = result["stages"]["profile"]["parts"]["samples"]["figures"]["profile"]
    assert table["measured"] == "host operations"
    assert 0 < sum(row["ms"] for row in table["operations"]) + table["other_ms"] <= 1.01 * table["step_ms"]
    assert result["stages"]["lora"] == not_run(BY_NAME["lora"])
    assert not gpu_table.results_in(tmp_path)


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    """By its command line: every stage, as on a card."""
    out = tmp_path / "result.json"
    environment = os.environ | {"PHI3V_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "benchmarks/gpu_first.py"), "--cpu", "--minutes", "30", "--out", str(out)]
    assert os.spawnve(os.P_WAIT, sys.executable, command, environment) == 0
    result = json.loads(out.read_text())
    settled = {name: entry["status"] for name, entry in result["stages"].items()}
    assert set(settled.values()) <= {"done", "not there"}, settled
    for stage in STAGES:
        assert result["stages"][stage.name]["parts"].keys() == stage.parts.keys()
    done = {name for name, status in settled.items() if status == "done"}
    assert done >= {"train-command", "lora", "full", "qlora", "frozen-vision", "attention", "preprocess", "profile"}


def a_result(device: str, **parts: Any) -> dict[str, Any]:
    stages = {"lora": {"parts": parts}}
    return {"device": device, "date": "2026-01-02T00:00:00", "versions": {"torch": "2.11.0"}, "stages": stages}


def test_the_tables_say_what_was_measured_where() -> None:
    figures = {"samples_per_second": 8.0, "mfu": 0.41, "peak_gb": 37.5, "planned_peak_gb": 38.1}
    measured = {"status": "done", "figures": figures, "date": "2026-03-04T00:00:00"}
    base = measured | {"figures": figures | {"samples_per_second": 2.0}}
    failed = {"status": "failed", "last_lines": ["trace", "RuntimeError: a | b <c>"], "date": "2026-03-04T00:00:00"}
    one = a_result("NVIDIA X", samples=measured, recipe=base, **{"shared-image": failed})
    text = gpu_table.tables([one, a_result("NVIDIA Y", samples=measured)])
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    figure = "8.0 samples/s, MFU 41.0%, 37.5 GB (planned 38.1)"
    assert f"{figure} (NVIDIA X, torch 2.11.0, 2026-03-04); " in lines["lora `samples`"]
    assert "(NVIDIA Y, torch 2.11.0, 2026-03-04)" in lines["lora `samples`"]
    assert "4.00x (NVIDIA X" in lines["lora `samples` over `recipe`"]
    assert "failed: RuntimeError: a \\| b &lt;c> (NVIDIA X" in lines["lora `shared-image`"]
    assert lines["full `samples`"].endswith("| not measured |")
    assert lines["lora `shared-image` over `samples`"].endswith("| not measured |")


def test_the_tables_name_what_is_measured() -> None:
    for stage, part in (*gpu_table.ROWS, *((stage, part) for stage, part, _ in gpu_table.CHECKS), *gpu_table.TARGETS):
        assert part in BY_NAME[stage].parts, (stage, part)


def test_the_page_is_what_the_results_say() -> None:
    """Nobody writes a GPU figure by hand."""
    begin_mark, end_mark = gpu_table.MARKS
    page = gpu_table.PAGE.read_text(encoding="utf-8")
    shown = page.split(begin_mark)[1].split(end_mark)[0].strip()
    assert shown == gpu_table.tables(gpu_table.results_in(gpu_table.RESULTS))
