"""Files in a folder or at a URL, read whole or in part; what fails is tried again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from phi3v.errors import UserError
from phi3v.paths import is_out_of_room, url_of

T = TypeVar("T")

ATTEMPTS = 5
FIRST_WAIT = 0.5  # seconds before the second attempt; each later wait is twice as long
SILENCE = 60.0  # seconds without a byte after which a request has failed
# What brings the driver of a URL, where it is an extra.
EXTRAS = {
    "http": "http",
    "https": "http",
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "abfs": "abfs",
    "abfss": "abfs",
    "az": "abfs",
}
_REFUSED = (401, 403)
# A password, or the query of a signed URL.
_SECRET = re.compile(r"(?<=://)[^/@]*:[^/@]*@|\?")


class FetchError(Exception):
    """A file cannot be fetched: what is wrong, and what to do."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


@dataclass(frozen=True)
class Location:
    """A folder on this machine, or the same at a URL.

    Attributes:
        root: an absolute path, or a URL without a slash at its end.
    """

    root: str

    @classmethod
    def of(cls, path: str | Path) -> Location:
        url = url_of(path)
        if url is None:
            return cls(str(Path(path).absolute()))
        if secret := _SECRET.search(url):
            hint = "set them in the environment, where the driver looks for them: URLs are written into logs"
            raise UserError("has credentials in it", where=f"{url[: secret.start()]}…", hint=hint)
        return cls(url.rstrip("/"))

    @property
    def is_remote(self) -> bool:
        return url_of(self.root) is not None

    def place(self, name: str) -> str:
        """Path or URL of a file here; one that has a place of its own keeps it."""
        return name if url_of(name) is not None or name.startswith("/") else f"{self.root}/{name}"

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes of a file, or those from ``start`` up to ``end``.

        Raises:
            FetchError: they cannot be read.
        """
        place = self.place(name)

        def read() -> bytes:
            if url_of(place) is None:
                with open(place, "rb") as file:
                    file.seek(start or 0)
                    return file.read() if end is None else file.read(end - (start or 0))
            files, inner = filesystem(place)
            content: bytes = files.cat_file(inner, start=start, end=end)
            if start is not None and end is not None and len(content) > end - start:
                content = content[start:end]  # the server sends all of a file, whatever is asked for
            if start is not None and end is not None and len(content) != end - start:
                raise OSError(f"{len(content):,} bytes came, not {end - start:,}")
            return content

        return attempt(read, place)

    def fetch(self, name: str, target: Path) -> None:
        """Write a file's bytes to ``target``, piece by piece.

        Raises:
            FetchError: they cannot be read.
        """
        place = self.place(name)

        def fetch() -> None:
            files, inner = filesystem(place)
            files.get_file(inner, str(target))

        attempt(fetch, place)


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, of this process, and the path that it knows the file by.

    Raises:
        UserError: there is no driver for such URLs, or it is not installed.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url, **_options(scheme))
    except ImportError as error:
        if extra := EXTRAS.get(scheme):
            hint = f'it is an extra: `pip install "phi3v[{extra}]"`'
        else:
            hint = f"install what it names: {error}"
        raise UserError(f"the driver for {scheme}:// is not installed", where=url, hint=hint) from None
    except ValueError as error:
        hint = "use a local folder, or a URL such as s3://, gs://, abfs://, https:// or hf://"
        raise UserError(f"no such URL: {error}", where=url, hint=hint) from None


def _options(scheme: str) -> dict[str, Any]:
    if scheme not in ("http", "https"):
        return {}
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, connect=SILENCE, sock_read=SILENCE)}}


def attempt(work: Callable[[], T], place: str) -> T:
    """What ``work`` gives, which is tried again where it fails.

    Raises:
        FetchError: it failed `ATTEMPTS` times, or will not work another time either.
        OSError: the disk is full.
    """
    for number in range(ATTEMPTS):
        try:
            return work()
        except UserError:
            raise
        except Exception as error:  # each driver has errors of its own
            if is_out_of_room(error):
                raise
            status = getattr(error, "status", None)
            if isinstance(error, FileNotFoundError) or status in (404, 410):
                raise FetchError(f"is not there: {place}", "was it moved or deleted? Look at the address") from None
            if isinstance(error, PermissionError) or status in _REFUSED:
                hint = "check the credentials of this machine, and what they may read"
                raise FetchError(f"may not be read ({_told(error)}): {place}", hint) from None
            if number + 1 == ATTEMPTS or (isinstance(error, OSError) and url_of(place) is None):
                what = f"cannot be read ({_told(error)}): {place}"
                tried = f"tried {number + 1} times; " if number else ""
                raise FetchError(what, f"{tried}check the connection or the disk, and start again") from None
        time.sleep(FIRST_WAIT * 2**number)
    raise AssertionError("unreachable")


def _told(error: Exception) -> str:
    status = getattr(error, "status", None)
    text = str(error) or type(error).__name__
    return f"HTTP {status}" if status else text.splitlines()[0][:200]
