"""``phi3v data``: convert, check and preview data files, and make pairs of a model's answers."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v.config import DEFAULT_MAX_PIXELS, METRIC_NAMES, PRECISIONS, add_keys, load_config
from phi3v.data.sources import OWN_DATA, SOURCE_OPTIONS, SOURCES, require_taken
from phi3v.errors import UserError
from phi3v.grammar import Parser
from phi3v.paths import url_of
from phi3v.terminal import say

MAX_PIXELS: dict[str, Any] = {
    "type": int,
    "default": DEFAULT_MAX_PIXELS,
    "help": "refuse larger images without decoding them",
}
SPECIAL_TEXT: dict[str, Any] = {
    "choices": ("refuse", "escape"),
    "default": "refuse",
    "help": "literal special tokens such as <|end|> in texts are faults, or are escaped",
}
FILE: dict[str, Any] = {
    "type": Path,
    "metavar": "FILE.jsonl",
    "help": "the data; its images are in the folder images/ next to it (or a folder of shards, or its URL)",
}


def add_commands(verbs: Parser) -> None:
    group = verbs.add_group("data", "convert, check, preview and make data")
    _add_convert(group)
    command = group.add_command(
        "check",
        check,
        "list every fault of a data file with its line, its field and what to do; tokens are counted as by the model "
        "(without --model.path: approximately as by Phi-3.5-vision)",
        "phi3v data check data/train.jsonl",
    )
    command.add_argument("files", nargs="+", **FILE)
    command.add_argument("--max-errors", type=int, default=20, help="stop after this many faults")
    command.add_argument(
        "--images",
        choices=("decode", "header", "off"),
        default="decode",
        help="how images are checked: decoded in full, header only, not at all",
    )
    command.add_argument("--max-pixels", **MAX_PIXELS)
    command.add_argument("--special-text", **SPECIAL_TEXT)
    add_keys(command, ("model.path", "model.num_crops"))
    command = group.add_command(
        "preview",
        preview,
        "write an HTML page of a data file: samples as the model sees them (without a model: 16 crops and the small "
        "built-in tokenizer), counts, sizes, faults",
        "phi3v data preview data/train.jsonl --out preview.html --model.path microsoft/Phi-3.5-vision-instruct",
    )
    command.add_argument("file", **FILE)
    command.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="where to write it")
    command.add_argument("--samples", type=int, default=12, metavar="N", help="number of records to show")
    add_keys(command, ("model.path", "model.num_crops"))
    command.add_argument("--special-text", **SPECIAL_TEXT)
    command.add_argument("--open", action="store_true", help="open it in the browser")
    _add_pairs(group)
    _add_shard(group)


def _add_shard(group: Parser) -> None:
    command = group.add_command(
        "shard",
        shard,
        "cut JSONL files and their images into tar files (WebDataset) with an index, for data.train at any URL; or "
        "write the index alone of tar or parquet files that are there already",
        "phi3v data shard data/train.jsonl --out shards/train",
        brief="cut data into tar files, for training from a URL",
    )
    command.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="JSONL files; with --index-only tar or parquet files, a folder of these, or their URLs",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards and the index")
    command.add_argument(
        "--shard-size", type=_size, default="500MB", metavar="SIZE", help="size of a shard, e.g. 500MB or 1GB"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the order of the pages")
    command.add_argument(
        "--index-only",
        action="store_true",
        help="write only the index of tar or parquet files, which stay where they are",
    )
    command.add_argument(
        "--question", metavar="TEXT", help="--index-only: the question of samples that have only a text, e.g. a caption"
    )
    command.add_argument("--workers", type=int, metavar="N", help="shards at a time (default: one per core, at most 4)")
    command.add_argument("--max-pixels", **MAX_PIXELS)
    command.add_argument("--special-text", **SPECIAL_TEXT)
    add_keys(command, ("model.path",))


def _size(text: str) -> int:
    """A number of bytes, with its unit: of a bare number, nobody knows which one is meant."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMG])B?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 1GB")
    return round(float(found[1]) * {"K": 10**3, "M": 10**6, "G": 10**9}[found[2].upper()])


