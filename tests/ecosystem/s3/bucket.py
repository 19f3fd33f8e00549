"""A server that speaks S3 on this machine, which fails as it is told to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import ThreadedMotoServer

BUCKET = "pages"


class Server(ThreadedMotoServer):
    """
    Attributes:
        faults: called with each request's path and how often that was asked for; gives the status and the error code of
            the answer, the seconds that it takes, or None.
        requests: how often each path was asked for.
    """

    def __init__(self) -> None:
        super().__init__("127.0.0.1", port=0, verbose=False)
        self.faults: Callable[[str, int], tuple[int, str] | float | None] = lambda _path, _times: None
        self.requests: Counter[str] = Counter()

    def start(self) -> None:
        super().start()
        assert self._server is not None
        answer = self._server.app

        def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            self.requests[path] += 1
            fault = self.faults(path, self.requests[path])
            if isinstance(fault, tuple):
                status, code = fault
                body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                start_response(f"{status} {code}", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
                return [body]
            if fault is not None:
                time.sleep(fault)
            return answer(environ, start_response)

        self._server.app = application
