"""The file that a path of a record names, found and fit to be opened."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import stat
import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from phi3v.data.faults import quote
from phi3v.data.schema import image_path_fault
from phi3v.errors import UserError


class ImageFaultError(Exception):
    """Carries (what, hint) from where an image is found wanting."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


@contextlib.contextmanager
def faults_of(path: Path | None = None) -> Iterator[None]:
    """Makes a `UserError` of what is wrong with an image."""
    try:
        yield
    except ImageFaultError as fault:
        raise UserError(f"the image {fault.what}", where=None if path is None else str(path), hint=fault.hint) from None


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


def near_name(name: str, folder: Path) -> str | None:
    """A name in ``folder`` that ``name`` may have meant: other case, other extension, or a slip."""
    try:
        # Bounded, so that a million images with one missing do not make a check slow.
        names = [entry.name for entry in islice(os.scandir(folder), 20_000)]
    except OSError:
        return None
    for same in (str.lower, lambda text: Path(text).stem, lambda text: Path(text).stem.lower()):
        for candidate in sorted(names):
            if same(candidate) == same(name):
                return candidate
    near = difflib.get_close_matches(name, names[:2_000], n=1, cutoff=0.8)
    return near[0] if near else None


def read_image(path: str, *, root: Path) -> bytes:
    """The bytes of an image file as they are, not decoded.

    Args:
        path: relative to ``root``; may not leave it.
        root: the folder that the image is looked up in.

    Raises:
        UserError: there is no such file, or it cannot be read; the same words as `check_image`.
    """
    full = find_file(path, root)
    with faults_of(full):
        require_usable_file(path, full, root)
        try:
            return full.read_bytes()
        except OSError as error:
            what = f"cannot be read: {error.strerror or error}"
            raise UserError(what, where=str(full), hint="check its permissions") from None


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
