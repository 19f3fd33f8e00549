"""Local paths and hub ids, the current paths of a run's files, and checks that a path is writable."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from pathlib import Path

from phi3v.errors import UserError

# Common names of local folders, and pages of the hub itself: none of them owns a model.
_FOLDERS = re.compile(
    "(checkpoint|dataset|export|model|output|result|run)s?|data|home|mnt|out|spaces|tmp|work", re.IGNORECASE
)
_OF_A_RUN = re.compile(r"final|best|checkpoint-\d+")
_FILE = re.compile(r".*\.(arrow|bin|ckpt|csv|gguf|gz|jsonl?|parquet|pth?|py|safetensors|tar|txt|ya?ml|zip)", re.I)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` may be looked up on the hub: ``owner/name`` that does not look like a path.

    Everything that takes a path or a hub id asks here, so that no local path is ever sent to the hub.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    owner, slash, own = name.partition("/")
    if not slash or not name.isascii() or os.path.lexists(owner):
        return False
    if _FOLDERS.fullmatch(owner) or _OF_A_RUN.fullmatch(own) or _FILE.fullmatch(own):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def url_of(path: str | Path) -> str | None:
    """The URL that ``path`` is, if it is one; a `Path` of a URL has lost a slash."""
    found = re.match(r"([a-z][a-z0-9+.-]+):/+(.*)", str(path), re.DOTALL)
    return f"{found[1]}://{found[2]}" if found else None


def shown(path: str | Path) -> str:
    """A path or a URL as a person would write it."""
    return url_of(path) or str(path)


def absolute(path: str | Path) -> Path:
    """The absolute path, with links kept and ``~`` expanded."""
    path = Path(os.path.expanduser(path))
    if ".." in path.parts:  # the parent of a link is that of its target
        path = path.parent.resolve() / path.name
    return Path(os.path.abspath(path))


def find_model(name: str, where: str, *, hint: str | None = None) -> str:
    """A model's folder as an absolute path, or its hub id.

    Args:
        where: the key or option that named it, for the message.
        hint: what to do if there is no such model.

    Raises:
        UserError: there is no such folder, and it is not a hub id.
    """
    if name and os.path.isdir(absolute(name)):
        return str(absolute(name))
    if is_hub_id(name):
        return name
    what = "a file, not a folder" if name and os.path.exists(absolute(name)) else "no such folder"
    raise UserError(
        f"no model there: {what}",
        where=where,
        hint=hint or "give a folder in the official layout (make one with `phi3v model init`), or a hub id",
    )


def now_at(path: str, written_in: str, folder: Path) -> str:
    """The current location of ``path`` from the configuration of a run.

    A run that was moved together with its model or data has them in the same place relative to it. Older versions wrote
    paths relative to the folder in which the run was started, for which this holds too.

    Args:
        written_in: the run folder according to that configuration.
        folder: the current run folder.

    Returns:
        ``path`` itself if there is nothing in either place.
    """
    if not path or url_of(path) is not None:
        return path
    beside = os.path.normpath(Path(os.path.abspath(folder), os.path.relpath(path, written_in)))
    candidates = (path, beside) if os.path.isabs(path) else (beside, path)
    return next((os.path.abspath(found) for found in candidates if os.path.exists(found)), path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_space(folder: Path) -> int:
    """Free bytes on the disk of a folder that need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def is_out_of_room(error: Exception) -> bool:
    """Whether a write failed at a full disk, a quota, or a limit on the size of files."""
    if isinstance(error, OSError):
        number = error.errno
    else:  # safetensors gives the system's error in its text alone
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_writable(folder: Path, where: str, hint: str) -> None:
    """Check by writing a temporary file that ``folder`` is writable, or can be created.

    Raises:
        UserError: a file is in the way, or the disk is full or read-only.
    """
    there = absolute(folder)
    while not os.path.lexists(there):
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise cannot_write(error, where, hint, there) from None


def cannot_write(error: OSError, where: str, hint: str, there: Path | None = None) -> UserError:
    """The error for a path that cannot be written."""
    path = there or (Path(error.filename) if isinstance(error.filename, str) else None)
    while path is not None and not os.path.lexists(path) and path != path.parent:
        path = path.parent
    why = f"{path} is a file" if path is not None and path.is_file() else error.strerror or str(error)
    named = f" ({path})" if path is not None and str(path) not in f"{where} {why}" else ""
    return UserError(f"cannot be written: {why}{named}", where=where, hint=hint)
