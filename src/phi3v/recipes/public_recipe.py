"""The command lines of Microsoft's public recipe, translated to our configuration.

The scripts next to this file have the names, flags and defaults of the recipe. Each flag only sets the configuration
key listed in ``docs/from_the_recipe.md``; training is that of ``phi3v train``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from filelock import FileLock
from rich.console import Console

from phi3v.cli import run_command
from phi3v.config import DataConfig, RunConfig, load_config
from phi3v.data.convert import ConvertOptions
from phi3v.data.sources import SOURCES
from phi3v.errors import UserError

MAX_CROPS = 16
# Names of evaluation splits, on the hub and in the original distributions; the first that exists is used.
EVAL_SPLITS = ("val", "dev", "dev_seen", "test", "test_seen", "test1")

# Flags that set a key to their value; the others choose between values.
KEYS = {
    "--model_name_or_path": "model.path",
    "--num_crops": "model.num_crops",
    "--lora_rank": "method.lora.rank",
    "--lora_alpha_ratio": "method.lora.alpha_ratio",
    "--lora_dropout": "method.lora.dropout",
    "--output_dir": "training.output_dir",
    "--overwrite": "training.overwrite",
    "--num_train_epochs": "training.epochs",
    "--batch_size": "training.batch_size",
    "--batch_size_per_gpu": "training.micro_batch_size",
    "--learning_rate": "training.learning_rate",
    "--wd": "training.weight_decay",
}
# The flag to name in a message about a key.
_FLAGS = {key: flag for flag, key in KEYS.items()} | {
    "model.attention": "--use_flash_attention",
    "training.precision": "--bf16",
    "method.name": "--use_lora/--use_qlora",
    "data.train": "--data_dir",
    "data.eval": "--data_dir",
}


@dataclass(frozen=True)
class Task:
    """One of the recipe's tasks.

    Attributes:
        name: as in the name of the script.
        source: its name in ``phi3v data convert``.
        metrics: the metrics, primary first.
        answer_words: the answers whose probabilities ``auroc`` compares.
        prefix: prefix of its .jsonl files.
        small_source: hub id of the dataset to train on without ``--full_train``.
    """

    name: str
    source: str
    metrics: tuple[str, ...]
    answer_words: tuple[str, ...] = ()
    prefix: str = ""
    small_source: str | None = None


TASKS = {
    task.name: task
    for task in (
        Task("docvqa", "docvqa", ("anls",), small_source="nielsr/docvqa_1200_examples"),
        Task("hateful_memes", "hateful-memes", ("accuracy", "auroc"), ("Yes", "No")),
        Task("nlvr2", "nlvr2", ("accuracy", "consistency")),
        Task("ucf101", "ucf101", ("accuracy", "per_class_accuracy"), prefix="ucf101_"),
    )
}


class _Parser(argparse.ArgumentParser):
    """Raises wrong flags as `UserError`, so that only one process prints the message."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, where=self.prog, hint="--help lists the flags")


def fine_tune(name: str, argv: Sequence[str] | None = None) -> int:
    """Run ``finetune_hf_trainer_NAME.py`` and return its exit code.

    Args:
        name: a key of `TASKS`.
        argv: the flags; default: those of this process.
    """

    argv = sys.argv[1:] if argv is None else argv

    def work(console: Console) -> None:
        flags = build_parser(TASKS[name]).parse_args(argv)
        with _in_flags():
            _train(TASKS[name], flags, console)

    # Show the hub's progress bars only if a dataset may be downloaded.
    names = {argument.split("=", 1)[0] for argument in argv}
    return run_command(work, show_downloads=not names & {"--no-tqdm", "--data_dir"})


