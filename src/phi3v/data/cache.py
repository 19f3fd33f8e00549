"""Where what we derive from a data file is kept: one folder for each version of each file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from phi3v.data.jsonl import require_file
from phi3v.data.schema import SCHEMA_VERSION, SpecialText
from phi3v.errors import UserError


def cache_root() -> Path:
    """``$PHI3V_CACHE``, else ``phi3v/`` in the cache of the ``datasets`` library."""
    if chosen := os.environ.get("PHI3V_CACHE"):
        return Path(chosen)
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "phi3v"


def cache_folder(path: Path, special_text: SpecialText) -> Path:
    """The folder of this version of a data file, made if need be.

    Its name is a hash of the absolute path, size, modification time, schema version and ``special_text``, so
    an edited file gets another one.

    Raises:
        UserError: the file cannot be read, or the folder cannot be made.
    """
    require_file(path)
    status = path.stat()
    identity = [os.path.abspath(path), status.st_size, status.st_mtime_ns, SCHEMA_VERSION, special_text]
    name = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    folder = cache_root() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return folder


def cannot_write(folder: Path, error: OSError) -> UserError:
    """The error for a cache that cannot be written."""
    return UserError(
        f"cannot write the cache: {error.strerror or error}",
        where=str(folder),
        hint="set PHI3V_CACHE to a folder with room that you may write to",
    )
