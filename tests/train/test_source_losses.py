"""The loss that is told of each source of a mixture: that of its records, however they were split."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mixture_data import Told, mixed_run, two_sources, write_pairs
from one_step import StandsStill

from phi3v.config import ObjectiveName, Packing
from phi3v.data.batches import RowPlan
from phi3v.data.readers import Readers
from phi3v.model import loss
from phi3v.train.loop import TrainingLoop
from phi3v.train.observers.faults import StepFaults
from phi3v.train.reference import reference_log_probs


@pytest.mark.parametrize(
    ("packing", "objective", "weighting"),
    [
        ("shared-image", "sft", "sample"),
        ("none", "sft", "token"),
        ("shared-image", "dpo", "sample"),
        ("shared-image", "kto", "sample"),
    ],
)
def test_the_loss_of_a_source_is_that_of_its_records(
    small_model_dir: Path, easy_vqa: Path, tmp_path: Path, packing: Packing, objective: ObjectiveName, weighting: Any
) -> None:
    """Against each record computed alone, by its weight."""
    files = two_sources(easy_vqa, tmp_path)
    if objective != "sft":
        write_pairs(files)
    run = mixed_run(small_model_dir, files, tmp_path, packing=packing, objective=objective)
    run.folder.mkdir()
    run.config.training.loss_weighting = weighting
    reference = reference_log_probs(run) + 0.5 if run.config.objective.needs_reference else None
    dataset, goal = run.dataset(reference=reference), run.objective
    if objective == "kto":
        goal.drift = 0.3  # type: ignore[attr-defined]
    run.model.eval()

    def sums(plan: RowPlan) -> dict[str, float]:
        row = dataset[plan]
        row = {name: value for name, value in row.items() if name not in ("counts", "ends_step")}
        with torch.no_grad():
            _, statistics = goal.loss(lambda inputs: run.model(**inputs), row, 1.0)
        assert statistics is not None
        return dict(zip(goal.statistics, statistics.tolist(), strict=True))

    rows = list(chain.from_iterable(chain.from_iterable(run.plan.steps(0))))
    indices = [index for row in rows for group in row for index in group]
    assert len(indices) == 30
    whole = [sums(RowPlan(row, ends_step=True)) for row in rows]
    each = {index: sums(RowPlan(((index,),), ends_step=True)) for index in set(indices)}
    for name in goal.statistics:
        expected = sum(each[index][name] for index in indices)
        assert sum(of_row[name] for of_row in whole) == pytest.approx(expected, rel=1e-5, abs=1e-5), name
    for place, name in enumerate(("a", "b")):
        own = [index for index in indices if (index >= 12) == bool(place)]
        assert all(each[index][f"source/{'ba'[place]}/weight"] == 0 for index in own)
        if weighting == "sample" and objective != "kto":
            assert sum(each[index][f"source/{name}/weight"] for index in own) == pytest.approx(len(own))


class WithoutTriton:
    """What Liger's fused loss gives, where its kernel cannot run."""

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction

    def __call__(self, weight: torch.Tensor, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(states @ weight.T, targets, reduction=self.reduction)


@pytest.mark.parametrize(
    ("packing", "objective", "weighting", "kernel"),
    [
        pytest.param("none", "sft", "sample", "chunked", marks=pytest.mark.slow),
        ("samples", "sft", "token", "liger"),
        ("none", "orpo", "sample", "chunked"),
        pytest.param("shared-image", "sft", "sample", "liger", marks=pytest.mark.slow),
        pytest.param("shared-image", "orpo", "token", "chunked", marks=pytest.mark.slow),
        pytest.param("none", "dpo", "sample", "chunked", marks=pytest.mark.slow),
    ],
)
def test_what_is_logged_of_a_source_is_the_mean_over_its_samples(
    small_model_dir: Path,
    easy_vqa: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packing: Packing,
    objective: ObjectiveName,
    weighting: Any,
    kernel: Any,
) -> None:
    """Several micro-batches a step, or packed rows, and two steps a line; the head in chunks of a few tokens."""
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 3 * 32064)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    stand_in = ModuleType("liger_kernel.transformers")
    stand_in.LigerFusedLinearCrossEntropyLoss = WithoutTriton  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    files = two_sources(easy_vqa, tmp_path)
    if objective != "sft":
        write_pairs(files)
    micro = 2 if packing == "none" else 1
    run = mixed_run(small_model_dir, files, tmp_path, packing=packing, objective=objective, micro=micro)
    run.folder.mkdir()
    config = run.config
    run = replace(run, engine=StandsStill(run.model, run.engine.choice, config, run.runtime))
    config.training.max_steps, config.training.logging_steps, config.training.loss_weighting = 4, 2, weighting
    run.model.loss_kernel = kernel
    reference = reference_log_probs(run) + 0.5 if config.objective.needs_reference else None
    dataset, told = run.dataset(reference=reference), Told()
    TrainingLoop(run, Readers(dataset.__getitem__), StepFaults(run), observers=[told]).run()

    steps = list(run.plan.steps(0))
    assert all(len(rows) > 1 for (rows,) in steps)
    run.model.loss_kernel = "whole"

    def alone(index: int) -> tuple[float, float]:
        """The weighted loss of a record of which nothing else is computed, and its weight."""
        row = dataset[RowPlan(((index,),), ends_step=True)]
        row = {name: value for name, value in row.items() if name not in ("counts", "ends_step")}
        with torch.no_grad():
            whole, _ = run.objective.loss(lambda inputs: run.model(**inputs), row, 1.0)
        weights = row["pair_weights"] if config.objective.takes_pairs else row["loss_weights"]
        return whole.item(), float(weights.sum())

    for line, of_line in zip(told.lines, (steps[:1], steps[1:2], steps[2:4]), strict=True):
        drawn = [index for (rows,) in of_line for row in rows for group in row for index in group]
        for name, own in (("a", [i for i in drawn if i < 12]), ("b", [i for i in drawn if i >= 12])):
            losses, weights = zip(*map(alone, own), strict=True)
            # Float32 sums over a few tokens, in another order.
            assert line[f"source/{name}/loss"] == pytest.approx(sum(losses) / sum(weights), rel=1e-5)
