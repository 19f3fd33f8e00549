"""What a run says before it begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.markup import escape
from rich.table import Table

from phi3v.config import ObjectiveConfig, RunConfig
from phi3v.data.order import Mixed
from phi3v.train.methods.strategies import summarize
from phi3v.train.prepare import PreparedRun
from phi3v.train.schedule import describe_schedule, total_steps

Forecast = Callable[[RunConfig, int, int], str | None]


def print_header(setup: PreparedRun, forecast: Forecast | None = None) -> None:
    """Say on the console what will happen: parts, data, device, choices with their reasons, what it will take."""
    config, console, runtime, facts = setup.config, setup.console, setup.runtime, setup.facts
    train_table, questions = setup.train_table, setup.questions
    parts = summarize(setup.model)
    table = Table(box=None, pad_edge=False)
    for column in ("part", "parameters", "trained", "adapters"):
        table.add_column(column, justify="left" if column in ("part", "adapters") else "right")
    for part in parts:
        adapters = ", ".join(f"{name} ×{count}" for name, count in part.adapters.items())
        table.add_row(part.part, f"{part.total:,}", f"{part.trainable:,}", adapters)
    trainable, total = sum(part.trainable for part in parts), sum(part.total for part in parts)
    table.add_row("total", f"{total:,}", f"{trainable:,}", f"{100 * trainable / total:.2f} % trained")
    console.print(f"[bold]{config.method.name}[/bold] training of {config.model.path}", highlight=False)
    console.print(table)
    steps = total_steps(config.training, setup.plan.num_steps)
    schedule = describe_schedule(config.training, steps)
    # With what is recomputed here: where memory is free, `auto` keeps more than the least that a plan asks for.
    chosen = config.with_keys({"training.activation_checkpointing": setup.checkpointing.split()[0]})
    planned = forecast(chosen, len(setup.plan), runtime.world_size) if forecast and runtime.rank == 0 else None
    for line in (
        f"objective: {describe_objective(config.objective)}" if config.objective.is_preference else None,
        f"mixture: {describe_mixture(setup.mixture, train_table.names)}" if setup.mixture is not None else None,
        f"data: {len(train_table)} records, {_learned(setup)} to train on"
        + (f", {len(questions)} questions to evaluate on{questions.by_source}" if questions is not None else ""),
        f"answers: {setup.limit}" if setup.limit is not None else None,
        f"device: {runtime.device}, {runtime.precision} ({runtime.reason})",
        f"engine: {setup.engine.choice.name} ({setup.engine.choice.reason})",
        f"attention: {facts.attention} ({facts.attention_reason})",
        f"self-check: {setup.checked.line}" if setup.checked.line else None,
        f"activation checkpointing: {setup.checkpointing}",
        f"optimizer: {config.training.optimizer}" + ", stepping in the backward pass" * config.training.lean,
        f"step: {_step_line(setup)}; every {config.training.loss_weighting} weighs the same",
        f"steps: {steps:,}, {steps / setup.plan.num_steps:.2f} epochs; {schedule.what}",
        f"planned: {planned}" if planned else None,
        f"output: {config.training.output_dir}",
    ):
        if line is not None:
            name, _, text = line.partition(": ")
            console.print(f"[bold]{name}:[/bold] {escape(text)}", highlight=False, soft_wrap=True)
    for finding in (*setup.findings, schedule):
        if finding.verdict != "pass":
            finding.render(console)


def _learned(setup: PreparedRun) -> str:
    table, objective = setup.train_table, setup.config.objective
    if not objective.is_preference:
        return f"{len(table.questions())} questions"
    if objective.takes_pairs:
        return f"{int(table.rejected_counts().sum())} pairs of answers"
    return f"{len(table) + int(table.rejected_counts().sum())} answers"


def describe_mixture(order: Mixed, names: Sequence[str]) -> str:
    """What an epoch takes of each source."""
    parts = [
        f"{count:,} of {size:,} records of {name} ({count / len(order):.1%})"
        for name, size, count in zip(names, order.sizes, order.counts, strict=True)
    ]
    return f"an epoch takes {', '.join(parts)}"


def describe_objective(objective: ObjectiveConfig) -> str:
    """An objective and its settings in words."""
    told = [f"beta {objective.scale:g}"]
    told += ["scores per token"] if objective.divides_by_length and objective.name != "ipo" else []
    told += ["scores of whole answers"] if objective.name == "ipo" and not objective.divides_by_length else []
    told += [f"gamma {objective.gamma:g}"] if objective.name == "simpo" else []
    told += [f"label smoothing {objective.label_smoothing:g}"] if objective.label_smoothing else []
    for name, weight in (("quality", objective.quality_weight), ("supervised", objective.supervised_weight)):
        told += [f"{name} loss of weight {weight:g}"] if weight else []
    reference = "the model that training begins with" if objective.needs_reference else "none"
    return f"{objective.name}, {', '.join(told)}; reference: {reference}"


def _step_line(setup: PreparedRun) -> str:
    config, ranks = setup.config, setup.runtime.world_size
    if not setup.plan.is_packed:
        return (
            f"{config.training.batch_size} samples = {ranks} ranks × {config.training.micro_batch_size} at a time × "
            f"{setup.accumulation} accumulated"
        )
    of_records = setup.plan.lengths.separate
    drawn = of_records if setup.mixture is None else of_records[setup.mixture.of_epoch(0)]
    tokens, separate = setup.plan.epoch_tokens(), int(drawn.sum())
    wanted = config.training.batch_tokens
    size = f"{config.training.batch_size} samples" if wanted is None else f"about {wanted} tokens"
    shared = (
        f" ({separate / tokens:.2f} times fewer tokens than apart)"
        if config.data.packing == "shared-image" or config.objective.is_preference
        else ""
    )
    return (
        f"{size} on {ranks} ranks in rows of at most {config.data.pack_tokens} tokens, {config.data.packing} packing"
        f"{shared}, {setup.plan.num_steps} steps an epoch"
    )