def shard(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.data.shards.write import ShardOptions, shard_data

    if (url := url_of(arguments.out)) is not None:
        hint = (
            f"name a folder, then copy it, index.json last: `aws s3 cp --recursive DIR {url}`, or your store's own tool"
        )
        raise UserError("shards are written on this machine", where=f"--out {url}", hint=hint)
    for source in arguments.source:
        _require_no_recipe(Path(source))
    options = ShardOptions(
        shard_size=arguments.shard_size,
        seed=arguments.seed,
        special_text=arguments.special_text,
        max_pixels=arguments.max_pixels,
        workers=arguments.workers,
        question=arguments.question,
    )
    processor = None
    if "model.path" in arguments.overrides:
        from phi3v.train.methods.loading import load_processor

        processor = load_processor(load_config(None, arguments.overrides))
    if arguments.index_only:
        from phi3v.data.shards.existing import index_existing

        told = index_existing(arguments.source, arguments.out, options, processor=processor)
    else:
        told = shard_data([Path(name) for name in arguments.source], arguments.out, options, processor=processor)
    say(
        console,
        f"{told['records']:,} records in {told['shards']:,} shards, {told['bytes'] / 1e6:,.1f} MB: {told['out']}",
    )
    say(console, f"index: {told['index_bytes'] / 1e6:,.1f} MB; train on it with --data.train {told['out']}")
    return told


def _add_pairs(group: Parser) -> None:
    command = group.add_command(
        "pairs",
        pairs,
        "make preference data of a model's own answers: draw several to each question, score them against the "
        "references, write the best and the worst; goes on where it was interrupted; also under torchrun",
        "phi3v data pairs --model output/first --data data/train.jsonl --metric anls --out data/pairs",
        brief="make preference data of a model's own answers",
        on_all_ranks=True,
    )
    command.add_argument(
        "--model", required=True, metavar="MODEL_OR_RUN", help="a model folder, a hub id, an adapter or a run folder"
    )
    command.add_argument("--base", metavar="MODEL", help="the base model, if it has moved")
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="questions with references (or a folder of shards, or its URL)",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for pairs.jsonl and answers.jsonl"
    )
    own = "default: as the run was evaluated"
    names = [name for name in METRIC_NAMES if name != "auroc"]
    command.add_argument(
        "--metric", choices=names, metavar="NAME", help=f"score of an answer, from {', '.join(names)} ({own})"
    )
    command.add_argument("--samples", type=int, default=8, metavar="K", help="answers to each question")
    command.add_argument("--temperature", type=float, default=1.0, metavar="T", help="higher ones draw more freely")
    command.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="draw from the likeliest tokens with this probability"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws")
    command.add_argument(
        "--chosen",
        choices=("best", "reference"),
        default="best",
        help="the better answer of a pair: the best one drawn, or the reference",
    )
    command.add_argument(
        "--min-margin",
        type=float,
        default=0.0,
        metavar="M",
        help="minimum difference of the two scores; it is always above 0",
    )
    command.add_argument("--max-questions", type=int, metavar="N", help="size of a random sample (default: all)")
    command.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="answers drawn at once, fewer of long prompts; those to one question stay together",
    )
    command.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"maximum tokens of an answer ({own}, else by the references)"
    )
    command.add_argument(
        "--num-crops", type=int, metavar="N", help="maximum number of crops per image (default: as saved)"
    )
    command.add_argument("--precision", choices=PRECISIONS, help=f"precision of computation ({own}, else auto)")


