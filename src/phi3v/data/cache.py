"""Where what we derive from a data file is kept: one folder for each version of each file."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phi3v.data.jsonl import replacing, require_file
from phi3v.data.schema import SCHEMA_VERSION, SpecialText
from phi3v.errors import UserError
from phi3v.paths import file_hash

Ints = npt.NDArray[np.int64]

CACHE_HINT = "set PHI3V_CACHE to a folder with room that you may write to"


def cache_root() -> Path:
    """``$PHI3V_CACHE``, else ``phi3v/`` in the cache of the ``datasets`` library."""
    if chosen := os.environ.get("PHI3V_CACHE"):
        return Path(chosen)
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "phi3v"


def content_hash(path: Path) -> str:
    """SHA-256 of a data file.

    Raises:
        UserError: it cannot be read.
    """
    require_file(path)
    try:
        return file_hash(path)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), hint="check the disk") from None


def cache_folder(sha256: str, special_text: SpecialText) -> Path:
    """The folder of a data file with this content, made if need be.

    By content, since neither size nor time tell: ``cp -p``, ``rsync -t`` and ``touch -d`` set them.

    Raises:
        UserError: the folder cannot be made.
    """
    identity = [sha256, SCHEMA_VERSION, special_text]
    name = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    folder = cache_root() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return folder


def recall(file: Path) -> dict[str, Any]:
    """What `remember` kept; empty if nothing was, or it is damaged."""
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(file: Path, values: dict[str, Any]) -> None:
    """Keep plain values; the file appears whole.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(values))
    except OSError as error:
        raise cannot_write(file.parent, error) from None


def changed(path: Path) -> UserError:
    """The error for a data file that became another while it was read."""
    return UserError("changed while it was read", where=str(path), hint="start again when it is written")


def cannot_write(folder: Path, error: OSError) -> UserError:
    """The error for a cache that cannot be written."""
    return UserError(
        f"cannot write the cache: {error.strerror or error}",
        where=str(folder),
        hint=CACHE_HINT,
    )


def recall_arrays(file: Path, shapes: dict[str, int]) -> dict[str, Ints] | None:
    """The arrays that were kept, if they are whole and as long as they must be."""
    try:
        with np.load(file) as kept:
            arrays = {name: kept[name] for name in shapes}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    if any(array.dtype != np.int64 for array in arrays.values()):
        return None
    return arrays if {name: len(array) for name, array in arrays.items()} == shapes else None


def keep_arrays(file: Path, arrays: dict[str, Ints]) -> None:
    """Keep arrays, where that is possible."""
    try:
        with replacing(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, **arrays)  # type: ignore[arg-type]
    except OSError:
        pass  # it is counted again the next time


def digest(*settings: object) -> str:
    """A name for settings, which are plain values."""
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
