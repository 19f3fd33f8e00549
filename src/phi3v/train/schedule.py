"""How many steps a run takes, and what the learning rate does in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from phi3v.config import TrainingConfig
from phi3v.findings import Finding

RECIPE_WARMUP = 50  # steps, of the public recipe
WARMUP_SHARE = 10  # by default the warm-up is at most one of so many steps


def total_steps(training: TrainingConfig, an_epoch: int) -> int:
    """Optimizer steps of a run.

    Args:
        an_epoch: steps of an epoch.
    """
    return training.max_steps or math.ceil(an_epoch * training.epochs)


def warmup_steps(training: TrainingConfig, total: int) -> int:
    """Steps over which the learning rate rises from 0, in a run of ``total``: fewer than that if it has only one."""
    if total == 1:
        return 0
    return min(RECIPE_WARMUP, total // WARMUP_SHARE) if training.warmup_steps is None else training.warmup_steps


def describe_schedule(training: TrainingConfig, total: int) -> Finding:
    """The warm-up in words; a warning where the learning rate does not get to what is configured."""
    warmup, wanted = warmup_steps(training, total), training.warmup_steps
    says = f"the learning rate rises over {warmup} steps" if warmup else "no warm-up of the learning rate"
    if wanted is None:
        why = f" (a tenth; the public recipe's {RECIPE_WARMUP} are for longer runs)" if warmup < RECIPE_WARMUP else ""
        return Finding("schedule", "pass", says + why)
    hint = "set training.warmup_steps lower, or leave it out"
    if warmup < wanted:
        return Finding(
            "schedule",
            "warn",
            "the run has one step, so it has no warm-up: with training.warmup_steps above 0 that step's learning rate "
            "would be 0",
            hint,
        )
    if wanted >= total:
        reached = (total - 1) / wanted
        what = f"the warm-up takes {wanted} steps and the run has {total}, so the learning rate only gets to "
        return Finding("schedule", "warn", f"{what}{reached:.0%} of its peak", hint)
    return Finding("schedule", "pass", says)


def make_schedule(optimizer: torch.optim.Optimizer, training: TrainingConfig, total: int) -> LambdaLR:
    """The learning rate of a run of ``total`` steps, by transformers' schedules."""
    return get_scheduler(
        training.schedule, optimizer, num_warmup_steps=warmup_steps(training, total), num_training_steps=total
    )


def resume_schedule(schedule: LambdaLR, saved: Mapping[str, Any]) -> None:
    """Go on at the step that was saved, on the schedule as it is now, which may be a longer one.

    What was saved holds the rate of the next step by the old schedule; of a finished one that is 0.
    """
    schedule.load_state_dict(dict(saved))
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    rates = [peak * factor for peak, factor in zip(schedule.base_lrs, factors, strict=True)]
    schedule.load_state_dict(schedule.state_dict() | {"_last_lr": rates})
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
