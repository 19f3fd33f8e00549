"""What each command does: wiring from its arguments to the part that does it."""

from __future__ import annotations

import argparse
import dataclasses
import webbrowser
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v.bench.settings import VARIANTS, BenchSettings
from phi3v.config import METHODS, load_config
from phi3v.data.sources import SOURCE_OPTIONS, SOURCES, require_taken
from phi3v.errors import UserError


def model_init(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    import torch

    from phi3v.model.presets import copy_pretrained, init_model

    if arguments.pretrained:
        if arguments.dtype:
            raise UserError("the pretrained base is copied as it is", where="--dtype", hint="leave it out")
        parameters = copy_pretrained(arguments.preset, arguments.out)
    else:
        parameters = init_model(
            arguments.preset,
            arguments.out,
            seed=arguments.seed,
            dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
            tokenizer=Path(arguments.tokenizer) if arguments.tokenizer and arguments.preset != "tiny" else None,
        )
    console.print(f"{arguments.preset}: {parameters:,} parameters in {arguments.out}", highlight=False)
    return {"preset": arguments.preset, "parameters": parameters, "folder": str(arguments.out)}


def data_convert(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.data.sources.own_data import OwnDataOptions

    given = {field: value for field in SOURCE_OPTIONS if (value := getattr(arguments, field)) is not None}
    require_taken(arguments.source, given)
    if "image_columns" in given:
        given["image_columns"] = tuple(given["image_columns"])
    options = OwnDataOptions(
        out=arguments.out,
        source=arguments.location,
        on_bad=arguments.on_bad,
        workers=arguments.workers,
        max_pixels=arguments.max_pixels,
        **given,
    )
    result = SOURCES[arguments.source](options)
    result.render(console)
    return result.to_json_dict()


def data_check(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.data.check import check_file
    from phi3v.data.lengths import Context

    context = Context()
    config = load_config(None, arguments.overrides)
    if "model.path" in arguments.overrides:
        from phi3v.plan.planned_model import planned_config
        from phi3v.train.methods.loading import load_processor

        longest = planned_config(config.model.path)[0].max_position_embeddings
        context = Context(longest, load_processor(config))
    report = check_file(
        arguments.file,
        max_errors=arguments.max_errors,
        max_pixels=arguments.max_pixels,
        image_level=arguments.images,
        special_text=arguments.special_text,
        context=context,
    )
    report.render(console)
    return report.to_json_dict() | {"exit_code": 0 if report.ok else 2}


def train(arguments: argparse.Namespace, console: Console) -> dict[str, Any] | None:
    if arguments.recipe is None and not arguments.overrides:
        raise UserError(
            "nothing to train is named", hint="name a recipe, or keys such as --data.train; see `phi3v train --help`"
        )
    config = load_config(arguments.recipe, arguments.overrides)
    recipe = arguments.recipe.absolute() if arguments.recipe is not None else None
    is_of_run = recipe is not None and recipe.name == "config.yaml" and (recipe.parent / "environment.json").is_file()
    if recipe is not None and is_of_run and "training.output_dir" not in arguments.overrides:
        config = config.now_in(recipe.parent)  # which may have been moved since
        config.training.output_dir = str(recipe.parent)
    from phi3v.doctor import check_before_training
    from phi3v.report.live import train_with_report

    check_before_training(config)
    return train_with_report(config, console, arguments.resume).to_json_dict()


def export(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    if (arguments.source is None) == (arguments.verify is None):
        raise UserError("name what to export, or a folder with --verify", hint="phi3v export output/mine --out DIR")
    if arguments.verify is not None:
        from phi3v.export.verify import verify_folder

        report = verify_folder(arguments.verify, console)
        return report.to_json_dict() | {"exit_code": 0 if report.ok else 2}
    if arguments.out is None:
        raise UserError("where to write it is not said", where="--out", hint="phi3v export output/mine --out DIR")
    if arguments.samples < 1:
        raise UserError("at least one prompt is needed to compare with", where="--samples")
    from phi3v.export.make import export

    return export(
        arguments.source,
        arguments.out,
        console,
        dtype=arguments.dtype,
        adapter=arguments.adapter,
        base=arguments.base,
        max_shard_size=arguments.max_shard_size,
        samples=arguments.samples,
        overwrite=arguments.overwrite,
    ).to_json_dict()


def report(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.report.command import report

    told = report(arguments.runs, out=arguments.out, picture_budget=int(arguments.pictures * 1e6))
    for run in told["runs"]:
        for note in run["missing"]:
            console.print(f"{run['folder']}: {note}", highlight=False, markup=False, soft_wrap=True)
    _say_page(console, told["report"], told["bytes"], show=arguments.open)
    return told


def data_preview(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    num_crops = load_config(None, arguments.overrides).model.num_crops
    from phi3v.report.preview import preview

    told = preview(
        arguments.file,
        arguments.out,
        samples=arguments.samples,
        model=arguments.overrides.get("model.path"),
        num_crops=num_crops,
        special_text=arguments.special_text,
    )
    console.print(f"tokens: {told['tokenizer']}", highlight=False, soft_wrap=True)
    if told["faults"]:
        console.print(f"faults: {told['faults']}, listed in the page", highlight=False)
    _say_page(console, told["preview"], told["bytes"], show=arguments.open)
    return told


def _say_page(console: Console, page: str, size: int, *, show: bool) -> None:
    console.print(f"{page}: {size / 1e6:.2f} MB", highlight=False, markup=False, soft_wrap=True)
    if show:
        webbrowser.open(Path(page).resolve().as_uri())


def plan(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    config = load_config(arguments.recipe, arguments.overrides)
    from phi3v.plan.command import plan_command

    return plan_command(
        config,
        console,
        gpus=arguments.gpu or [],
        count=arguments.gpus,
        sku=arguments.sku,
        nodes=arguments.nodes,
        write=arguments.write,
    )


def doctor(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    config = load_config(arguments.recipe, arguments.overrides)
    from phi3v.doctor import examine

    report = examine(config, console)
    return report.to_json_dict() | {"exit_code": 0 if report.ok else 2}


def azure_skus(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    config = load_config(arguments.recipe, arguments.overrides)
    from phi3v.azure.skus import skus_command

    return skus_command(config, console, nodes=arguments.nodes)


def azure_quota(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.azure.quota import quota_command

    keys = ("region", "sku", "family", "service", "nodes", "request", "yes", "subscription")
    return quota_command(console, **{key: getattr(arguments, key) for key in keys})


def azure_submit(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    if arguments.recipe is None and arguments.name is None:
        raise UserError("a run without a recipe has no name", where="--name", hint="name it, e.g. --name docvqa")
    config = load_config(arguments.recipe, arguments.overrides)
    from phi3v.azure.job import submit_command

    keys = ("sku", "nodes", "workspace", "resource_group", "subscription", "dry_run", "out")
    places = ("data", "model", "compute", "low_priority", "datastore")
    settings = {key: getattr(arguments, key) for key in (*keys, *places)}
    return submit_command(config, console, name=arguments.name or arguments.recipe.stem, **settings)


def eval(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.train.evaluate_finetuned import evaluate_tuned
    from phi3v.train.observers.signals import Signals

    keys = ("metrics", "answer_words", "max_questions", "batch_size", "max_new_tokens")
    settings = {key: getattr(arguments, key) for key in keys if getattr(arguments, key) is not None}
    with Signals() as signals:
        signals.doing = "evaluating; nothing was written"
        result = evaluate_tuned(
            arguments.model,
            arguments.data,
            console,
            base=arguments.base,
            settings=settings,
            num_crops=arguments.num_crops,
            precision=arguments.precision,
            out=arguments.out,
            submission=arguments.submission,
        )
    written = {"submission": str(arguments.submission)} if arguments.submission else {}
    return {"model": arguments.model, "data": str(arguments.data)} | result.summary() | written


def chat(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.evaluate.streaming import Sampling
    from phi3v.serve.address import Address
    from phi3v.serve.command import answer_once, open_page
    from phi3v.serve.conversation import AnswerSettings
    from phi3v.serve.limits import Limits

    limits = Limits(**{entry.name: getattr(arguments, f"max_{entry.name}") for entry in dataclasses.fields(Limits)})
    settings = AnswerSettings(
        arguments.max_new_tokens,
        Sampling(arguments.temperature, arguments.top_p, arguments.seed),
        arguments.num_crops,
    )
    model = {key: getattr(arguments, key) for key in ("base", "precision", "num_crops", "system")}
    asked = {"compare": arguments.compare, "frames": arguments.frames, "settings": settings, "limits": limits}
    if arguments.prompt is None:
        if arguments.media:
            raise UserError("a picture without a question", where="--image", hint='ask with --prompt "…"')
        where = Address(arguments.host, arguments.port, share=arguments.share, password=arguments.password)
        return open_page(arguments.model, console, where, **model, **asked)
    answers = answer_once(
        arguments.model, arguments.prompt, arguments.media or [], console, **model, **asked, stream=not arguments.json
    )
    return {"model": arguments.model, "prompt": arguments.prompt} | answers


def bench_train(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.bench.training import bench_train

    settings = BenchSettings(
        **{entry.name: getattr(arguments, entry.name) for entry in dataclasses.fields(BenchSettings)}
    )
    result = bench_train(
        arguments.methods or METHODS,
        arguments.variants or VARIANTS,
        settings,
        console,
        preset=arguments.preset,
        model=arguments.model,
        data=arguments.data,
        out=arguments.out,
    )
    # A row that cannot run has its reason beside the others; none at all is no result.
    return result | {"exit_code": 2 if all("error" in row for row in result["rows"]) else 0}


def bench_preprocess(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.bench.command import preprocess_command

    names = ("images", "pages", "repeats", "num_crops", "out")
    return preprocess_command(console, **{name: getattr(arguments, name) for name in names})


def bench_generate(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.bench.command import generate_command

    names = ("preset", "model", "data", "questions", "batch_size", "max_new_tokens", "num_crops", "out")
    return generate_command(console, **{name: getattr(arguments, name) for name in names})
