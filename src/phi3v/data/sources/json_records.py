"""Objects of a file that is either one JSON array or one object a line, one at a time.

LLaVA's annotation files are arrays of up to gigabytes. `json.load` would hold all of it as Python objects;
here one record and what is buffered around it are in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from phi3v.data.faults import quote
from phi3v.data.jsonl import read_lines, require_file
from phi3v.data.schema import MAX_LINE_BYTES
from phi3v.errors import UserError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")

_CHUNK = 2**20  # characters
_SPACE = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


def json_rows(files: Sequence[Path]) -> Callable[[], Iterable[tuple[str, dict[str, Any] | UserError]]]:
    """`read_json_records` of files, one after the other, as often as it is called."""
    return lambda: chain.from_iterable(map(read_json_records, files))


def read_json_records(path: Path) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """(place, object) of each record of a JSON array or of a file of JSON lines.

    The place is ``file:line``; in an array the record's 0-based index follows, because whole arrays are often
    written as one line. A record that is no object, and a line that is not JSON, comes as the error that says
    so, and the reading goes on.

    Raises:
        UserError: the file cannot be read or is not UTF-8, or an array is broken, so that where its next record
            begins is anybody's guess.
    """
    require_file(path)
    with path.open("rb") as file:
        start = file.read(4096)
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        try:
            with path.open(encoding="utf-8-sig") as text:
                yield from _read_array(text, path)
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from None
    else:
        yield from _read_json_lines(path)


def not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    """The error for a text file in another encoding."""
    hint = f"save the file as UTF-8, e.g. `iconv -f ENCODING -t UTF-8 {path.name} > new{path.suffix}`"
    return UserError(f"is not UTF-8: byte 0x{error.object[error.start]:02x}", where=str(path), hint=hint)


def _read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    for line, raw in read_lines(path):
        place = f"{path}:{line}"
        try:
            if len(raw) > MAX_LINE_BYTES:
                raise ValueError(f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB")
            value = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:  # both not UTF-8 and not JSON are ValueErrors
            hint = "write one object a line, or all of them as one JSON array: [{…}, {…}]"
            yield place, UserError(f"is not valid JSON: {error}", where=place, hint=hint)
        else:
            yield place, _object(value, place)


def _read_array(file: TextIO, path: Path) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    text = file.read(_CHUNK)
    position = text.index("[") + 1  # read up to there, in `text`
    line = 1 + text.count("\n", 0, position)
    index = 0
    while True:
        chunk = _CHUNK
        while True:
            begin = _end_of_space(text, position)
            if index == 0 and text[begin : begin + 1] == "]":
                end = after = begin
                break
            value, end, fault = _decode_at(text, begin)
            after = _end_of_space(text, end)
            if fault is None and after < len(text):  # what follows the value is there, so it is there in full
                break
            more = file.read(chunk)
            if not more or len(text) - position > MAX_LINE_BYTES:
                why = fault or json.JSONDecodeError("the array has no end", text, len(text))
                raise _broken(path, line, text, position, why)
            text, position = text[position:] + more, 0
            chunk *= 2  # a large record is tried again few times
        line += text.count("\n", position, begin)
        if end > begin:
            place = f"{path}:{line}: [{index}]"
            yield place, _object(value, place)
            index += 1
        if text[after] == "]":
            break
        if text[after] != ",":
            why = json.JSONDecodeError("Expecting ',' delimiter", text, after)
            raise _broken(path, line, text, begin, why)
        line += text.count("\n", begin, after)
        position = after + 1
    rest = text[after + 1 :].strip() or file.read(_CHUNK).strip()
    if rest:
        line += text.count("\n", begin, after)
        hint = "write one array of all records"
        raise UserError(f"something follows the array: {quote(rest, 40)}", where=f"{path}:{line}", hint=hint)


def _decode_at(text: str, begin: int) -> tuple[Any, int, json.JSONDecodeError | None]:
    """(value, its end, None), or (None, ``begin``, why there is none), perhaps only because ``text`` ends."""
    try:
        value, end = _decode(text, begin)
    except json.JSONDecodeError as error:
        return None, begin, error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
        return None, begin, json.JSONDecodeError(str(error), text, begin)
    return value, end, None


def _end_of_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # it matches nothing, too
    return match.end()


def _broken(path: Path, line: int, text: str, counted_to: int, error: json.JSONDecodeError) -> UserError:
    """``line`` is that of ``text[counted_to]``."""
    line += text.count("\n", counted_to, error.pos)
    near = quote(text[max(0, error.pos - 20) : error.pos + 20])
    return UserError(
        f"is not valid JSON: {error.msg}",
        where=f"{path}:{line}",
        hint=f"look near {near}; `python -m json.tool {path.name}` looks at the whole file",
    )


def _object(value: object, place: str) -> dict[str, Any] | UserError:
    if isinstance(value, dict):
        return value
    return UserError("the record must be an object", where=place, hint='write {"id": "…", …}')
