"""The benchmark of saves: the page has the committed figures, and what it makes of runs."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
from bench_result import peak_memory

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_committed_figures() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "checkpoints.json").read_text(encoding="utf-8"))
    assert checkpoints.table(result) in (ROOT / "docs" / "resume.md").read_text(encoding="utf-8")
    cases = [(run["case"], run["format"]) for run in result["runs"]]
    assert cases == [(case, form) for case in checkpoints.CASES for form in ("whole", "sharded")]


def test_what_runs_come_to() -> None:
    first, second = {"step": 2.0, "stalls": [1.0, 2.0], "memory": 5}, {"step": 4.0, "stalls": [3.0, 4.0], "memory": 3}
    runs = [{"bytes_written": [7, 0], "per_rank": ranks} for ranks in ([first, second], [second, first])]
    found = checkpoints.summary("ddp:2", "whole", runs)
    assert (found["bytes_written"], found["memory_bytes"]) == ([7, 0], [5, 5])
    assert (found["stall_cpu_seconds"], found["step_cpu_seconds"]) == ([2.5, 2.5], [3.0, 3.0])
    assert found["stall_cpu_seconds_of_runs"] == [[1.5, 3.5], [3.5, 1.5]]


def test_the_peak_of_memory_is_that_since_the_last_reset() -> None:
    block = bytearray(b"x") * (300 * 2**20)
    with_block = peak_memory()
    del block
    assert peak_memory(reset=True) > with_block - 10 * 2**20  # the kernel counts by threads
    assert peak_memory() < with_block - 250 * 2**20
