"""Reading and writing files of one JSON object a line."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from phi3v.data.schema import MAX_LINE_BYTES
from phi3v.errors import UserError

# Of the hidden files that a killed process leaves behind, beside the file they would have become.
TEMPORARY_SUFFIX = ".tmp"


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based line, its bytes) of every line that is not blank.

    Lines end at ``\\n`` alone, as every JSONL tool counts them. Of a line above `MAX_LINE_BYTES` one byte
    more than that is given, and the rest is skipped, so that memory stays bounded.

    Raises:
        UserError: the file cannot be read.
    """
    require_file(path)
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                rest = raw
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES)
            if raw.removeprefix(b"\xef\xbb\xbf").strip():
                yield number, raw


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]], *, overwrite: bool = False) -> int:
    """Write one object a line, all or nothing, and return how many.

    The lines go to a temporary file beside ``path`` that takes its name at the end. An existing file with the
    same bytes is left as it is, so that a conversion can be run again.

    Raises:
        UserError: ``path`` exists with other content and ``overwrite`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with replacing(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False))
                file.write("\n")
                count += 1
        if path.exists() and not overwrite and not filecmp.cmp(path, temporary, shallow=False):
            raise UserError("exists with other content", where=str(path), hint="remove it, or write to another folder")
    return count


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; what was written there becomes ``path`` if the block succeeds.

    Several processes and threads may replace the same file at once; the last one wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_file(path: Path) -> None:
    """Raise `UserError` unless ``path`` is a file that can be opened for reading."""
    try:
        if path.is_dir():
            raise UserError("is a folder, not a file", where=str(path), hint="name the .jsonl file in it")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        hint = "check the path; `phi3v data convert` makes data files"
        raise UserError("no such file", where=str(path), hint=hint) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), hint="check its permissions") from None
