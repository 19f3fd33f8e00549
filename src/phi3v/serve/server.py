"""The server behind the chat page; it serves nothing but the page."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from phi3v.errors import UserError
from phi3v.serve.address import USER, Address, free_port
from phi3v.serve.conversation import AnswerSettings, Chat
from phi3v.serve.examples import Example

SESSIONS = 16  # conversations kept at a time; the oldest goes
WAITING = 32  # questions that may wait for the model


@dataclass(frozen=True)
class ServedPage:
    """A page that can be opened now."""

    port: int
    urls: list[str]


@contextlib.contextmanager
def serve(
    chat: Chat,
    address: Address,
    *,
    title: str,
    settings: AnswerSettings,
    frames: int,
    compare: bool = False,
    examples: Sequence[Example] = (),
) -> Iterator[ServedPage]:
    """Serve the page while the context lasts; its files lie in a folder of its own, which goes with it.

    Raises:
        UserError: no port is free there, or the public tunnel cannot be opened.
    """
    free_port(address.host, address.port)  # a wrong address is an error before anything is built
    with tempfile.TemporaryDirectory(prefix="phi3v-chat-") as temporary, _environment(_gradio_environment(temporary)):
        from phi3v.serve.page import CSS, build_page, theme

        folder = Path(temporary) / "shown"
        folder.mkdir()
        page = build_page(
            chat, title=title, settings=settings, frames=frames, compare=compare, examples=examples, folder=folder
        )
        page.queue(max_size=WAITING, api_open=False)
        # Building took seconds; the port may be taken by now.
        port = free_port(address.host, address.port)
        try:
            # Every setting is given, as a missing one may come from GRADIO_ variables.
            _, url, shared = page.launch(
                server_name=address.host,
                server_port=port,
                share=address.share,
                auth=(USER, address.password) if address.password is not None else None,
                root_path="",
                max_file_size=int(chat.limits.file_mb * 1024**2),
                state_session_capacity=SESSIONS,
                enable_monitoring=False,
                strict_cors=True,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                run_history=False,
                footer_links=[],
                inbrowser=False,
                show_error=False,
                quiet=True,
                prevent_thread_lock=True,
                theme=theme(),
                css=CSS,
                app_kwargs={"middleware": [Middleware(Gate, hosts=_hosts(address))]},
            )
            if address.share and not shared:
                raise UserError("Gradio's tunnel could not be opened", where="--share", hint="it needs the internet")
            yield ServedPage(port, [name for name in (url, shared) if name])
        finally:
            page.close(verbose=False)


class Gate:
    """Refuses requests that the page never makes.

    Gradio would fetch files of other servers for a browser, and would answer under any name that leads here, which a
    foreign page could use to ask on a user's behalf (DNS rebinding).

    Args:
        hosts: names that a request may use for this machine; None: any.
    """

    FETCHES = ("/file=http", "/proxy=", "/vibe-", "/process_recording")

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._allows(scope):
            await PlainTextResponse("not allowed", status_code=403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        if any(part in scope["path"] for part in self.FETCHES):
            return False
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        return self.hosts is None or urlsplit(f"//{host}").hostname in self.hosts


def _hosts(address: Address) -> frozenset[str] | None:
    if address.share or not address.is_loopback:
        return None  # the password guards it, and its names are not known
    return frozenset({"localhost", "127.0.0.1", "::1", address.host})


def _gradio_environment(folder: str) -> dict[str, str]:
    return {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": folder,  # uploads
        "GRADIO_EXAMPLES_CACHE": str(Path(folder) / "examples"),  # else .gradio/ of the present folder is served
        "GRADIO_ALLOWED_PATHS": "",
        "GRADIO_NUM_WORKERS": "0",
    }


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before: dict[str, Any] = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
