"""Every command with its options, and how a command line is read."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v import __version__, commands
from phi3v.bench.settings import VARIANTS, BenchSettings
from phi3v.config import DEFAULT_MAX_PIXELS, METHODS, METRIC_NAMES, add_keys
from phi3v.data.sources import OWN_DATA, SOURCE_OPTIONS, SOURCES
from phi3v.grammar import Parser
from phi3v.model.preset_fields import PRESET_FIELDS
from phi3v.serve.limits import Limits, limit_option

SHELLS = ("bash", "zsh", "tcsh")

Handler = Callable[[argparse.Namespace, Console], "dict[str, Any] | None"]


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line; its keys of the configuration are in ``overrides``.

    Raises:
        UserError: it cannot be read.
    """
    arguments = build_parser().parse_args(argv)
    arguments.overrides = {key: value for key, value in vars(arguments).items() if "." in key}
    return arguments


def build_parser() -> Parser:
    """Every command with its options."""
    parser = Parser(
        prog="phi3v", description="Fine-tune Phi-3.5-vision and Phi-3-vision on your own images, documents and videos."
    )
    parser.add_argument("--version", action="version", version=f"phi3v {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    model = verbs.add_parser("model", help="make models").add_subparsers(dest="action", required=True)
    init = _command(
        model,
        "init",
        commands.model_init,
        "write a small or random model in the official layout, with processor and tokenizer",
        "phi3v model init --preset tiny --out tiny",
    )
    init.add_argument("--preset", choices=tuple(PRESET_FIELDS), required=True, help="which architecture")
    init.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write it")
    init.add_argument(
        "--pretrained",
        action="store_true",
        help="tiny only: the small base model that comes with the package, in place of random weights",
    )
    init.add_argument("--seed", type=int, default=0, help="seed of random weights (default: %(default)s)")
    init.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: float32 for tiny, bfloat16 for the real sizes)",
    )
    init.add_argument(
        "--tokenizer",
        type=Path,
        default=os.environ.get("PHI3V_TOKENIZER"),
        metavar="DIR",
        help="folder with Phi-3's tokenizer (default: $PHI3V_TOKENIZER, else a small built-in one); "
        "the tiny preset always has the built-in one",
    )

    data = verbs.add_parser("data", help="convert, check and look at data").add_subparsers(dest="action", required=True)
    convert = _command(
        data,
        "convert",
        commands.data_convert,
        "bring a dataset into the JSONL format",
        "phi3v data convert docvqa --source downloads/docvqa --out data/docvqa --on-bad skip",
    )
    convert.add_argument(
        "source",
        choices=tuple(SOURCES),
        metavar="SOURCE",
        help=f"a dataset: {', '.join(name for name in SOURCES if name not in OWN_DATA)}; "
        f"or the form of your own data: {', '.join(OWN_DATA)}",
    )
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write it")
    convert.add_argument(
        "--source",
        dest="location",
        metavar="PATH_OR_HUB_ID",
        help="where the dataset lies: a folder or file here, or a hub id (default: its usual place)",
    )
    convert.add_argument(
        "--on-bad",
        choices=("stop", "skip"),
        default="stop",
        help="bad records and clips: an error that lists them once the good ones are done, "
        "or leave them out and list them (default: %(default)s)",
    )
    convert.add_argument("--workers", type=int, metavar="N", help="threads (default: one a core)")
    convert.add_argument(
        "--max-pixels",
        type=int,
        default=DEFAULT_MAX_PIXELS,
        help="refuse larger pictures unread (default: %(default)s)",
    )
    _add_source_options(convert)
    check = _command(
        data,
        "check",
        commands.data_check,
        "list every fault of a data file with its line, its field and what to do; tokens are counted as the model does "
        "(without one: about as Phi-3.5-vision)",
        "phi3v data check data/train.jsonl",
    )
    check.add_argument("file", type=Path, metavar="FILE.jsonl", help="the data; pictures lie in images/ beside it")
    check.add_argument("--max-errors", type=int, default=20, help="stop after so many faults (default: %(default)s)")
    check.add_argument(
        "--images",
        choices=("decode", "header", "off"),
        default="decode",
        help="how pictures are checked: decoded in full, header only, not at all (default: %(default)s)",
    )
    check.add_argument(
        "--max-pixels",
        type=int,
        default=DEFAULT_MAX_PIXELS,
        help="refuse larger pictures unread (default: %(default)s)",
    )
    check.add_argument(
        "--special-text",
        choices=("refuse", "escape"),
        default="refuse",
        help="literal special tokens such as <|end|> in texts are faults, or are escaped (default: %(default)s)",
    )
    add_keys(check, ("model.path", "model.num_crops"))
    preview = _command(
        data,
        "preview",
        commands.data_preview,
        "write an HTML page of a data file: samples as the model sees them (without a model: 16 crops and the small "
        "built-in tokenizer), counts, sizes, faults",
        "phi3v data preview data/train.jsonl --out preview.html --model.path microsoft/Phi-3.5-vision-instruct",
    )
    preview.add_argument("file", type=Path, metavar="FILE.jsonl", help="the data; pictures lie in images/ beside it")
    preview.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="where to write it")
    preview.add_argument(
        "--samples", type=int, default=12, metavar="N", help="records that are shown (default: %(default)s)"
    )
    add_keys(preview, ("model.path", "model.num_crops"))
    preview.add_argument(
        "--special-text",
        choices=("refuse", "escape"),
        default="refuse",
        help="literal special tokens such as <|end|> in texts are faults, or are escaped (default: %(default)s)",
    )
    preview.add_argument("--open", action="store_true", help="open it in the browser")

    train = _command(
        verbs,
        "train",
        commands.train,
        "fine-tune a model as a recipe says; options override it. SIGTERM, SIGINT and SIGUSR1 end training after its "
        "step, with a checkpoint and exit code 3",
        "phi3v train recipes/easy_vqa_tiny.yaml --training.output_dir output/first",
        brief="fine-tune a model as a recipe says",
    )
    train.usage = "phi3v train [RECIPE.yaml] [--resume [auto|CHECKPOINT]] [--json] [--key.subkey value …]"
    _add_recipe(train, shown=True)
    train.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from this checkpoint, or from the newest valid one of training.output_dir; without any the run "
        "starts anew (default: start anew)",
    )
    evaluate = _command(
        verbs,
        "eval",
        commands.eval,
        "score a model, an adapter or a run on a data file; also under torchrun",
        "phi3v eval output/first --data data/test.jsonl --metrics accuracy token_f1 --out output/first-test",
        brief="score a model, an adapter or a run",
    )
    evaluate.add_argument("model", metavar="MODEL_OR_RUN", help="a model folder, a hub id, an adapter or a run folder")
    evaluate.add_argument(
        "--model", "--base", dest="base", metavar="MODEL", help="the model that it was tuned from, where that has moved"
    )
    evaluate.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl", help="the questions")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="write eval.json and predictions.jsonl there")
    evaluate.add_argument(
        "--submission",
        type=Path,
        metavar="FILE",
        help="write what the official evaluator of docvqa (JSON), nlvr2 or hateful-memes (CSV) takes",
    )
    own = "default: as the run was measured"
    evaluate.add_argument(
        "--metrics",
        nargs="+",
        action="extend",
        choices=METRIC_NAMES,
        metavar="NAME",
        help=f"the scores, the task's own first, from {', '.join(METRIC_NAMES)} ({own}, else accuracy)",
    )
    evaluate.add_argument(
        "--answer-words",
        nargs="+",
        action="extend",
        metavar="WORD",
        help=f"for auroc: the possible answers, the positive one first, e.g. yes no ({own})",
    )
    evaluate.add_argument("--max-questions", type=int, metavar="N", help=f"draw so many ({own}, else all)")
    evaluate.add_argument("--batch-size", type=int, metavar="N", help=f"questions at a time ({own}, else 8)")
    evaluate.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"longest answer ({own}, else by the references)"
    )
    evaluate.add_argument("--num-crops", type=int, metavar="N", help="crops of a page at most (default: as saved)")
    evaluate.add_argument(
        "--precision", choices=("auto", "bf16", "fp16", "fp32"), help=f"arithmetic ({own}, else auto)"
    )
    export = _command(
        verbs,
        "export",
        commands.export,
        "write a tuned model in the official layout, merged and proven, or check a folder",
        "phi3v export output/mine --out models/mine",
        brief="write a merged model, proven; or check a folder",
    )
    export.add_argument(
        "source", nargs="?", metavar="RUN", help="a run, its best/ or final/, a checkpoint, an adapter or a model"
    )
    export.add_argument("--out", type=Path, metavar="DIR", help="where to write it")
    export.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights (default: the original model's)"
    )
    export.add_argument("--adapter", action="store_true", help="the adapter alone, in PEFT's layout")
    moved = "the model that it was tuned from, where that has moved"
    export.add_argument("--model", "--base", dest="base", metavar="MODEL", help=moved)
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: %(default)s)")
    export.add_argument(
        "--samples", type=int, default=4, metavar="N", help="prompts to compare with (default: %(default)s)"
    )
    export.add_argument("--overwrite", action="store_true", help="replace what is in DIR")
    export.add_argument("--verify", type=Path, metavar="DIR", help="only look whether a folder is whole and right")
    report = _command(
        verbs,
        "report",
        commands.report,
        "write one HTML file about a run, or several compared: curves, scores, predictions, configuration",
        "phi3v report output/first output/second --out compared.html",
        brief="write an HTML page of a run, or of several",
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    report.add_argument(
        "--out", type=Path, metavar="FILE.html", help="the file (default: report.html in the run folder, or here)"
    )
    report.add_argument(
        "--pictures",
        type=float,
        default=2.0,
        metavar="MB",
        help="megabytes that small pictures may take in the page (default: %(default)s)",
    )
    report.add_argument("--open", action="store_true", help="open it in the browser")

    _add_chat(verbs)
    plan = _command(
        verbs,
        "plan",
        commands.plan,
        "say what fits which GPUs, how fast it is and what quota it needs; --key.subkey value overrides the recipe",
        "phi3v plan recipes/docvqa_lora.yaml --gpu a100-80gb --gpus 8",
        brief="say what fits which GPUs, and how fast",
    )
    _add_recipe(plan)
    plan.add_argument(
        "--gpu",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="e.g. a100-80gb, or 8xa100-80gb; several for one table over all (default: this machine)",
    )
    plan.add_argument("--gpus", type=int, metavar="N", help="how many of it (default: 1)")
    plan.add_argument("--sku", metavar="SIZE", help="an Azure size in place of --gpu, e.g. Standard_ND96asr_v4")
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of that size (default: %(default)s)")
    plan.add_argument("--write", type=Path, metavar="FILE.yaml", help="write the recipe as recommended")

    doctor = _command(
        verbs,
        "doctor",
        commands.doctor,
        "check environment, recipe, data, model and gradients before a run; exits with 2 if something fails",
        "phi3v doctor recipes/easy_vqa_tiny.yaml",
        brief="check everything before a run",
    )
    _add_recipe(doctor)
    _add_azure(verbs)
    completion = verbs.add_parser(
        "completion",
        help="print a script that completes commands in a shell",
        description="Print a script that completes commands and keys of the configuration.",
        epilog='example: eval "$(phi3v completion bash)"',
    )
    completion.add_argument("shell", choices=SHELLS, help="which shell")
    completion.set_defaults(handler=_completion)
    _add_bench(
        verbs.add_parser("bench", help="measure speed and memory here").add_subparsers(dest="action", required=True)
    )
    return parser


def _add_azure(verbs: Any) -> None:
    azure = verbs.add_parser("azure", help="sizes, quota and jobs").add_subparsers(dest="action", required=True)
    skus = _command(
        azure,
        "skus",
        commands.azure_skus,
        "list the Azure sizes that a recipe fits, the fewest GPUs first, with the quota to ask for; needs no login",
        "phi3v azure skus recipes/docvqa_lora.yaml",
    )
    _add_recipe(skus)
    skus.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of each size (default: %(default)s)")

    subscription: dict[str, Any] = {
        "metavar": "ID",
        "help": "the subscription (default: $AZURE_SUBSCRIPTION_ID, else that of az)",
    }
    quota = _command(
        azure,
        "quota",
        commands.azure_quota,
        "show the limit and the usage of a family of sizes in a region, and ask for more",
        "phi3v azure quota --region westeurope --sku Standard_ND96asr_v4 --request 96",
    )
    quota.add_argument("--region", required=True, metavar="REGION", help="e.g. westeurope")
    quota.add_argument("--sku", metavar="SIZE", help="an Azure size, whose family is meant")
    quota.add_argument("--family", metavar="NAME", help="a family by its name, in place of --sku")
    quota.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes that you want (default: %(default)s)")
    quota.add_argument(
        "--for",
        dest="service",
        choices=("compute", "ml"),
        default="compute",
        help="whose quota: of virtual machines or of Azure Machine Learning (default: %(default)s)",
    )
    quota.add_argument("--request", type=int, metavar="N", help="ask for a limit of N vCPUs; shows it and asks first")
    quota.add_argument("--yes", action="store_true", help="send the request without asking")
    quota.add_argument("--subscription", **subscription)

    submit = _command(
        azure,
        "submit",
        commands.azure_submit,
        "train a recipe as a job of Azure Machine Learning, on one or many nodes; it resumes when it is pre-empted",
        "phi3v azure submit recipes/docvqa_lora.yaml --sku Standard_ND96asr_v4 --workspace W --resource-group G",
    )
    _add_recipe(submit)
    submit.add_argument("--sku", required=True, metavar="SIZE", help="the Azure size of a node")
    submit.add_argument("--nodes", type=int, default=1, metavar="N", help="how many nodes (default: %(default)s)")
    submit.add_argument("--workspace", metavar="NAME", help="the workspace of Azure Machine Learning")
    submit.add_argument("--resource-group", metavar="NAME", help="the resource group of the workspace")
    submit.add_argument(
        "--data",
        metavar="FOLDER_OR_URI",
        help="the folder of the recipe's data files: here (it is uploaded), azureml:NAME:VERSION or azureml://… "
        "(default: where data.train lies)",
    )
    submit.add_argument(
        "--model",
        metavar="FOLDER_OR_URI",
        help="the model, likewise (default: model.path of the recipe; a hub id is downloaded by the job)",
    )
    submit.add_argument("--name", metavar="NAME", help="of the run; the same name resumes (default: the recipe's)")
    submit.add_argument("--compute", metavar="CLUSTER", help="an existing cluster (default: serverless compute)")
    submit.add_argument(
        "--low-priority", action="store_true", help="serverless compute that is cheaper and may be taken away"
    )
    submit.add_argument(
        "--datastore", default="workspaceblobstore", metavar="NAME", help="keeps the run (default: %(default)s)"
    )
    submit.add_argument("--out", type=Path, metavar="DIR", help="the job's folder (default: azure-jobs/NAME)")
    submit.add_argument("--dry-run", action="store_true", help="write the job's folder and check it; needs no login")
    submit.add_argument("--subscription", **subscription)


def _add_chat(verbs: Any) -> None:
    chat = _command(
        verbs,
        "chat",
        commands.chat,
        "ask a model, an adapter or a run about pictures and clips, in the browser or once with --prompt",
        'phi3v chat output/first --prompt "What is the total?" --image page.png',
        brief="ask a model about pictures and clips",
    )
    chat.add_argument("model", metavar="MODEL_OR_RUN", help="a model folder, a hub id, an adapter or a run folder")
    chat.add_argument(
        "--model",
        "--base",
        dest="base",
        metavar="MODEL",
        help="what to compare with; of an adapter, what it goes on (default: what the run was tuned from)",
    )
    chat.add_argument("--compare", action="store_true", help="ask the base too")
    chat.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), help="arithmetic (default: as the run)")
    once = chat.add_argument_group("one answer in the terminal")
    once.add_argument("--prompt", metavar="TEXT", help="the question")
    for option, what in (("--image", "pictures"), ("--video", "clips")):
        once.add_argument(
            option, dest="media", type=Path, nargs="+", action="extend", metavar="FILE", help=f"{what}; may be repeated"
        )
    how = chat.add_argument_group("how it answers; in the browser what is set first")
    how.add_argument(
        "--system", metavar="TEXT", help="a system message, as the records had that it was tuned on (default: none)"
    )
    how.add_argument("--frames", type=int, default=8, metavar="N", help="frames of a clip (default: %(default)s)")
    how.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: %(default)s)"
    )
    how.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest words (default: %(default)s)"
    )
    how.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from so much probability (default: %(default)s)"
    )
    how.add_argument("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")
    how.add_argument("--num-crops", type=int, metavar="N", help="crops of a picture at most (default: as saved)")
    most = chat.add_argument_group("limits, on the page too")
    for entry in dataclasses.fields(Limits):
        text = f"{entry.metadata['help']} (default: {entry.default:,})"
        most.add_argument(
            limit_option(entry.name), type=type(entry.default), default=entry.default, metavar="N", help=text
        )
    page = chat.add_argument_group("the page (extra serve)")
    page.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than this machine's own need a password"
    )
    page.add_argument("--port", type=int, default=7860, help="port, or the next that is free (default: %(default)s)")
    page.add_argument(
        "--share", action="store_true", help="also reachable through Gradio's public tunnel; needs a password"
    )
    page.add_argument(
        "--password",
        default=os.environ.get("PHI3V_PASSWORD"),
        help="ask for it, with the user name phi3v (default: $PHI3V_PASSWORD)",
    )


