"""What the readers of original distributions share: their refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from phi3v.data.schema import json_kind
from phi3v.errors import UserError


def unknown_layout(folder: Path, known: Sequence[str]) -> UserError:
    """The error for a folder or file that is in none of the known forms."""
    if folder.is_dir():
        inside = sorted(path.name + ("/" if path.is_dir() else "") for path in islice(folder.iterdir(), 200))
        found = ", ".join(inside[:8]) + (" …" if len(inside) > 8 else "") if inside else "nothing"
        found = f"; it holds {found}"
    else:
        found = ""
    return UserError(
        f"is in no form that is known here{found}",
        where=str(folder),
        hint=f"known are: {'; '.join(known)}",
    )


def json_line(raw: bytes) -> dict[str, Any]:
    """The object of one line.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not valid JSON: {error}", hint="one JSON object a line") from None
    if not isinstance(value, dict):
        raise UserError(f"must be a JSON object, not {json_kind(value)}", hint="one JSON object a line")
    return value
