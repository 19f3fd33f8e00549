"""The command line: find a command, run it, print errors in one form, return the exit code.

Exit codes: 0 done; 1 a fault of ours, or another process of the run was lost; 2 the user's input was wrong; 3 stopped
by a signal, with everything saved that there was to save; 130 interrupted at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from phi3v import __version__
from phi3v.errors import LostRankError, StoppedError, UserError
from phi3v.grammar import RECIPES, Parser
from phi3v.terminal import lasting_output

# Their `command.py` declares commands, with the handlers; none of them imports a heavy library before it is called.
ROOMS = (
    "recipes",
    "model",
    "data",
    "train",
    "evaluate",
    "export",
    "report",
    "serve",
    "plan",
    "doctor",
    "azure",
    "bench",
)
SHELLS = ("bash", "zsh", "tcsh")
# A recipe is a name or a file.
COMPLETE_RECIPES = {
    "bash": f'_phi3v_recipes() {{ compgen -W "{" ".join(RECIPES)}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": f"_phi3v_recipes() {{ _alternative 'recipes:recipe:({' '.join(RECIPES)})' 'files:file:_files'; }}",
}
SECONDS_FOR_RANK_0 = 10.0  # to print its error, on a busy machine


def build_parser() -> Parser:
    """Every command with its options."""
    parser = Parser(
        prog="phi3v", description="Fine-tune Phi-3.5-vision and Phi-3-vision on images, documents and videos."
    )
    parser.add_argument("--version", action="version", version=f"phi3v {__version__}")
    parser.add_subparsers(metavar="COMMAND")
    for room in ROOMS:
        importlib.import_module(f"phi3v.{room}.command").add_commands(parser)
    completion = parser.add_command(
        "completion",
        _completion,
        "print a script that completes commands and keys of the configuration in a shell",
        'eval "$(phi3v completion bash)"',
        brief="print a script that completes commands in a shell",
    )
    completion.add_argument("shell", choices=SHELLS, help="which shell")
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, as `Parser.read`."""
    return build_parser().read(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)

    def work(console: Console) -> dict[str, Any] | None:
        arguments = parse(words)
        ranks = os.environ.get("WORLD_SIZE", "1")
        if ranks != "1" and not arguments.on_all_ranks:
            raise UserError(
                f"this is the work of one process, and {ranks} were started",
                where=arguments.command,
                hint="start it without torchrun (WORLD_SIZE is set)",
            )
        result: dict[str, Any] | None = arguments.handler(arguments, console)
        return result

    takes_long = words[:2] == ["data", "convert"] or any(word.startswith("--push") for word in words)
    try:
        return run_command(work, as_json="--json" in words, show_downloads=takes_long)
    except SystemExit as stop:
        if stop.code:
            raise
        return 0  # --help, --version


def run_command(
    work: Callable[[Console], dict[str, Any] | None], *, as_json: bool = False, show_downloads: bool = False
) -> int:
    """Run a command and return its exit code.

    Args:
        work: takes the console to print on; returns what ``--json`` prints. A `UserError` becomes one message, from
            the first rank where all ranks met it.
        as_json: print one JSON object on standard output and everything else on standard error.
        show_downloads: show the hub's progress bars, of uploads too.
    """
    is_first_rank = os.environ.get("RANK", "0") == "0"
    # Libraries print advice meant for notebooks; the terminal is for our output.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not (show_downloads and is_first_rank):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait for each other on a busy CPU should sleep, not spin; on an idle one this costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # torchao tells of kernels for other machines that it has not loaded, and has torch tell of its own imports.
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # from one library to another
    warnings.filterwarnings("ignore", message="Corrupt EXIF data")  # of an image that is whole
    # DeepSpeed prints remarks on standard output as soon as a library imports it, whether it is used or not.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    with lasting_output():
        return _run(work, as_json=as_json, is_first_rank=is_first_rank)


def _run(work: Callable[[Console], dict[str, Any] | None], *, as_json: bool, is_first_rank: bool) -> int:
    console = Console(stderr=as_json, quiet=not is_first_rank)
    # Libraries that print to standard output must not break the one JSON object.
    output = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    ours = "error" if is_first_rank else f"error on rank {os.environ['RANK']}"
    try:
        with output:
            result = work(console)
    except UserError as error:
        if not (is_first_rank or error.one_rank):
            # Rank 0 has met it too and prints it for all. The launcher ends all ranks once one has ended, so that must
            # not be this one; and if this one is still here then, rank 0 has not met it after all.
            time.sleep(SECONDS_FOR_RANK_0)
        print(f"{ours}: {error}", file=sys.stderr)
        return 2
    except StoppedError as error:
        if is_first_rank:
            print(error, file=sys.stderr)
        return 3
    except LostRankError as error:
        print(f"{ours}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    code = int((result or {}).pop("exit_code", 0))
    if as_json and result is not None and is_first_rank:
        print(json.dumps(result))
    return code


def _completion(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    import shtab

    parser = build_parser()
    for name in ("plan", "doctor"):
        for action in parser.verbs[name]._actions:
            action.help = "" if action.help == argparse.SUPPRESS else action.help
    for verb in ("train", "plan", "doctor"):
        recipe = next(action for action in parser.verbs[verb]._actions if action.dest == "recipe")
        recipe.complete = {"bash": "_phi3v_recipes", "zsh": "_phi3v_recipes", "tcsh": "f"}  # type: ignore[attr-defined]
    script = shtab.complete(parser, arguments.shell, preamble=COMPLETE_RECIPES)
    print(script)
    return {"shell": arguments.shell, "script": script}


if __name__ == "__main__":
    sys.exit(main())
