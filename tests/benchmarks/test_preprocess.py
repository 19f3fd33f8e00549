"""The benchmark of preprocessing runs, and compares the two ways before it times them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import preprocess


def test_it_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "preprocess.json"
    arguments = ["--pages", "1", "--repeats", "1", "--num-crops", "4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["preprocess.py", *arguments])
    preprocess.main()
    result = json.loads(out.read_text())
    assert (result["size"], result["num_crops"], result["cores"]) == ([1275, 1650], 4, 1)
    assert result["timed_by"] == "CPU time of one thread"
    assert all(value > 0 for value in result["milliseconds_per_page"].values())
    ratio = result["times_faster_than_plain"]
    assert result["times_faster_than_plain_range"] == [ratio, ratio]  # of one page, once
    # 5 crops of float32, 4 of uint8.
    assert result["megabytes_per_page"] == {"plain_float": 6.77, "uint8_page": 1.35}
