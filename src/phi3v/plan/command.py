"""`phi3v plan`: one machine in full, or several in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v.config import RunConfig
from phi3v.errors import UserError
from phi3v.plan.hardware import find_machine
from phi3v.plan.planner import Planner, planned_recipe
from phi3v.plan.show import show_comparison, show_plan


def plan_command(
    config: RunConfig,
    console: Console,
    *,
    gpus: Sequence[str] = (),
    count: int | None = None,
    sku: str | None = None,
    nodes: int = 1,
    write: Path | None = None,
) -> dict[str, Any]:
    """Plan a recipe, show it and return what ``--json`` prints.

    Args:
        gpus: names of the table, also as ``8xa100-80gb``; none is this machine, several are compared.
        count: how many of the one GPU.
        sku, nodes: an Azure size in place of ``gpus``.
        write: where to put the recommended recipe.

    Raises:
        UserError: a name is unknown, the data has faults, or nothing fits and ``write`` is given.
    """
    if len(gpus) > 1 and (write is not None or count is not None):
        where = "--write" if write is not None else "--gpus"
        raise UserError("several machines are compared", where=where, hint="name one --gpu, e.g. 8xa100-80gb")
    named: Sequence[str | None] = gpus or [None]
    machines = [find_machine(gpu, count, sku, nodes) for gpu in named]
    planner = Planner(config, progress=config.training.progress_bar)
    plans = [planner.plan(machine) for machine in machines]
    if len(plans) > 1:
        show_comparison(console, plans)
        return {"machines": [plan.to_json_dict() for plan in plans]}
    show_plan(console, plans[0])
    if write is not None:
        write.write_text(planned_recipe(plans[0]), encoding="utf-8")
        console.print(f"recipe: {write}", highlight=False, soft_wrap=True)
    return plans[0].to_json_dict()
