"""Where the page is reachable, and for whom."""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass, field

from phi3v.errors import UserError

USER = "phi3v"
SHORTEST_PASSWORD = 8
PORTS_TRIED = 100


@dataclass(frozen=True)
class Address:
    """Where the page is reachable.

    Raises:
        UserError: it would be open to others without a password, or makes no sense.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise UserError(f"{self.port} is no port", where="--port", hint="choose between 1024 and 65535")
        if self.password is not None and len(self.password) < SHORTEST_PASSWORD:
            raise UserError("the password is too short", where="--password", hint=f"use {SHORTEST_PASSWORD} or more")
        if self.password is None and (self.share or not self.is_loopback):
            raise UserError(
                "others could ask the model and see what is asked, and there is no password",
                where="--share" if self.share else f"--host {self.host}",
                hint="set PHI3V_PASSWORD (or --password, which others on this machine can read); the user is phi3v",
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def free_port(host: str, wanted: int) -> int:
    """The first port from ``wanted`` on that nothing listens on.

    Raises:
        UserError: there is none near, or ``host`` is no address of this machine.
    """
    for port in range(wanted, min(wanted + PORTS_TRIED, 65536)):
        # Gradio looks at this machine's own address, whichever it will listen on.
        if all(_is_free(address, port) for address in (host, "127.0.0.1")):
            return port
    raise UserError(f"ports {wanted} to {wanted + PORTS_TRIED - 1} are taken", where="--port", hint="choose another")


def _is_free(host: str, port: int) -> bool:
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise UserError(f"no such address: {error.strerror}", where=f"--host {host}") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise UserError(f"port {port} is not for everyone", where="--port", hint="use 1024 or more") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"cannot listen there: {error.strerror}", where=f"--host {host}") from None
            return False
    return True
