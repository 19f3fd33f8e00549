"""The benchmark of saves: the page has the committed figures, and what it makes of steps."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_committed_figures() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "checkpoints.json").read_text(encoding="utf-8"))
    assert checkpoints.table(result) in (ROOT / "docs" / "resume.md").read_text(encoding="utf-8")


def test_a_stall_is_measured_in_steps_without_a_save() -> None:
    plain = {"wall": 2.0, "cpu": 1.0, "save_wall": 0.0, "save_cpu": 0.0}
    saving = {"wall": 3.0, "cpu": 1.5, "save_wall": 1.0, "save_cpu": 0.5}
    after = plain | {"wall": 2.5}
    costs = checkpoints.costs([plain, plain, saving, after, plain])
    assert (costs["stall_in_steps"], costs["stall_cpu_in_steps"]) == (0.5, 0.5)
    assert (costs["step_seconds"], costs["step_after_in_steps"]) == (2.0, 1.25)
