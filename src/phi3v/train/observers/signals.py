"""What SIGTERM, SIGINT, SIGHUP and SIGUSR1 do to a run."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from phi3v.data.readers import JOB_SIGNALS
from phi3v.errors import StoppedError

# A launcher passes a signal on that came to all processes already, so the same one may come twice at once.
SECONDS_TO_REPEAT = 5.0


class Signals:
    """Remembers a signal while training, which then ends after its step; anywhere else a signal ends the run at once.

    A context manager: within it the handlers are ours. A second SIGINT ends at once wherever it comes, and so does any
    second signal that comes a while after the first: the step may never end. Under ``nohup`` SIGHUP stays ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.doing = "loading"
        self._received_at = 0.0
        self._waits = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in JOB_SIGNALS:
                if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._handle)
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
        now = time.monotonic()
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            if now - self._received_at < SECONDS_TO_REPEAT:
                return
            raise StoppedError(f"stopped by a second {signal.Signals(number).name} while {self.doing}")
        self.received, self._received_at = signal.Signals(number), now
        if not self._waits:
            raise StoppedError(f"stopped by {self.received.name} while {self.doing}")