def convert_ucf101(argv: Sequence[str] | None = None) -> int:
    """Run ``convert_ucf101.py`` and return its exit code."""

    def work(console: Console) -> None:
        parser = _Parser(
            prog="convert_ucf101.py",
            description="Take 8 frames of every clip of the UCF-101 subset; as phi3v data convert ucf101.",
        )
        parser.add_argument("--out_dir", type=Path, default=Path("ucf101"), metavar="D", help="the data folder")
        parser.add_argument(
            "--source", metavar="PATH", help="tar file or folder of clips (default: the hub's sayakpaul/ucf101-subset)"
        )
        flags = parser.parse_args(argv)
        SOURCES["ucf101"](ConvertOptions(flags.out_dir, flags.source, on_bad="skip")).render(console)

    return run_command(work, show_downloads=True)


def build_parser(task: Task) -> argparse.ArgumentParser:
    """The flags of the script of a task, with the recipe's defaults."""
    script = f"finetune_hf_trainer_{task.name}.py"
    parser = _Parser(
        prog=script,
        description=f"Fine-tune on {task.name} with the flags of Microsoft's public recipe; as phi3v train.",
        epilog=f"example: torchrun --nproc_per_node=8 {script} --bf16 --use_flash_attention --batch_size 64",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    switch, value = parser.add_argument, parser.add_argument
    value("--model_name_or_path", default="microsoft/Phi-3.5-vision-instruct", help="folder or hub id of the model")
    value("--data_dir", type=Path, help="folder of converted data; without it the data is converted into data/ first")
    if task.small_source:
        switch("--full_train", action="store_true", help="the whole train split, not the small one")
    switch("--use_flash_attention", action="store_true", help="use it where it can run; otherwise print the reason")
    switch("--bf16", action="store_true", help="bf16 instead of fp16 (without a GPU fp32)")
    switch("--use_lora", action="store_true", help="train adapters")
    switch("--use_qlora", action="store_true", help="train adapters over 4-bit weights")
    switch("--freeze_vision_model", action="store_true", help="train the decoder only; no adapters in the vision part")
    value("--lora_rank", type=int, default=64, help="rank of the adapters")
    value("--lora_alpha_ratio", type=float, default=2.0, help="LoRA's alpha divided by its rank")
    value("--lora_dropout", type=float, default=0.0, help="dropout before the adapters")
    value("--output_dir", default="./output/", help="the run folder")
    switch("--overwrite", action="store_true", help="replace an existing run in the run folder")
    value("--batch_size", type=int, default=16, help="samples per optimizer step, over all processes")
    value("--batch_size_per_gpu", type=int, default=1, help="samples that a process computes at once")
    value("--num_crops", type=int, default=16, help=f"crops per image, at most {MAX_CROPS}")
    value("--num_train_epochs", type=float, default=1, help="passes over the data")
    value("--learning_rate", type=float, default=4e-5, help="peak learning rate")
    value("--wd", type=float, default=0.01, help="weight decay")
    switch("--no-tqdm", dest="progress_bar", action="store_false", help="lines instead of progress bars")
    return parser


def to_config(task: Task, flags: argparse.Namespace, *, has_gpu: bool) -> RunConfig:
    """The configuration for the flags, without the data.

    Args:
        task: the task of the script.
        flags: from `build_parser`.
        has_gpu: whether this machine has a GPU.

    Raises:
        UserError: a value is out of range.
    """
    if flags.num_crops > MAX_CROPS:
        raise UserError(f"must be at most {MAX_CROPS}, got {flags.num_crops}", where="model.num_crops")
    method = "frozen-vision" if flags.freeze_vision_model else "full"
    if flags.use_lora or flags.use_qlora:
        method = "qlora" if flags.use_qlora else "lora"
    precision = "fp16" if has_gpu else "fp32"
    settings = {key: getattr(flags, flag.removeprefix("--")) for flag, key in KEYS.items()} | {
        # `auto` is flash attention where it can run, and prints the reason where it cannot.
        "model.attention": "auto" if flags.use_flash_attention else "sdpa",
        "method.name": method,
        "method.lora.parts": ["decoder", "head", *([] if flags.freeze_vision_model else ["vision", "projector"])],
        "training.precision": "bf16" if flags.bf16 else precision,
        "training.progress_bar": flags.progress_bar,
        "evaluation.metrics": task.metrics,
        "evaluation.answer_words": task.answer_words,
        "evaluation.max_new_tokens": 64,
        "training.warmup_steps": 50,
    }
    return load_config(None, settings)


def find_data(task: Task, folder: Path) -> tuple[Path, Path] | None:
    """The training and evaluation file in a folder of converted data; None if either is missing."""
    train = folder / f"{task.prefix}train.jsonl"
    to_evaluate_on = (folder / f"{task.prefix}{split}.jsonl" for split in EVAL_SPLITS)
    found = next((file for file in to_evaluate_on if file.is_file()), None)
    return (train, found) if train.is_file() and found is not None else None


def _train(task: Task, flags: argparse.Namespace, console: Console) -> None:
    import torch

    from phi3v.report.live import train_with_report
    from phi3v.train.checks import Case, require_possible
    from phi3v.train.device import choose_device
    from phi3v.train.methods.loading import inspect_model
    from phi3v.train.run_folder import check_run_folder

    config = to_config(task, flags, has_gpu=torch.cuda.is_available())
    config.accumulation_steps(int(os.environ.get("WORLD_SIZE", "1")))
    if config.training.precision == "fp32":
        console.print("precision: fp32; without --bf16 the recipe computes in fp16, which needs a GPU")
    if flags.data_dir is not None:
        files = find_data(task, flags.data_dir)
        if files is None:
            names = ", ".join(f"{task.prefix}{split}.jsonl" for split in EVAL_SPLITS)
            raise UserError(
                f"is not a folder of converted data: it needs {task.prefix}train.jsonl and one of {names}",
                where=f"--data_dir {flags.data_dir}",
                hint=f"create one: phi3v data convert {task.source} --out {flags.data_dir}",
            )
        if getattr(flags, "full_train", False):
            console.print("data: --data_dir names the training data, so --full_train has no effect")
    else:
        # Find errors before hours of download.
        check_run_folder(config)
        runtime = choose_device(config.training.precision)
        require_possible(Case(config, runtime, inspect_model(config, runtime).skeleton))
        files = _converted_data(task, console, small=not getattr(flags, "full_train", False), bars=flags.progress_bar)
    train, to_evaluate_on = files
    config.data = DataConfig(train=str(train), eval=str(to_evaluate_on))
    console.print(f"data: training on {train}, evaluating on {to_evaluate_on}", highlight=False, soft_wrap=True)
    train_with_report(config, console)


def _converted_data(task: Task, console: Console, *, small: bool, bars: bool) -> tuple[Path, Path]:
    """The task's data from the hub, converted by the first process of each machine; the others wait for it.

    They wait for the files and not with a collective operation, which would time out long before such a download ends.

    Raises:
        UserError: it cannot be downloaded or converted.
    """
    source = task.small_source if small else None
    folder = Path("data") / (f"{task.name}_small" if source else task.name)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        while (files := find_data(task, folder)) is None:
            time.sleep(1)
        return files
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # machines may share the folder
        if (files := find_data(task, folder)) is None:
            console.print(f"converting {task.name} into {folder}", highlight=False)
            SOURCES[task.source](ConvertOptions(folder, source, on_bad="skip", progress=bars)).render(console)
            files = find_data(task, folder)
    if files is None:
        raise UserError(
            "has no training split or no evaluation split",
            where=str(folder),
            hint="convert the data with `phi3v data convert` and give its folder: --data_dir",
        )
    return files


@contextlib.contextmanager
def _in_flags() -> Iterator[None]:
    """Let errors name the flags of the command line instead of configuration keys."""
    try:
        yield
    except UserError as error:
        error.what = _with_flags(error.what)
        error.where = _with_flags(error.where) if error.where else None
        error.hint = _with_flags(error.hint) if error.hint else None
        raise


def _with_flags(text: str) -> str:
    for key in sorted(_FLAGS, key=len, reverse=True):
        text = re.sub(rf"(?:--)?\b{re.escape(key)}\b(?: true\b)?", _FLAGS[key], text)
    return text
