"""Lines and progress bars for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


def say(console: Console, text: str, *, style: str = "") -> None:
    """Print text as it is: no markup, no highlighting, and lines stay whole, so that paths can be copied."""
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