def _add_convert(group: Parser) -> None:
    command = group.add_command(
        "convert",
        convert,
        "convert a dataset to the JSONL format",
        "phi3v data convert docvqa --source downloads/docvqa --out data/docvqa --on-bad skip",
    )
    command.add_argument(
        "source",
        choices=tuple(SOURCES),
        metavar="SOURCE",
        help=f"a dataset: {', '.join(name for name in SOURCES if name not in OWN_DATA)}; "
        f"or the form of your own data: {', '.join(OWN_DATA)}",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write it")
    command.add_argument(
        "--source",
        dest="location",
        metavar="PATH_OR_HUB_ID",
        help="location of the dataset: a local folder or file, or a hub id (default: its usual place)",
    )
    command.add_argument(
        "--on-bad",
        choices=("stop", "skip"),
        default="stop",
        help="bad records and clips: stop with an error that lists them once the others are converted, "
        "or skip and list them",
    )
    command.add_argument("--workers", type=int, metavar="N", help="threads (default: one per core)")
    command.add_argument("--max-pixels", **MAX_PIXELS)
    # An option that was not given is None, so that a source that does not take it can refuse it.
    own: dict[str, tuple[str, dict[str, Any]]] = {
        "num_frames": ("frames of a clip (default: 8)", {"type": int, "metavar": "N"}),
        "special_text": (
            "literal special tokens such as <|end|> in texts make a record bad, or are escaped (default: refuse)",
            {"choices": ("refuse", "escape")},
        ),
        "eval_share": (
            "share that goes to eval.jsonl if the data has no splits (default: 0.1 of folders, else 0)",
            {"type": float, "metavar": "SHARE"},
        ),
        "image_root": (
            "folder that image paths are relative to (default: that of the data file)",
            {"type": Path, "metavar": "DIR"},
        ),
        "question": (
            "the question of every record; of folders, {classes} in it stands for the names of the classes",
            {"metavar": "TEXT"},
        ),
        "image_columns": ("columns of image paths", {"nargs": "+", "action": "extend", "metavar": "NAME"}),
        "question_column": ("column of questions", {"metavar": "NAME"}),
        "answer_column": ("column of answers", {"metavar": "NAME"}),
        "rejected_columns": ("columns of worse answers", {"nargs": "+", "action": "extend", "metavar": "NAME"}),
        "label_column": ("column that says whether the answer is good", {"metavar": "NAME"}),
        "split_column": ("column of train, val, eval or test", {"metavar": "NAME"}),
        "id_column": ("column of ids", {"metavar": "NAME"}),
    }
    options = command.add_argument_group("options that some sources take", "columns that are not named are guessed")
    for field, (option, sources) in SOURCE_OPTIONS.items():
        text, settings = own[field]
        taken_by = "your own data" if sources == OWN_DATA else ", ".join(sources)
        options.add_argument(option, dest=field, help=f"{taken_by}: {text}", **settings)


def convert(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.data.sources.records import OwnDataOptions

    given = {field: value for field in SOURCE_OPTIONS if (value := getattr(arguments, field)) is not None}
    require_taken(arguments.source, given)
    given = {field: tuple(value) if isinstance(value, list) else value for field, value in given.items()}
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


def check(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.data.check import check_file
    from phi3v.data.lengths import Context
    from phi3v.data.shards.index import describe_fetching, is_shards

    context = Context()
    config = load_config(None, arguments.overrides)
    if "model.path" in arguments.overrides:
        from phi3v.model.presets import planned_config
        from phi3v.train.methods.loading import load_processor

        longest = planned_config(config.model.path)[0].max_position_embeddings
        context = Context(longest, load_processor(config))
    for file in arguments.files:
        _require_no_recipe(file)
        if is_shards(file) and arguments.images != "off" and (told := describe_fetching(file)):
            say(console, f"{told}; --images off looks at the records alone")
    reports = []
    for file in arguments.files:
        report = check_file(
            file,
            max_errors=arguments.max_errors,
            max_pixels=arguments.max_pixels,
            image_level=arguments.images,
            special_text=arguments.special_text,
            context=context,
        )
        report.render(console)
        reports.append(report)
    ok = all(report.ok for report in reports)
    found = [report.to_json_dict() for report in reports]
    return (found[0] if len(found) == 1 else {"ok": ok, "files": found}) | {"exit_code": 0 if ok else 2}


def _require_no_recipe(file: Path) -> None:
    if file.suffix in (".yaml", ".yml"):
        hint = f"name its data files one after the other, or check all of it: `phi3v doctor {file}`"
        raise UserError("is a recipe, not data", where=str(file), hint=hint)


def pairs(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from phi3v.train.observers.signals import Signals
    from phi3v.train.pairs import PairOptions, make_pairs

    options = PairOptions(**{field.name: getattr(arguments, field.name) for field in fields(PairOptions)})
    with Signals() as signals:
        signals.doing = "drawing answers; the same command goes on from here"
        return make_pairs(arguments.model, arguments.data, arguments.out, console, options, base=arguments.base)


def preview(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    _require_no_recipe(arguments.file)
    num_crops = load_config(None, arguments.overrides).model.num_crops
    from phi3v.report.page import announce_page
    from phi3v.report.preview import preview

    told = preview(
        arguments.file,
        arguments.out,
        samples=arguments.samples,
        model=arguments.overrides.get("model.path"),
        num_crops=num_crops,
        special_text=arguments.special_text,
    )
    say(console, f"tokens: {told['tokenizer']}")
    if told["faults"]:
        say(console, f"faults: {told['faults']}, listed in the page")
    announce_page(console, told["preview"], told["bytes"], show=arguments.open)
    return told
