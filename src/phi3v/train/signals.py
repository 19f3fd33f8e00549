"""What SIGTERM, SIGINT and SIGUSR1 do to a run."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from phi3v.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def ignore_in_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """For a process that reads data: a signal to all processes of a job must not end it before the step is done.

    Args:
        then: what the worker is to begin with besides.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


class Signals:
    """Remembers a signal while training, which then ends after its step; anywhere else a signal ends the run at once.

    A context manager: within it the handlers are ours. A second SIGINT ends at once wherever it comes.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.doing = "loading"
        self._waits = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While steps are taken: whoever takes them looks at ``received``."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if not self._waits:
            raise StoppedError(f"stopped by {self.received.name} while {self.doing}")
