"""Remote shards kept whole on a local disk, up to a limit, for all ranks and readers of a machine.

A shard is named by its SHA-256. It appears complete and verified or not at all; who fetches it holds its lock, and the
others wait. Who reads one holds a shared lock on the file itself, so that it is not removed to make room; the system
gives up both when a process dies.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from phi3v.data.cache import cache_root, cannot_write
from phi3v.errors import UnavailableError, UserError
from phi3v.paths import is_out_of_room

_MODE = 0o666  # of locks, short of the umask: people may share a cache
_PART = re.compile(r"\.([0-9a-f]{64})\.(\d+)\.\d+\.part")


class ShardCache:
    """The folder of shards.

    Args:
        limit: bytes of all shards, those being fetched among them.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    @property
    def folder(self) -> Path:
        return cache_root() / "shards"

    def open(self, sha256: str) -> BinaryIO | None:
        """A shard that is there, which stays until the file is closed.

        Raises:
            UnavailableError: it cannot be read.
        """
        try:
            file = (self.folder / sha256).open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            hint = "look at the disk, the permissions and `ulimit -n`, or set PHI3V_CACHE to another folder"
            what = f"a shard in the cache cannot be read: {error.strerror or error}"
            raise UnavailableError(what, where=str(self.folder), hint=hint) from None
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.utime(file.fileno())  # what was used last is removed last
        return file

    def fetch(self, sha256: str, size: int, write: Callable[[Path], None], *, wait: bool = True) -> bool:
        """Have a shard there, if there is room for it.

        Args:
            size: its bytes, the most that ``write`` uses on the way.
            write: makes the file at a path, and checks it.
            wait: for another process that is fetching it; otherwise that is as good as none.

        Returns:
            Whether it is there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f"{sha256}.lock", mode=_MODE, blocking=wait)
            try:
                lock.acquire()
            except TimeoutError:
                return False
            try:
                return (self.folder / sha256).is_file() or self._fetch(sha256, size, write)
            finally:
                lock.release()
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def _fetch(self, sha256: str, size: int, write: Callable[[Path], None]) -> bool:
        for left in self.folder.glob(f".{sha256}.*"):  # of a process that was killed: the lock is ours
            left.unlink(missing_ok=True)
        with self._room(sha256, size) as part:
            if part is None:
                return False
            write(part)
            os.replace(part, self.folder / sha256)
            return True

    @contextmanager
    def _room(self, sha256: str, size: int) -> Iterator[Path | None]:
        """A place to write to, once shards that nobody reads have made room; none if there is not enough."""
        part = self.folder / f".{sha256}.{size}.{os.getpid()}.part"
        with FileLock(self.folder / "room.lock", mode=_MODE):
            being_fetched = self._being_fetched()  # first, or one that is just done would count nowhere
            kept = self._kept()
            used = being_fetched + sum(kept.values())
            for file in kept:
                if used + size <= self.limit:
                    break
                if _remove(file):
                    used -= kept[file]
            enough = used + size <= self.limit
            if enough:
                part.touch()
        try:
            yield part if enough else None
        except OSError as error:
            if is_out_of_room(error):
                hint = "make room, lower data.cache_limit, or set PHI3V_CACHE to a larger disk"
                raise UserError("no room for a shard", where=str(self.folder), hint=hint) from None
            raise
        finally:
            part.unlink(missing_ok=True)

    def _being_fetched(self) -> int:
        """The bytes that shards will have which others are fetching; what a killed process left is deleted."""
        size = 0
        for found in filter(None, (_PART.fullmatch(entry.name) for entry in os.scandir(self.folder))):
            lock = FileLock(self.folder / f"{found[1]}.lock", mode=_MODE, blocking=False)
            try:
                lock.acquire()
            except TimeoutError:
                size += int(found[2])
                continue
            try:
                for left in self.folder.glob(f".{found[1]}.*"):
                    left.unlink(missing_ok=True)
            finally:
                lock.release()
        return size

    def is_of(self, sha256: str, descriptor: int) -> bool:
        """Whether an open file is the one that is there."""
        try:
            return os.path.samestat((self.folder / sha256).stat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def discard(self, sha256: str) -> None:
        """Delete a shard that is not what it was."""
        (self.folder / sha256).unlink(missing_ok=True)

    def _kept(self) -> dict[Path, int]:
        """The shards and their bytes, the one used longest ago first."""
        found = []
        for entry in os.scandir(self.folder):
            if re.fullmatch(r"[0-9a-f]{64}", entry.name):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    found.append((status.st_mtime_ns, Path(entry.path), status.st_size))
        return {file: size for _, file, size in sorted(found)}


def _remove(file: Path) -> bool:
    """Delete a shard unless somebody reads it."""
    with suppress(OSError), file.open("rb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink()
        return True
    return False
