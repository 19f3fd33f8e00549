"""Files in a folder or at a URL, read whole or in part; what fails is tried again."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from phi3v.errors import UserError
from phi3v.paths import file_hash, is_out_of_room, url_of

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
CHANGED = "it was changed since the index was made, or damaged on the way: make the index again, or copy it again"
# A password, or the query of a signed URL.
_SECRET = re.compile(r"(?<=://)[^/@]*:[^/@]*@|\?")


class FetchError(Exception):
    """A file cannot be fetched: what is wrong, and what to do.

    Args:
        is_its_own: the fault of this file, which is gone or another; others may be had.
        is_gone: there is no such file, so that nothing of it can be had.
    """

    def __init__(self, what: str, hint: str, *, is_its_own: bool = False, is_gone: bool = False) -> None:
        super().__init__(what)
        self.is_its_own = is_its_own or is_gone
        self.is_gone = is_gone
        self.what = what
        self.hint = hint

    def again(self) -> FetchError:
        """The same, without the frames that it came through."""
        return FetchError(self.what, self.hint, is_its_own=self.is_its_own, is_gone=self.is_gone)


class _OtherContentError(Exception):
    """What came is not what it should be; ``digest`` tells it from other such content."""

    def __init__(self, digest: str) -> None:
        super().__init__("other bytes came than the index says")
        self.digest = digest


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
        if has_parents(url):
            raise UserError("has .. in it", where=url, hint="write the URL without")
        return cls(url.rstrip("/"))

    @property
    def is_remote(self) -> bool:
        return url_of(self.root) is not None

    def place(self, name: str) -> str:
        """Path or URL of a file here; one that has a place of its own keeps it."""
        return name if url_of(name) is not None or name.startswith("/") else f"{self.root}/{name}"

    def read(self, name: str, start: int | None = None, end: int | None = None, *, sha256: str | None = None) -> bytes:
        """The bytes of a file, or those from ``start`` up to ``end``.

        Args:
            sha256: that they must have.

        Raises:
            FetchError: they cannot be read, or are others.
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
            if sha256 is not None and (digest := hashlib.sha256(content).hexdigest()) != sha256:
                raise _OtherContentError(digest)
            return content

        return attempt(read, place, known=sha256 is not None)

    def fetch(
        self,
        name: str,
        target: Path,
        *,
        size: int | None = None,
        sha256: str | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Write a file's bytes to ``target``, piece by piece.

        Args:
            size, sha256: that it must have.
            progress: is told of bytes that came, as far as the driver tells.

        Raises:
            FetchError: they cannot be read, or are others.
        """
        from fsspec.callbacks import Callback

        place = self.place(name)

        class Watch(Callback):
            came = 0

            def relative_update(self, inc: int = 1) -> None:
                self.came += inc
                progress(inc)
                if size is not None and self.came > size:  # or it fills the disk
                    raise _OtherContentError("longer")

        def fetch() -> None:
            files, inner = filesystem(place)
            watch = Watch()
            try:
                files.get_file(inner, str(target), callback=watch)
                found = file_hash(target) if sha256 is not None else None
            except BaseException:
                progress(-watch.came)
                raise
            if found != sha256:
                progress(-watch.came)
                raise _OtherContentError(str(found))

        attempt(fetch, place, known=sha256 is not None)


def has_parents(name: str) -> bool:
    """Whether a name has a part ``..``, written out or in percent encoding, which servers decode."""
    while (plain := unquote(name)) != name:
        name = plain
    return ".." in re.split(r"[/\\]", name)


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

    timeout = aiohttp.ClientTimeout(total=None, connect=SILENCE, sock_read=SILENCE)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # which names the proxy, where there is one


def attempt(work: Callable[[], T], place: str, *, known: bool = False) -> T:
    """What ``work`` gives, which is tried again where it fails.

    Args:
        known: an index names the file, so that a bucket which has it not may have it again in a moment.

    Raises:
        FetchError: it failed `ATTEMPTS` times, or will not work another time either.
        OSError: the disk is full.
    """
    others: set[str] = set()
    for number in range(ATTEMPTS):
        last = number + 1 == ATTEMPTS or url_of(place) is None
        tried = f"tried {number + 1} times; " if number else ""
        try:
            return work()
        except UserError:
            raise
        except _OtherContentError as error:
            if last or error.digest in others:  # the same twice was not damaged on the way
                raise FetchError(f"is not the one that the index names: {place}", CHANGED, is_its_own=True) from None
            others.add(error.digest)
        except Exception as error:  # each driver has errors of its own
            if is_out_of_room(error):
                raise
            status = getattr(error, "status", None)
            if (isinstance(error, FileNotFoundError) or status in (404, 410)) and (last or not known):
                hint = f"{tried}was it moved or deleted? Look at the address"
                raise FetchError(f"is not there: {place}", hint, is_gone=True) from None
            if isinstance(error, PermissionError) or status in _REFUSED:
                hint = "check the credentials of this machine, and what they may read"
                raise FetchError(f"may not be read ({_told(error)}): {place}", hint) from None
            if last:
                what = f"cannot be read ({_told(error)}): {place}"
                raise FetchError(what, f"{tried}check the connection or the disk, and start again") from None
        time.sleep(FIRST_WAIT * 2**number)
    raise AssertionError("unreachable")


def _told(error: Exception) -> str:
    status = getattr(error, "status", None)
    text = str(error) or type(error).__name__
    return f"HTTP {status}" if status else text.splitlines()[0][:200]