def _add_bench(bench: Any) -> None:
    usual = BenchSettings()
    train = _command(
        bench,
        "train",
        commands.bench_train,
        "speed and memory of training, beside the public recipe's training in the same call; also under torchrun",
        "phi3v bench train --methods lora --variants recipe samples shared-image --out lora.json",
    )
    train.add_argument("--methods", nargs="+", action="extend", choices=METHODS, help="(default: all)")
    train.add_argument("--variants", "--ways", nargs="+", action="extend", choices=VARIANTS, help="(default: all)")
    train.add_argument("--steps", type=int, default=usual.steps, help="steps timed, after one (default: %(default)s)")
    train.add_argument(
        "--seconds", type=float, default=usual.seconds, help="a row ends after so many (default: %(default)s)"
    )
    numbers = {
        "batch_size": "samples of an optimizer step, over all devices",
        "num_crops": "crops of a page at most",
        "micro_batch": "samples at a time of the variant padded",
        "lean_batch": "samples of a step of the variant lean",
        "pack_tokens": "tokens of a packed row",
        "shared_image_max": "questions of a page that share a step at most",
        "rank": "of the adapters",
    }
    for field, text in numbers.items():
        option, value = f"--{field.replace('_', '-')}", getattr(usual, field)
        train.add_argument(option, type=int, default=value, metavar="N", help=f"{text} (default: %(default)s)")
    train.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default=usual.precision)
    train.add_argument(
        "--optimizer",
        choices=("auto", "adamw", "adamw_8bit", "adamw_bf16"),
        default=usual.optimizer,
        help="of all variants but lean; auto: adamw, and adamw_8bit for full and frozen-vision on a GPU",
    )
    train.add_argument("--kernels", choices=("torch", "liger"), default=usual.kernels, help="of our variants")
    train.add_argument("--fp8", action="store_true", help="our variants multiply in float8 in the decoder; not exact")
    preprocess = _command(
        bench,
        "preprocess",
        commands.bench_preprocess,
        "what a page costs a core, beside the official processor",
        "phi3v bench preprocess --pages 4",
    )
    preprocess.add_argument("--images", type=Path, metavar="DIR", help="pictures in place of drawn pages of 1275x1650")
    preprocess.add_argument("--pages", type=int, default=8, metavar="N", help="(default: %(default)s)")
    preprocess.add_argument("--repeats", type=int, default=9, metavar="N", help="(default: %(default)s)")
    preprocess.add_argument("--num-crops", type=int, default=16, metavar="N", help="(default: %(default)s)")
    generate = _command(
        bench,
        "generate",
        commands.bench_generate,
        "answering questions in batches, beside one at a time",
        "phi3v bench generate --model output/first/final --data data/test.jsonl",
    )
    generate.add_argument("--questions", type=int, default=64, metavar="N", help="(default: %(default)s)")
    generate.add_argument("--batch-size", type=int, default=64, metavar="N", help="(default: %(default)s)")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    generate.add_argument("--num-crops", type=int, metavar="N", help="(default: as the model says)")
    for command in (train, generate):
        which = command.add_mutually_exclusive_group()
        which.add_argument(
            "--preset",
            choices=tuple(PRESET_FIELDS),
            help="random weights (default: phi-3.5-vision on a GPU, else tiny)",
        )
        which.add_argument("--model", type=Path, metavar="DIR", help="a model in place of random weights")
        command.add_argument("--data", type=Path, metavar="FILE.jsonl", help="in place of drawn pages")
    for command in (train, preprocess, generate):
        command.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there")


