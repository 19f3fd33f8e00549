"""Lines and progress bars for the terminal."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


def say(console: Console, text: str, *, style: str = "") -> None:
    """Print text verbatim: no markup, no highlighting, no line breaks, so that paths can be copied."""
    console.print(Text(text, style=style), soft_wrap=True)


def progress_bar(console: Console, *, enabled: bool = True) -> Progress:
    """The bar of long work: what, how far, extras, time gone and time left; shown in a terminal if ``enabled``."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[extra]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and console.is_terminal),
    )


class _LastingStream(io.TextIOBase):
    """A stream that can always be written to: once its reader is gone, text is dropped."""

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
            logging.getLogger("phi3v").warning("the output was closed; the command goes on")
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.stream.fileno())


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Standard output and error that never fail, neither by a closed pipe or terminal nor by their encoding."""
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
