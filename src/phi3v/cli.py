"""The command line: run a command, say what is wrong in one form, give the exit code.

Exit codes: 0 done; 1 a fault of ours, or another process of the run was lost; 2 the user's input was wrong; 3 stopped
by a signal, with everything saved that there was to save; 130 interrupted at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from phi3v import __version__
from phi3v.errors import LostRankError, StoppedError, UserError
from phi3v.grammar import Parser

# Their `command.py` declares commands, with the handlers; none of them imports a heavy library before it is called.
ROOMS = ("model", "data", "train", "evaluate", "export", "report", "serve", "plan", "doctor", "azure", "bench")
SHELLS = ("bash", "zsh", "tcsh")
SECONDS_TO_SPEAK = 10.0  # for rank 0 on a busy machine


def build_parser() -> Parser:
    """Every command with its options."""
    parser = Parser(
        prog="phi3v", description="Fine-tune Phi-3.5-vision and Phi-3-vision on your own images, documents and videos."
    )
    parser.add_argument("--version", action="version", version=f"phi3v {__version__}")
    parser.add_subparsers(required=True, metavar="COMMAND")
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
    """Parse a command line; its keys of the configuration are in ``overrides``.

    Raises:
        UserError: it cannot be read.
    """
    arguments = build_parser().parse_args(words)
    arguments.overrides = {key: value for key, value in vars(arguments).items() if "." in key}
    return arguments


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

    try:
        return run_command(work, as_json="--json" in words, show_downloads=words[:2] == ["data", "convert"])
    except SystemExit as stop:
        if stop.code:
            raise
        return 0  # --help, --version


def run_command(
    work: Callable[[Console], dict[str, Any] | None], *, as_json: bool = False, show_downloads: bool = False
) -> int:
    """Do the work of a command as every command is done, and return its exit code.

    Args:
        work: takes the console to speak to; returns what ``--json`` prints. What it raises as `UserError` is one
            message, from the first rank where all ranks met it.
        as_json: print one JSON object on standard output and everything else on standard error.
        show_downloads: show the hub's bars, as a dataset takes long to download.
    """
    is_first_rank = os.environ.get("RANK", "0") == "0"
    # Libraries print advice meant for notebooks; ours is the one voice on the terminal.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not (show_downloads and is_first_rank):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait for each other on a busy CPU should sleep, not spin; on an idle one this costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # from one library to another
    warnings.filterwarnings("ignore", message="Corrupt EXIF data")  # of an image that is whole
    # DeepSpeed writes its remarks on standard output, as soon as a library imports it, whether it is used or not.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    with lasting_output():
        return _run(work, as_json=as_json, is_first_rank=is_first_rank)


def _run(work: Callable[[Console], dict[str, Any] | None], *, as_json: bool, is_first_rank: bool) -> int:
    console = Console(stderr=as_json, quiet=not is_first_rank)
    # Libraries that print to standard output must not break the one JSON object.
    voice = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with voice:
            result = work(console)
    except UserError as error:
        if is_first_rank:
            print(f"error: {error}", file=sys.stderr)
        else:
            if not error.one_rank:
                # Rank 0 has met it too and speaks for all. The launcher ends all ranks once one has ended, so that must
                # not be this one; and if this one is still here then, rank 0 has not met it after all.
                time.sleep(SECONDS_TO_SPEAK)
            print(f"error on rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 2
    except StoppedError as error:
        if is_first_rank:
            print(error, file=sys.stderr)
        return 3
    except LostRankError as error:
        print(f"error: {error}" if is_first_rank else f"error on rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    code = int((result or {}).pop("exit_code", 0))
    if as_json and result is not None and is_first_rank:
        print(json.dumps(result))
    return code


class _LastingStream(io.TextIOBase):
    """A stream that takes text for good: into nothing once its reader is gone."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._lasting():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self.stream.flush()

    def isatty(self) -> bool:
        return bool(self.stream.isatty())

    def fileno(self) -> int:
        return int(self.stream.fileno())

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            logging.getLogger("phi3v").warning("nobody reads the output any more; the command goes on")
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.stream.fileno())


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Standard output and error that end no command: neither by a closed pipe or terminal nor by their encoding."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = _LastingStream(sys.stdout), _LastingStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _completion(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    import shtab

    parser = build_parser()
    for name in ("plan", "doctor"):
        for action in parser.verbs[name]._actions:
            action.help = "" if action.help == argparse.SUPPRESS else action.help
    script = shtab.complete(parser, arguments.shell)
    print(script)
    return {"shell": arguments.shell, "script": script}


if __name__ == "__main__":
    sys.exit(main())
