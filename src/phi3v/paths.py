"""What a name stands for, a path here or something on the hub; where a run's files are now; where one may write."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from phi3v.errors import UserError

# Folders that people name by relative paths, and pages of the hub's own: none is the owner of a model.
_FOLDERS = re.compile(
    "(checkpoint|dataset|export|model|output|result|run)s?|data|home|mnt|out|spaces|tmp|work", re.IGNORECASE
)
_OF_A_RUN = re.compile(r"final|best|checkpoint-\d+")
_FILE = re.compile(r".*\.(arrow|bin|ckpt|csv|gguf|gz|jsonl?|parquet|pth?|py|safetensors|tar|txt|ya?ml|zip)", re.I)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` may be asked of the hub: ``owner/name``, and nothing about it looks like a path.

    Everything that takes a path or a hub id asks here, so that no path of this machine is ever sent away.
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


def absolute(path: str | Path) -> Path:
    """The path as it is named, links and all, but valid in any current folder; ``~`` is the home folder."""
    path = Path(os.path.expanduser(path))
    if ".." in path.parts:  # what lies above a link is above its target
        path = path.parent.resolve() / path.name
    return Path(os.path.abspath(path))


def find_model(name: str, where: str, *, hint: str | None = None) -> str:
    """A model's folder as an absolute path, or its hub id.

    Args:
        where: what named it, for the message.
        hint: what to do if there is none.

    Raises:
        UserError: there is no such folder, and it is no hub id.
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
    """Where ``path``, of the configuration of a run, is now.

    A run that was moved together with its model or data has them in the same place relative to it. Older versions wrote
    paths relative to the folder that the run was started in, of which the same is true.

    Args:
        written_in: the run folder as that configuration names it.
        folder: the run folder as it is now.

    Returns:
        ``path`` itself if there is nothing.
    """
    if not path:
        return path
    beside = os.path.normpath(Path(os.path.abspath(folder), os.path.relpath(path, written_in)))
    candidates = (path, beside) if os.path.isabs(path) else (beside, path)
    return next((os.path.abspath(found) for found in candidates if os.path.exists(found)), path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable(folder: Path, where: str, hint: str) -> None:
    """Look whether files can be made in ``folder``, or it can be made, by making one that is gone at once.

    Raises:
        UserError: something is in the way, the disk is full or cannot be written.
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
    """The error for a place that cannot be written."""
    path = there or (Path(error.filename) if isinstance(error.filename, str) else None)
    while path is not None and not os.path.lexists(path) and path != path.parent:
        path = path.parent
    why = f"{path} is a file" if path is not None and path.is_file() else error.strerror or str(error)
    named = f" ({path})" if path is not None and str(path) not in f"{where} {why}" else ""
    return UserError(f"cannot be written: {why}{named}", where=where, hint=hint)
