"""A web server of files on this machine, which counts what it sends and fails as it is told to."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer:
    """Serves a folder, with ranges.

    Attributes:
        faults: called with each request's file name and how often that was asked for; gives what goes wrong: a status,
            ``"whole"`` (ranges are ignored), ``"short"`` (the body ends half-way), ``"slow"`` (it never comes),
            ``"damaged"`` (some bytes are others, each time other ones), or None.
        requests: (file name, first byte or None for a whole file) of each.
        sent: bytes of each file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: Callable[[str, int], int | str | None] = lambda _name, _times: None
        self.requests: list[tuple[str, int | None]] = []
        self.sent: Counter[str] = Counter()
        self.url = ""
        self.released = threading.Event()  # ends what is slow

    def whole(self) -> list[str]:
        """The shards that were asked for whole, in order."""
        return [name for name, start in self.requests if start is None and name.endswith(".tar")]

    def forget(self) -> None:
        self.requests.clear()
        self.sent.clear()


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """Serve a folder until the block ends."""
    server = FileServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.lstrip("/").partition("?")[0]
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else None
            server.requests.append((name, start))
            fault = server.faults(name, sum(name == other for other, _ in server.requests))
            file = server.folder / name
            if isinstance(fault, int) or not file.is_file():
                self.send_response(fault if isinstance(fault, int) else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = file.read_bytes()
            if asked and fault != "whole":
                part = data[int(asked[1]) : int(asked[2]) + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(data)}")
                data = part
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault == "slow":
                server.released.wait(30)
            if fault in ("short", "slow"):
                data = data[: len(data) // 2]
                self.close_connection = True
            if fault == "damaged":
                data = len(server.requests).to_bytes(16) + data[16:]
            server.sent[name] += len(data)
            self.wfile.write(data)

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        listener.shutdown()
        listener.server_close()
        thread.join()
