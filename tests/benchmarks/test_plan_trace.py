"""The trace that the planner is held against, on a small model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from phi3v.config import LoraConfig, MethodConfig
from phi3v.model.configuration import CLIP_VIT_L_14_336
from phi3v.model.presets import preset_config
from phi3v.train.compute.activations import Policy
from plan_trace import LiveMemory, predicted, traced


def test_live_memory_is_what_torch_counts() -> None:
    """torch's own tracker, of layers that all train; it takes no frozen ones."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(64, 256)).square().mean().backward()
        optimizer.step()

    peaks = []
    for kind in ("ours", "torch's"):
        with FakeTensorMode():
            model = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(4)])
            optimizer = torch.optim.AdamW(model.parameters())
            tracker: Any = LiveMemory([*model.parameters()]) if kind == "ours" else MemTracker()
            if kind != "ours":
                tracker.track_external(model)
            with tracker:
                step(model, optimizer)
            peaks.append(
                tracker.peak
                if kind == "ours"
                else sum(s["Total"] for s in tracker.get_tracker_snapshot("peak").values())
            )
    assert peaks[0] == pytest.approx(peaks[1], rel=0.002)


def _total(tracker: MemTracker) -> int:
    return sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())


@pytest.mark.parametrize(
    ("method", "policy", "batch"),
    [
        ("full", "none", "padded"),
        ("full", "selective", "packed"),
        ("lora", "selective", "padded"),
        ("lora", "vision", "packed"),
        ("qlora", "full", "padded"),
    ],
)
def test_the_plan_is_near_the_trace(method: Any, policy: Policy, batch: str) -> None:
    """Three layers of each kind, in the real widths: within 10 %, as constants weigh more than at full size."""
    tower = CLIP_VIT_L_14_336 | {"num_hidden_layers": 4}
    config = preset_config("phi-3.5-vision", num_hidden_layers=3, clip_vision_config=tower)
    choice = MethodConfig(name=method, lora=LoraConfig(rank=32))
    plan, trace = (of(config, choice, policy, batch) for of in (predicted, traced))
    assert plan["predicted_gib"] == pytest.approx(trace["traced_gib"], rel=0.1)
