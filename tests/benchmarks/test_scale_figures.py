"""The pages have the committed figures of balance and scale; and what a record of an index takes in memory."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest

import balance
import scale_simulation
from phi3v.model.presets import init_model
from phi3v.processing.processor import Phi3VProcessor

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", [balance, scale_simulation])
def test_the_page_has_the_committed_figures(script: ModuleType) -> None:
    name = Path(str(script.__file__)).stem
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert script.markdown(result) in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_a_record_of_an_index_takes_arrays_and_no_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million records are 0.5 GB at most by these limits, libraries aside. 220, 68 and 84 bytes were seen."""
    count = 10_000
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "index"
    folder.mkdir()
    scale_simulation.write_data(folder, scale_simulation.Pages.draw(count), None)
    scale_simulation.open_lengths(folder, None)  # verifies the index and counts its tokens, which is kept
    arrow, blocks = pa.total_allocated_bytes(), sys.getallocatedblocks()
    tracemalloc.start()
    try:
        lengths, order = scale_simulation.open_lengths(folder, None)
        kept, peak = tracemalloc.get_traced_memory()
        objects = sys.getallocatedblocks() - blocks
        plan = scale_simulation.plan_of(lengths, "shared-image", 8, 128, order)
        tracemalloc.reset_peak()
        assert sum(len(group) for step in plan.steps(0) for rows in step for row in rows for group in row) == count
        planning = tracemalloc.get_traced_memory()[1] - kept
    finally:
        tracemalloc.stop()
    assert kept < 130 * count
    assert peak < 300 * count
    assert planning < 200 * count
    assert objects < 0.2 * count
    assert pa.total_allocated_bytes() - arrow < 10 * count  # the tables are mapped


@pytest.mark.slow
def test_a_million_records_are_planned_in_a_gigabyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries included, in processes that start as training does; the first of them verifies the index."""
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache of the writer"))
    init_model("tiny", tmp_path / "model")
    (tmp_path / "index").mkdir()
    pages = scale_simulation.Pages.draw(1_000_000)
    scale_simulation.write_data(tmp_path / "index", pages, Phi3VProcessor.from_pretrained(tmp_path / "model"))
    for case in (scale_simulation.PLANS[0], *scale_simulation.PLANS):
        found = scale_simulation.in_own_process(tmp_path, case, tmp_path / "cache")
        assert found["peak_mb"] < 1000
        assert found["steps"] == -(-1_000_000 // case[2])