def _add_source_options(convert: argparse.ArgumentParser) -> None:
    """The options of `SOURCE_OPTIONS`; one that was not given is None, so that a source can refuse it if it was."""
    helps: dict[str, tuple[str, dict[str, Any]]] = {
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
            "folder that picture paths are relative to (default: that of the data file)",
            {"type": Path, "metavar": "DIR"},
        ),
        "question": (
            "the question of every record; of folders, {classes} in it stands for the names of the classes",
            {"metavar": "TEXT"},
        ),
        "image_columns": ("columns of picture paths", {"nargs": "+", "action": "extend"}),
        "question_column": ("column of questions", {}),
        "answer_column": ("column of answers", {}),
        "split_column": ("column of train, val, eval or test", {}),
        "id_column": ("column of ids", {}),
    }
    group = convert.add_argument_group("options that some sources take", "columns that are not named are guessed")
    for field, (option, sources) in SOURCE_OPTIONS.items():
        text, settings = helps[field]
        if option.endswith("-column"):
            settings = settings | {"metavar": "NAME"}
        taken_by = "your own data" if sources == OWN_DATA else ", ".join(sources)
        group.add_argument(option, dest=field, help=f"{taken_by}: {text}", **settings)


def _add_recipe(command: Parser, *, shown: bool = False) -> None:
    command.add_argument(
        "recipe",
        type=Path,
        nargs="?",
        metavar="RECIPE.yaml",
        help="a YAML file; --key.subkey value overrides it, or stands alone"
        + ("" if shown else " (phi3v train --help lists the keys)"),
    )
    add_keys(command, shown=shown)


def _command(
    verbs: Any, name: str, handler: Handler, summary: str, example: str, *, brief: str | None = None
) -> Parser:
    """A command; ``brief`` is its line in the list of all commands, which is to fit a screen."""
    command: Parser = verbs.add_parser(
        name,
        help=brief or summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example: {example}",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
    command.set_defaults(handler=handler)
    return command


def _completion(arguments: argparse.Namespace, console: Console) -> None:
    import shtab

    parser = build_parser()
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for verb in ("plan", "doctor"):
        for action in verbs.choices[verb]._actions:
            action.help = "" if action.help == argparse.SUPPRESS else action.help
    print(shtab.complete(parser, arguments.shell))
