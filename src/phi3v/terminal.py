"""Lines for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def say(console: Console, text: str, *, style: str = "") -> None:
    """Print text as it is: no markup, no highlighting, and lines stay whole, so that paths can be copied."""
    console.print(Text(text, style=style), soft_wrap=True)
