"""Files of one JSON object a line: reading lines, decoding one, writing a file."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.data.faults import quote
from phi3v.errors import UserError

# Of the hidden files that a killed process leaves behind, beside the file they would have become.
TEMPORARY_SUFFIX = ".tmp"

# A longer line is no conversation but a whole file without line breaks. The bound keeps memory flat.
MAX_LINE_BYTES = 64 * 2**20

_ONE_A_LINE = "write one object a line, e.g. `jq -c '.[]' old.json > new.jsonl`"
_NO_LINE_BREAKS = "a record may not be spread over lines, e.g. `jq -c . old.json > new.jsonl` joins them"


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


class BadLineError(Exception):
    """A line that is no JSON object: what is wrong, and what to do about it."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def read_object(raw: str | bytes, line: int) -> dict[str, Any]:
    """The object of a line; bytes are decoded as UTF-8, and a byte order mark is tolerated on line 1.

    Raises:
        BadLineError: it is not valid, or something else than an object.
    """
    if len(raw) > MAX_LINE_BYTES:
        raise BadLineError(f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB", _ONE_A_LINE)
    if isinstance(raw, bytes):
        try:
            raw = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            encoding = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "ENCODING"
            raise BadLineError(
                f"is not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line",
                f"save the file as UTF-8, e.g. `iconv -f {encoding} -t UTF-8 old.jsonl > new.jsonl`",
            ) from None
    text = (raw.removeprefix("\ufeff") if line == 1 else raw).strip()
    try:
        value = _decode_json(text)
    except json.JSONDecodeError as error:
        raise BadLineError(
            f"is not valid JSON: {error.msg} (column {error.colno})", _json_hint(text, error.pos)
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
        raise BadLineError(f"is not usable JSON: {error}", "no field of the format needs this; remove it") from None
    if not isinstance(value, dict):
        raise BadLineError(f"must be an object, not {json_kind(value)}", _ONE_A_LINE)
    return value


@dataclass(frozen=True, slots=True)
class NotANumber:
    """NaN, Infinity or -Infinity, which Python's JSON reader lets through. No field takes one."""

    name: str


class RepeatedKeys(dict[str, Any]):
    """An object that names a key twice; plain dicts keep the last value without a word."""

    repeated: tuple[str, ...] = ()


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    marked = RepeatedKeys(plain)
    counts = Counter(name for name, _ in pairs)
    marked.repeated = tuple(name for name in plain if counts[name] > 1)
    return marked


_decode_json = json.JSONDecoder(object_pairs_hook=_make_object, parse_constant=NotANumber).decode


def json_kind(value: object) -> str:
    """What JSON calls ``value``: "a number", "null", "a list" …"""
    if isinstance(value, NotANumber):
        return value.name
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", type(None): "null"}
    return kinds.get(type(value), "bytes" if isinstance(value, bytes) else "an object")


def _json_hint(text: str, position: int) -> str:
    if text in ("{", "[", "[{"):
        return _NO_LINE_BREAKS if text == "{" else _ONE_A_LINE
    if text.startswith("["):
        return _ONE_A_LINE
    near = f"look near {quote(text[max(0, position - 20) : position + 20])}"
    if text.startswith("{'"):
        return f"JSON quotes with \", not with '; {near}"
    if position >= len(text):
        return f"the line ends too early; {_NO_LINE_BREAKS}"
    return near
