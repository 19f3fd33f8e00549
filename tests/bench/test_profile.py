"""The table of a profiled step, from traces whose kernels are written down here."""

from __future__ import annotations

from typing import Any

import pytest

from phi3v.bench.profile import STEP, summarize_trace


def event(category: str, name: str, start: float, duration: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread}


def test_kernels_gaps_and_waits() -> None:
    """Two streams; a step of 1000 µs on the host whose last kernel ends at 1200."""
    table = summarize_trace(
        [
            event("user_annotation", STEP, 1000, 1000),
            event("gpu_user_annotation", STEP, 1000, 1200),  # no kernel, though it lies on the device
            event("cpu_op", "aten::mm", 1000, 50),
            event("cuda_runtime", "cudaStreamSynchronize", 1500, 100),
            event("cpu_op", "aten::_local_scalar_dense", 1490, 120),  # with the one before in it
            event("cuda_runtime", "cudaDeviceSynchronize", 2001, 300),  # after the step
            event("kernel", "matmul", 1010, 200, thread=7),
            event("kernel", "copy", 1110, 200, thread=8),  # beside it for 100
            event("kernel", "matmul", 1400, 300, thread=7),  # after 90 of nothing
            event("gpu_memset", "set", 1705, 495, thread=7),
            {"ph": "i", "name": "no duration", "ts": 5},
        ]
    )
    assert table["step_ms"] == 1.2
    assert table["measured"] == "kernels"
    assert [(row["name"], row["calls"], row["ms"]) for row in table["operations"]] == [
        ("matmul", 2, 0.5),
        ("set", 1, 0.495),
        ("copy", 1, 0.2),
    ]
    assert table["operations"][0]["share"] == pytest.approx(500 / 1195, abs=1e-3)
    assert table["busy_share"] == pytest.approx((300 + 300 + 495) / 1200, abs=1e-3)
    assert (table["gaps"], table["gaps_ms"]) == (1, 0.09)
    assert table["longest_gaps"] == [{"ms": 0.09, "before": "matmul"}]
    assert table["waits"] == {"aten::_local_scalar_dense": {"calls": 1, "ms": 0.12}}


def test_without_a_gpu_an_operation_has_what_its_own_take_away() -> None:
    table = summarize_trace(
        [
            event("user_annotation", STEP, 0, 100),
            event("cpu_op", "aten::linear", 10, 50),
            event("cpu_op", "aten::mm", 20, 30),
            event("cpu_op", "aten::mm", 70, 10),
            event("cpu_op", "aten::add", 20, 5, thread=2),
        ]
    )
    assert table["measured"] == "host operations"
    assert {row["name"]: row["ms"] for row in table["operations"]} == {
        "aten::mm": 0.04,
        "aten::linear": 0.02,
        "aten::add": 0.005,
    }
    assert "gaps" not in table
