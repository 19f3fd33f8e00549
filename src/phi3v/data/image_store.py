"""Where the images of a data file come from.

Records name an image by a path below the data folder's ``images/``. What stands behind such a name is an `ImageStore`:
that folder, or something that keeps images otherwise. Only a store knows; everybody else has its names.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from phi3v.data.faults import near_name, quote
from phi3v.data.image_paths import image_path_fault
from phi3v.errors import UserError
from phi3v.paths import file_hash

THREADS = 8  # that look at files


class ImageFaultError(Exception):
    """Carries (what, hint) from where an image is found wanting."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


@contextlib.contextmanager
def faults_of(where: str | None = None) -> Iterator[None]:
    """Makes a `UserError` of what is wrong with an image."""
    try:
        yield
    except ImageFaultError as fault:
        raise UserError(f"the image {fault.what}", where=where, hint=fault.hint) from None


class ImageStore(ABC):
    """The images of a data file by the names that its records give them. May be pickled, and compared."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Tells this place from others, for what is kept about its images."""

    @abstractmethod
    def where(self, name: str) -> str:
        """The place of an image, for a message."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """The bytes of an image file.

        Raises:
            ImageFaultError: there is no such image, or it cannot be read.
        """

    @abstractmethod
    def stamps(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        """(names, 2) the bytes of each image, and a number that changes when it is replaced; -1 where there is none."""

    def sizes(self, names: Sequence[str], *, exif_orientation: bool) -> npt.NDArray[np.int64] | None:
        """(names, 2) width and height of each image, 0 where there is none; None where their headers must be read."""
        return None

    def shares(self, names: Sequence[str], parts: int) -> list[list[str]]:
        """The images cut into parts of about as many, each in an order in which it is read at little cost."""
        ordered = sorted(names)
        return [ordered[part::parts] for part in range(parts)]

    def expect(self, names: Sequence[str]) -> None:
        """Say that this process is going to read these images in this order: it fetches one shard after the other."""
        return

    @abstractmethod
    def sha256(self, name: str) -> str:
        """Of the bytes of an image.

        Raises:
            OSError: it cannot be read.
        """

    def digest(self, name: str) -> str | None:
        """As `sha256`; None where the image cannot be read, which is said where it is needed."""
        try:
            return self.sha256(name)
        except OSError:
            return None


@dataclass(frozen=True)
class FolderStore(ImageStore):
    """Files below a folder, which none of their names may leave.

    Attributes:
        root: the folder that names are relative to.
    """

    root: Path

    @classmethod
    def beside(cls, file: Path) -> FolderStore:
        """The images of a JSONL file, in ``images/`` beside it."""
        return cls(file.parent / "images")

    def __str__(self) -> str:
        return str(self.root)

    @property
    def identity(self) -> str:
        return os.path.abspath(self.root)

    def where(self, name: str) -> str:
        return str(self.root / name)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        full = find_file(name, self.root)
        require_usable_file(name, full, self.root)
        try:
            with full.open("rb") as file:
                yield file
        except OSError as error:
            raise ImageFaultError(
                f"cannot be read ({error.strerror or error}): {quote(name)}",
                "raise the limit of open files: ulimit -n 4096"
                if error.errno in (errno.EMFILE, errno.ENFILE)
                else "check its permissions and the disk",
            ) from None

    def stamps(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        with ThreadPoolExecutor(THREADS) as pool:
            return np.array(list(pool.map(self._stamp, names)), dtype=np.int64).reshape(-1, 2)

    def _stamp(self, name: str) -> tuple[int, int]:
        try:
            status = find_file(name, self.root).stat()
        except OSError:
            return -1, -1
        return status.st_size, status.st_mtime_ns

    def sha256(self, name: str) -> str:
        return file_hash(find_file(name, self.root))


def find_file(path: str, root: Path) -> Path:
    """``root / path``; where that is not there, the file whose name is the same in another Unicode normal form.

    ``ü`` is one character or two (NFC, NFD). macOS, archives and file servers change between them, and a person sees
    no difference.
    """
    full = root / path
    if path.isascii() or os.path.lexists(full):
        return full
    found = root
    for part in Path(path).parts:
        if not os.path.lexists(found / part):
            try:
                names = _names_by_form(str(found), os.stat(found).st_mtime_ns)
            except OSError:
                return full
            part = names.get(unicodedata.normalize("NFC", part), part)
        found /= part
    return found if os.path.lexists(found) else full


@functools.lru_cache(maxsize=256)
def _names_by_form(folder: str, _changed: int) -> dict[str, str]:
    return {unicodedata.normalize("NFC", name): name for name in sorted(os.listdir(folder)) if not name.isascii()}


def require_usable_file(path: str, full: Path, root: Path) -> None:
    if wrong := image_path_fault(path):
        raise ImageFaultError(*wrong)
    try:
        real, real_root = os.path.realpath(full), os.path.realpath(root)
        status = os.stat(full)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path, root) from None
    except OSError as error:
        what = f"cannot be read ({error.strerror}): {quote(path)}"
        raise ImageFaultError(what, "check the path and its permissions") from None
    if os.path.commonpath([real, real_root]) != real_root:
        raise ImageFaultError(
            f"leaves the data root through a link: {quote(path)} is {quote(real)}",
            f"copy the image below {root}, or let that folder itself be the link",
        )
    if stat.S_ISDIR(status.st_mode):
        raise ImageFaultError(f"is a folder, not an image: {quote(path)}", "name the files in it, one by one")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ImageFaultError(f"is not a regular file: {quote(path)}", "name an image file")


def _missing(path: str, root: Path) -> ImageFaultError:
    """Names the first part of the path that is not there, and what may have been meant."""
    what = f"does not exist: {quote(path)}"
    if not root.is_dir():
        return ImageFaultError(what, f"images are looked up in {root}, and there is no such folder")
    inner = path.removeprefix("images/")
    if inner != path and (root / inner).is_file():
        return ImageFaultError(what, f"paths are relative to images/: write {quote(inner)}")
    folder = root
    for part in Path(path).parts:
        if not (folder / part).exists():
            if near := near_name(part, folder):
                found = (folder / near).relative_to(root).as_posix()
                return ImageFaultError(what, f"did you mean {quote(found)}?")
            break
        folder /= part
    return ImageFaultError(what, f"it is looked up in {root}")
