"""The benchmark of packing: its data, and what it makes of the rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import packing
from phi3v.bench.settings import BenchSettings, Row


def test_receipts_have_the_sizes_and_answers_of_the_table(tmp_path: Path) -> None:
    data = packing.receipts_data(tmp_path, batch=2, steps=1)
    records = [json.loads(line) for line in data.file.read_text().splitlines()]
    assert len(records) == 4
    (turn,) = records[0]["conversations"]
    with Image.open(data.file.parent / "images" / turn["images"][0]) as page:
        assert page.size == (463, 1013)  # the first row of the table: 115 characters in 4 answers
    assert 20 <= len(turn["assistant"]) <= 28
    assert len({record["conversations"][0]["images"][0] for record in records}) == 1


def test_variants_take_turns_and_ratios_are_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"recipe": iter([1.0, 2.0, 1.5]), "shared-image": iter([10.0, 12.0, 21.0])}
    turns: list[str] = []

    def measure_row(row: Row, *_: Any) -> dict[str, Any]:
        turns.append(row.variant)
        speed = next(speeds[row.variant])
        row_facts = {"attention": "sdpa", "checkpointing": "none", "steps": 2, "tokens_per_sample": 3.0, "peak_gb": 1.0}
        return row_facts | {"questions_per_second": speed}

    monkeypatch.setattr(packing, "measure_row", measure_row)
    data = packing.Data("receipts", Path("none"), 16, 8192, 2, 16)
    result = packing.measure({name: name for name in speeds}, data, Path("none"), BenchSettings(), 3)  # type: ignore[misc]
    assert turns == ["recipe", "shared-image"] * 3
    assert result["recipe"]["questions_per_second"] == 1.5
    assert result["shared-image"]["questions_per_second_range"] == [10.0, 21.0]
    assert (result["shared_image_over_recipe"], result["shared_image_over_recipe_range"]) == (10.0, [6.0, 14.0])


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_the_pages_have_the_committed_figures(page: str) -> None:
    root = Path(packing.__file__).parents[1]
    text = (root / page).read_text(encoding="utf-8")
    result = json.loads((root / "benchmarks" / "results" / "packing.json").read_text(encoding="utf-8"))
    for data in packing.DATA:
        for base in ("recipe", "padded"):
            over = f"shared_image_over_{base}"
            low, high = result[data][f"{over}_range"]
            assert f"{result[data][over]:.1f}x ({low:.1f} to {high:.1f})" in text
