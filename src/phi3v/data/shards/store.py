"""The images of shards: of local ones where they lie, of remote ones out of the cache or by a request for one image.

A shard is fetched whole where it is this rank's own (`ShardStore.assign`), and one image at a time where it is
another's. Where nobody has said whose it is, it is fetched whole once a good part of it was asked for.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from phi3v.data.faults import quote
from phi3v.data.image_store import ImageFaultError, ImageStore
from phi3v.data.shards.cache import ShardCache
from phi3v.data.shards.index import ShardIndex
from phi3v.data.shards.parquet import write_images_of
from phi3v.data.shards.remote import CHANGED, FetchError
from phi3v.errors import UnavailableError, UserError
from phi3v.paths import url_of

Ints = npt.NDArray[np.int64]

WORTH_FETCHING = 0.1  # share of a shard asked for image by image, after which the rest is fetched too
LOST = 5  # shards at a URL, one after the other, that are gone or changed: then no record is to blame
UNASSIGNED, OTHERS = -1, -2  # in place of the window of an own shard


class ShardStore(ImageStore):
    """The images of an index.

    Args:
        index: that was opened.
        cache_limit: bytes that shards may take in the cache.
        window: shards that are read at the same time.
    """

    def __init__(self, index: ShardIndex, *, cache_limit: int, window: int) -> None:
        self.index = index
        self.cache = ShardCache(cache_limit)
        self.window = window
        self._share()

    def _share(self) -> None:
        # Anonymous shared memory: what `assign` says reaches reading processes that were forked before.
        count = len(self.index.shards)
        shared = np.frombuffer(mmap.mmap(-1, 8 * (count + 1)), dtype=np.int64)
        self._positions, self._assigned = shared[:count], shared[count:]  # the latter: how often that was said
        self._positions[:] = UNASSIGNED
        self._asked = np.zeros(count, dtype=np.int64)
        self._lost: dict[int, FetchError] = {}  # shards that are gone or others, which are not asked for again
        self._lost_in_a_row: set[int] = set()
        self._begin()
        begin = weakref.WeakMethod(self._begin)
        os.register_at_fork(after_in_child=lambda: (own := begin()) and own())

    def _begin(self) -> None:
        """What a process has of its own: a thread of its parent may have held the lock when it was forked."""
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._discarded: set[int] = set()
        self._lock = threading.Lock()
        self._ahead = (0, 0)  # the assignment and the window after which the next one is being fetched

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "cache": self.cache, "window": self.window}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardStore) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __str__(self) -> str:
        return self.index.location.root

    @property
    def identity(self) -> str:
        return self.index.sha256  # of all hashes, so the same wherever the shards lie

    def where(self, name: str) -> str:
        rows = self.index.images.copies(name)
        shard = self.index.place(self._places["shard"][rows[0]]) if rows else str(self)
        return f"{shard}: {name}"

    def sizes(self, names: Sequence[str], *, exif_orientation: bool) -> Ints:
        rows = self.index.images.first(names)
        of = self._places
        size = np.stack([of["width"][rows], of["height"][rows]], axis=1).astype(np.int64)
        if exif_orientation:
            size = np.where(of["turned"][rows][:, None], size[:, ::-1], size)
        return np.where(rows[:, None] >= 0, size, 0)

    def stamps(self, names: Sequence[str]) -> Ints:
        rows = self.index.images.first(names)
        stamps = [
            (self._places["size"][row], int.from_bytes(self.index.images.sha256(row)[:7])) if row >= 0 else (-1, -1)
            for row in rows.tolist()
        ]
        return np.array(stamps, dtype=np.int64).reshape(-1, 2)

    def shares(self, names: Sequence[str], parts: int) -> list[list[str]]:
        rows = self.index.images.first(names)
        in_order = np.lexsort((self._places["offset"][rows], self._places["shard"][rows]))
        return [[names[at] for at in part] for part in np.array_split(in_order, parts)]

    def expect(self, names: Sequence[str]) -> None:
        shards = self._places["shard"][self.index.images.first(names)]
        self.assign([[shard] for shard in dict.fromkeys(shards.tolist())])

    def sha256(self, name: str) -> str:
        rows = self.index.images.copies(name)
        if not rows:
            raise FileNotFoundError(name)
        return self.index.images.sha256(rows[0]).hex()

    @cached_property
    def _places(self) -> dict[str, Any]:
        return self.index.images.places

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        yield io.BytesIO(self.read(name))

    def read(self, name: str) -> bytes:
        """The bytes of an image, which are those that the index has the hash of.

        Raises:
            ImageFaultError: there is no such image, or its shard is gone or another; names the shard.
            UnavailableError: the server or the cache does not work, or shard after shard is gone.
        """
        rows = self.index.images.copies(name)
        if not rows:
            hint = "the index names every image of the shards; was it made of other records?"
            raise ImageFaultError(f"is not in the index: {quote(name)}", hint)
        shards = [int(self._places["shard"][row]) for row in rows]
        shard = shards[0]
        try:
            best = min(range(len(rows)), key=lambda at: self._distance(shards[at]))
            row, shard = rows[best], shards[best]
            place = int(self._places["offset"][row]), int(self._places["size"][row])
            data = self._read(shard, *place, self.index.images.sha256(row))
        except FetchError as error:
            what = f"{quote(name)} cannot be had: the shard {error.what}"
            if error.is_its_own:
                self._count_lost(shard)
                raise ImageFaultError(what, error.hint) from None
            raise UnavailableError(f"the image {what}", where=self.index.place(shard), hint=error.hint) from None
        except OSError as error:
            what = f"the image {quote(name)} cannot be had: {error.strerror}"
            raise UnavailableError(
                what, where=self.index.place(shard), hint="look at the disk, and at `ulimit -n`"
            ) from None
        except UserError as error:
            what = f"the image {quote(name)} cannot be had: {error.what} ({error.where})"
            raise UnavailableError(what, where=self.index.place(shard), hint=error.hint) from None
        if data is None:
            what = f"has other bytes than the index says: {quote(name)} in {self.index.place(shard)}"
            raise ImageFaultError(what, CHANGED)
        self._lost_in_a_row.clear()
        return data

    def _count_lost(self, shard: int) -> None:
        """Raises `UnavailableError` where so many are lost that no record is to blame."""
        if shard not in self._lost or url_of(self.index.place(shard)) is None:
            return
        self._lost_in_a_row.add(shard)
        lost, count = len(self._lost_in_a_row), len(self.index.shards)
        if lost >= min(LOST, count):
            many = "all shards" if lost == count else f"{lost} shards, one after the other,"
            error = self._lost[shard]
            what = f"{many} are gone or changed; the last {error.what}"
            raise UnavailableError(what, where=str(self), hint=error.hint) from None

    def _discard(self, shard: int, descriptor: int) -> bool:
        """Have a damaged shard out of the cache, once, so that it is fetched again; whether this may help.

        Args:
            descriptor: of the file that was read; another one may have taken its place already.
        """
        if self._is_in_place(shard):
            return False
        with self._lock:
            if (file := self._files.pop(shard, None)) is not None:
                file.close()
            if not self.cache.is_of(self._key(shard), descriptor):
                return True
            if shard in self._discarded:
                return False
            self._discarded.add(shard)
            self.cache.discard(self._key(shard))
        return True

    @contextmanager
    def _remembered(self, shard: int, *, whole: bool) -> Iterator[None]:
        """Fetches that fail because the shard is lost are not tried again: each would take seconds, or all its bytes.

        Args:
            whole: ask for all of it; of one that was changed, single images may be as they were.
        """
        if (lost := self._lost.get(shard)) is not None and (whole or lost.is_gone):
            raise lost.again()
        try:
            yield
        except FetchError as error:
            if error.is_gone or (whole and error.is_its_own):
                self._lost[shard] = error.again()
            raise

    def assign(self, own: Sequence[Sequence[int]]) -> None:
        """Say which shards are this rank's, window by window; the others are others'."""
        self._positions[:] = OTHERS
        for window, shards in enumerate(own):
            self._positions[list(shards)] = window
        self._assigned += 1
        self._let_go()

    def are_fetched(self, share: float = 1.0) -> bool:
        """Whether who reads such a share of its shards has them whole in the cache."""
        return any(
            shard.kind != "tar" or (share > WORTH_FETCHING and not self._is_in_place(number))
            for number, shard in enumerate(self.index.shards)
        )

    def _distance(self, shard: int) -> tuple[int, int]:
        """Of several shards that have an image, the one with the least is read."""
        with self._opened(shard) as file:
            return (int(file is None), int(self._positions[shard] < 0))

    def _is_in_place(self, shard: int) -> bool:
        """Whether a shard is read where it lies."""
        return self.index.shards[shard].kind == "tar" and url_of(self.index.place(shard)) is None

    def _read(self, shard: int, offset: int, size: int, expected: bytes) -> bytes | None:
        """Bytes of a shard with this hash; none if it has others there.

        Raises:
            FetchError, UserError: it cannot be read.
        """
        in_place = self._is_in_place(shard)
        if not in_place:
            self._fetch_ahead(shard)
        for _ in range(6):  # fetched, read, discarded, fetched, read; and others may discard it meanwhile
            with self._opened(shard) as file:
                if file is not None:
                    data = os.pread(file, size, offset)
                    if hashlib.sha256(data).digest() == expected:
                        return data
                    if not self._discard(shard, file):
                        return None
            if file is None and (in_place or not self._wants_whole(shard, size) or not self.fetch(shard)):
                break
        if self.index.shards[shard].kind != "tar":
            raise UserError(
                f"the cache has no room for the shard {self.index.place(shard)}, whose images cannot be read singly",
                where="data.cache_limit",
                hint="raise it",
            )
        of_shard = self.index.shards[shard].file
        with self._remembered(shard, whole=False):
            return self.index.location.read(of_shard, offset, offset + size, sha256=expected.hex())

    @contextmanager
    def _opened(self, shard: int) -> Iterator[int | None]:
        """A descriptor of a shard that is on this machine, until the block ends.

        It is a duplicate: other threads may close the file meanwhile, and the system gives its number to another.
        """
        with self._lock:
            file = self._open(shard)
            descriptor = None if file is None else os.dup(file.fileno())
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _open(self, shard: int) -> BinaryIO | None:
        """The file of a shard that is on this machine; the last few are kept open. The caller holds the lock."""
        file = self._files.pop(shard, None)
        if file is None:
            if self._is_in_place(shard):
                try:
                    file = Path(self.index.place(shard)).open("rb")  # noqa: SIM115
                except OSError:
                    return None  # said where it is read
            else:
                file = self.cache.open(self._key(shard))
            if file is None:
                return None
            while len(self._files) >= max(2, self.window):
                self._files.popitem(last=False)[1].close()
        self._files[shard] = file
        return file

    def _key(self, shard: int) -> str:
        """The name of a shard in the cache."""
        found = self.index.shards[shard]
        if found.kind == "tar":
            return found.sha256
        return hashlib.sha256(f"{found.sha256} {found.images}".encode()).hexdigest()

    def _wants_whole(self, shard: int, size: int) -> bool:
        position = int(self._positions[shard])
        self._asked[shard] += size
        if self.index.shards[shard].kind != "tar":
            return True
        if position == UNASSIGNED:
            return bool(self._asked[shard] > WORTH_FETCHING * self.index.shards[shard].bytes)
        return position != OTHERS

    def fetch(self, shard: int, *, wait: bool = True) -> bool:
        """Have a shard whole in the cache, if it has room.

        Raises:
            FetchError: it cannot be fetched, or is not the one that the index names.
            UserError: the cache cannot be written.
        """
        of_shard = self.index.shards[shard]

        def write(part: Path) -> None:
            with self._remembered(shard, whole=True):  # another thread may have tried until now
                self.index.location.fetch(of_shard.file, part, size=of_shard.bytes, sha256=of_shard.sha256)
            if of_shard.kind == "parquet":
                write_images_of(part, of_shard.images)

        # The images of a parquet file lie beside it for a while.
        size = of_shard.bytes if of_shard.kind == "tar" else 2 * of_shard.bytes
        with self._remembered(shard, whole=True):
            return self.cache.fetch(self._key(shard), size, write, wait=wait)

    def _fetch_ahead(self, shard: int) -> None:
        """Begin to fetch the other own shards of this window, and those of the next one."""
        window = int(self._positions[shard])
        now = (int(self._assigned[0]), window)
        if window < 0 or now <= self._ahead:
            return
        self._ahead = now
        self._let_go(but=window)
        wanted = [int(other) for at in (window, window + 1) for other in np.flatnonzero(self._positions == at)]
        wanted = [other for other in wanted if other != shard]  # it may be another's by now, as `assign` says
        threading.Thread(target=self._fetch_all, args=(wanted,), daemon=True).start()

    def _let_go(self, but: int | None = None) -> None:
        """Close all shards but those of a window and the one before: what is open cannot make room in the cache."""
        kept = () if but is None else (but - 1, but)
        with self._lock:
            for shard in [shard for shard in self._files if self._positions[shard] not in kept]:
                self._files.pop(shard).close()

    def _fetch_all(self, shards: Sequence[int]) -> None:
        for shard in shards:
            try:
                self.fetch(shard, wait=False)
            except FetchError as error:  # said where it is read
                if not error.is_its_own:
                    return
            except UserError:
                return
