"""A plan for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phi3v.config import METHODS
from phi3v.plan.hardware import GIB
from phi3v.plan.options import Option, Plan
from phi3v.terminal import say


def show_plan(console: Console, plan: Plan) -> None:
    """One machine: data, memory by part, methods and engines, the recommendation."""
    say(console, f"machine: {plan.machine.label}, {plan.machine.gpu.memory_bytes / GIB:.1f} GiB each")
    if plan.machine.quota:
        say(console, f"Azure: {plan.machine.quota}")
    say(console, f"model: {plan.model_basis}")
    _show_data(console, plan)
    _show_options(console, plan)
    if plan.recommended is not None:
        _show_memory(console, plan.recommended)
    say(console, f"recommended: {plan.reason}", style="bold")
    if plan.recommended is not None:
        _show_time(console, plan, plan.recommended)


def show_comparison(console: Console, plans: Sequence[Plan]) -> None:
    """Several machines: the best option of every method on each, and why."""
    table = Table(title="methods on machines", title_justify="left", box=None, pad_edge=False)
    for column in ("machine", "method", "engine", "verdict", "samples/s", "why"):
        table.add_column(column, overflow="fold")
    for plan in plans:
        for method in METHODS:
            option = plan.best(method)
            table.add_row(
                plan.machine.label if method == METHODS[0] else "",
                method,
                option.setup.engine,
                _verdict(option),
                _speed(option),
                option.reason,
            )
        table.add_section()
    console.print(table)
    for plan in plans:
        say(console, f"{plan.machine.label}: {plan.reason}")


def _verdict(option: Option) -> Text:
    style = "red" if not option.fits else "yellow" if option.changes else "green"
    return Text(option.verdict, style=style)


def _speed(option: Option) -> str:
    return f"{option.speed.samples_per_second:.2f}" if option.speed and option.speed.samples_per_second else ""


def _show_data(console: Console, plan: Plan) -> None:
    say(console, f"data: {plan.workload.basis}")
    table = Table(box=None, pad_edge=False)
    for column in ("num_crops", "tokens", "95 %", "longest", "> 4096", "crops", "blank", "padding", "shrunk"):
        table.add_column(column, justify="right")
    for crops in plan.shown_crops:
        figures = plan.workload.at(crops).summary()
        table.add_row(
            f"{crops}{' ←' if crops == plan.num_crops else ''}",
            f"{figures['mean_tokens']:.0f}",
            str(figures["p95_tokens"]),
            str(figures["max_tokens"]),
            f"{figures['share_over_4096']:.1%}",
            f"{figures['mean_crops']:.1f}",
            f"{figures['blank_share']:.0%}",
            f"{figures['padding_crops']:.1f}",
            f"{figures['shrunk_share']:.0%}",
        )
    console.print(table)
    say(
        console,
        "  crops: including the global view; blank: white share of the pages; padding: blank crops per image that the "
        "official processor adds and computes; shrunk: images that lose resolution",
    )
    histogram = plan.workload.at(plan.num_crops).histogram()
    most = max(histogram.values())
    for span, count in histogram.items():
        if count:
            say(console, f"  {span:>12} tokens {'█' * max(1, round(30 * count / most))} {count:,}")
    say(console, f"num_crops {plan.num_crops}: {plan.crops_reason}")
    if plan.workload.shared_image_factor > 1.05:
        say(console, f"{plan.workload.shared_image_factor:.1f} records per image: shared-image packing saves most")


def _show_options(console: Console, plan: Plan) -> None:
    table = Table(box=None, pad_edge=False)
    columns = ["method", "engine", "verdict", "samples/s", "why"]
    if plan.published:
        columns.insert(4, "published")
    for column in columns:
        table.add_column(column, overflow="fold")
    for option in plan.options:
        row: list[str | Text] = [option.setup.method.name, option.setup.engine, _verdict(option), _speed(option)]
        if plan.published:
            published = plan.published.get(option.setup.method.name)
            own = published if published and option.setup.engine == _published_engine(option) else None
            memory = f", ~{own.gigabytes:.0f} GB" if own and own.gigabytes else ""
            row.append(f"{own.images_per_second:.1f}/s{memory}" if own else "")
        table.add_row(*row, option.reason)
    console.print(table)
    if plan.published:
        say(
            console,
            "published: Microsoft's figures for DocVQA on Phi-3-vision; docs/planning.md explains the differences",
        )


def _published_engine(option: Option) -> str:
    return "ddp" if option.setup.is_adapter else "zero2"


def _show_memory(console: Console, option: Option) -> None:
    if option.memory is None:
        return
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in option.memory.parts.items())
    say(console, f"memory at the peak ({option.memory.moment}), GiB: {parts}")
    if option.memory.pinned:
        say(console, f"  and {option.memory.pinned / GIB:.2f} GiB of the host's memory a GPU, pinned")


def _show_time(console: Console, plan: Plan, option: Option) -> None:
    setup = option.setup
    say(
        console,
        f"  {setup.precision}, {setup.attention}, {_batch(option)}, "
        f"checkpointing {setup.checkpointing}, {setup.optimizer}{', lean' * setup.lean}: "
        f"{plan.steps:,} steps of {_step(plan)}"
        + (f", about {_duration(plan.hours)}" if plan.hours is not None else ""),
    )
    if plan.config.objective.needs_reference:
        known = f", {_duration(plan.reference_hours)} of these" if plan.reference_hours else ""
        passed = f"one forward pass over {len(plan.workload):,} records before training{known}; no second model"
        say(console, f"  reference of {plan.config.objective.name}: {passed}")
    if option.speed is not None:
        say(console, f"  speed: {option.speed.samples_per_second:.2f} samples/s, {option.speed.basis}")


def _batch(option: Option) -> str:
    setup, rows = option.setup, option.rows
    if rows is None:
        return f"micro-batch {setup.micro_batch}"
    return (
        f"packing {setup.packing} in rows of {setup.pack_tokens} tokens ({rows.row_count:.1f} rows per step and GPU, "
        f"{rows.filled:.0%} full)"
    )


def _step(plan: Plan) -> str:
    tokens = plan.config.training.batch_tokens
    return f"{plan.config.training.batch_size} samples" if tokens is None else f"about {tokens:,} tokens"


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes"
