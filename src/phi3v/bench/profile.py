"""What one optimizer step spends its time on: kernels, gaps between them, and where the host waits for the device."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from phi3v.train.state import Observer, TrainState

STEP = "phi3v step"
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")  # the categories of a trace that occupy a GPU
# Calls of CUDA and operations of torch in which the host waits for the device. A copy is one of them where it is not
# asynchronous; a wait within another counts as the outer one.
WAITS = (
    "aten::_local_scalar_dense",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
)
SHOWN = 15
NAME_LENGTH = 80
GAP_MICROSECONDS = 20.0  # shorter ones are a launch's own


class StepProfile(Observer):
    """Profiles the step after the ``first``; the device is idle when it begins.

    Attributes:
        table: as of `summarize_trace`, once that step is done.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.table: dict[str, Any] | None = None

    def on_step(self, state: TrainState) -> None:
        if state.step == self.first and not state.is_last:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                activities.append(ProfilerActivity.CUDA)
            self.profiler = profile(activities=activities)
            self.profiler.start()
            self.step = record_function(STEP)
            self.step.__enter__()
        elif state.step == self.first + 1:
            self.step.__exit__(None, None, None)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.profiler.stop()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "trace.json"
                self.profiler.export_chrome_trace(str(file))
                self.table = summarize_trace(json.loads(file.read_text(encoding="utf-8"))["traceEvents"])


def summarize_trace(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A table of a step from the events of a trace in Chrome's format (times in microseconds).

    Returns:
        ``step_ms``, from the step's first call to its last kernel's end; ``operations``, the `SHOWN` that take longest,
        each with ``name``, ``calls``, ``ms`` and its ``share`` of all, and ``other_ms``: of the GPU's kernels and
        copies, or where there are none (``measured`` tells) of torch's operations without those within them.
        With a GPU ``busy_share``, the part of the step in which any kernel ran; ``gaps``, the number of times between
        kernels that are longer than `GAP_MICROSECONDS`, their sum ``gaps_ms`` and the ``longest_gaps`` with the
        kernel that ended each. ``waits``, the host's, by name: ``calls`` and ``ms``.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    step = next(event for event in whole if event["name"] == STEP and event.get("cat") == "user_annotation")
    begin, host_end = step["ts"], step["ts"] + step["dur"]
    inside = [event for event in whole if begin <= event["ts"] <= host_end]
    kernels = sorted((event for event in whole if event.get("cat") in KERNELS), key=lambda event: event["ts"])
    host = [event for event in inside if event.get("cat") == "cpu_op"]
    durations = [event["dur"] for event in kernels] if kernels else _own_times(host)
    end = max([host_end, *(event["ts"] + event["dur"] for event in kernels)])
    table = {
        "step_ms": _milliseconds(end - begin),
        "measured": "kernels" if kernels else "host operations",
        **_longest(zip((event["name"] for event in kernels or host), durations, strict=True)),
    }
    if kernels:
        table |= _gaps(kernels, begin, end)
    waits = _outermost([event for event in inside if event["name"] in WAITS])
    calls = Counter(event["name"] for event in waits)
    own = {name: sum(event["dur"] for event in waits if event["name"] == name) for name in calls}
    return table | {"waits": {name: {"calls": calls[name], "ms": _milliseconds(own[name])} for name in calls}}


def _longest(pairs: Iterable[tuple[str, float]]) -> dict[str, Any]:
    calls: Counter[str] = Counter()
    total: defaultdict[str, float] = defaultdict(float)
    for name, microseconds in pairs:
        calls[name] += 1
        total[name] += microseconds
    everything = sum(total.values())
    shown = sorted(total, key=lambda name: -total[name])[:SHOWN]
    rows = [
        {
            "name": name[:NAME_LENGTH],
            "calls": calls[name],
            "ms": _milliseconds(total[name]),
            "share": round(total[name] / everything, 3) if everything else 0.0,
        }
        for name in shown
    ]
    return {"operations": rows, "other_ms": _milliseconds(everything - sum(total[name] for name in shown))}


def _gaps(kernels: list[Mapping[str, Any]], begin: float, end: float) -> dict[str, Any]:
    """Kernels of several streams may run at once, so a gap is a time in which none does."""
    busy, gaps, free_from = 0.0, [], begin
    for kernel in kernels:
        start, stop = kernel["ts"], kernel["ts"] + kernel["dur"]
        if start - free_from > GAP_MICROSECONDS:
            gaps.append((start - free_from, kernel["name"]))
        busy += max(0.0, stop - max(start, free_from))
        free_from = max(free_from, stop)
    longest = sorted(gaps, key=lambda gap: -gap[0])[:5]
    return {
        "busy_share": round(busy / (end - begin), 3),
        "gaps": len(gaps),
        "gaps_ms": _milliseconds(sum(length for length, _ in gaps)),
        "longest_gaps": [{"ms": _milliseconds(length), "before": name[:NAME_LENGTH]} for length, name in longest],
    }


def _own_times(operations: list[Mapping[str, Any]]) -> list[float]:
    """The microseconds of each operation without those that it calls, which lie within it on the same thread."""
    own = [float(event["dur"]) for event in operations]
    order = sorted(range(len(operations)), key=lambda index: (operations[index]["ts"], -operations[index]["dur"]))
    open_on: defaultdict[Any, list[int]] = defaultdict(list)
    for index in order:
        event, stack = operations[index], open_on[operations[index].get("tid")]
        while stack and operations[stack[-1]]["ts"] + operations[stack[-1]]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= event["dur"]
        stack.append(index)
    return own


def _outermost(events: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that lie in no other of their thread."""
    kept: list[Mapping[str, Any]] = []
    free_from: defaultdict[Any, float] = defaultdict(float)
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] >= free_from[event.get("tid")]:
            kept.append(event)
            free_from[event.get("tid")] = event["ts"] + event["dur"]
    return kept


def _milliseconds(microseconds: float) -> float:
    return round(microseconds / 1e3, 3)
