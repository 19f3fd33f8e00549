"""Long work: a progress bar that shows up only when it is worth it, and items that are worked on ahead of time."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Iterable[Item], submit: Callable[[Item], Future[Result]], ahead: int
) -> Generator[tuple[Item, Future[Result]]]:
    """Each item with its future, in order; ``ahead`` more are submitted by then. Those not taken are cancelled."""
    pending: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            pending.append((item, submit(item)))
            if len(pending) > ahead:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        for _, future in pending:
            future.cancel()


class LateProgress:
    """A bar on standard error, from ``delay`` seconds on, and only in a terminal.

    Args:
        description: what is being done.
        total: the amount of work, in the unit of `advance`.
        enabled: false for no bar ever.
        delay: seconds; shorter work shows nothing.
        told: where there is no bar, say once what is being done.
    """

    def __init__(
        self, description: str, total: int, *, enabled: bool = True, delay: float = 2.0, told: bool = False
    ) -> None:
        self._description = description
        self._told = told
        self._total = total
        self._enabled = enabled and sys.stderr.isatty()
        self._start_at = time.monotonic() + delay
        self._done = 0
        self._bar: Progress | None = None

    def __enter__(self) -> LateProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        """``amount`` more is done."""
        self._done += amount
        if not self._enabled:
            if self._told and time.monotonic() >= self._start_at:
                print(f"{self._description} …", file=sys.stderr, flush=True)
                self._told = False
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif time.monotonic() >= self._start_at:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task(self._description, total=self._total, completed=self._done)
            self._bar.start()
