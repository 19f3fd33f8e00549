"""Data files that somebody hands in before they are converted: said once, with the command that converts them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from phi3v.data.faults import Fault
from phi3v.data.jsonl import read_lines
from phi3v.data.schema import other_format
from phi3v.data.sources.json_records import read_json_records
from phi3v.errors import UserError

_TABLES = (".parquet", ".arrow", ".csv", ".tsv")


def other_file(path: Path) -> Fault | None:
    """The one fault of a file that is in another format, by its name or its first record; None if it may be ours.

    Raises:
        UserError: the file cannot be read.
    """
    if path.suffix.lower() in _TABLES:
        hint = f"convert it first: `phi3v data convert csv --source {shlex.quote(str(path))} --out DIR`"
        return Fault(path, 1, "", "is a table", f"{hint}; a table of chats or preferences with `convert messages`")
    first = next(read_lines(path), None)
    try:
        found = next(read_json_records(path), None)
    except UserError:
        return None  # what is wrong is said where the lines are read
    if first is None or found is None or isinstance(found[1], UserError):
        return None
    line, raw = first
    if other := other_format(found[1], path):
        return Fault(path, line, "", *other)
    if found[0] == f"{path}:{line}" and _is_object(raw):
        return None
    unpack = ".[]" if raw.lstrip(b"\xef\xbb\xbf \t").startswith(b"[") else "."
    hint = f"e.g. `jq -c '{unpack}' {path.name} > {path.stem}.lines.jsonl`"
    return Fault(path, line, "", "has its records in one array or spread over lines: write one object a line", hint)


def _is_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False
