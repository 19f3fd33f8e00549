"""Reading the small JSON files of models and runs: any fault is one message that names the file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3v.errors import UserError

_COPY = "copy or download it again"


def read_json(file: Path, *, hint: str = _COPY) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file cannot be read, or contains anything else.
    """
    try:
        content = file.read_bytes()
        value = json.loads(content)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=str(file), hint=hint) from None
    except (ValueError, RecursionError) as error:
        what = f"is not valid JSON: {error}" if content.strip() else "is an empty file"
        raise UserError(what, where=str(file), hint=hint) from None
    if not isinstance(value, dict):
        raise UserError(f"must contain a JSON object, not {type(value).__name__}", where=str(file), hint=hint)
    return value


@contextlib.contextmanager
def content_of(file: Path) -> Iterator[None]:
    """Attribute any exception raised inside to the content of ``file``, as a `UserError`.

    For calls that only parse it: libraries raise all kinds of exceptions for unexpected values.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot be used: {what:.300}", where=str(file), hint=_COPY) from error
