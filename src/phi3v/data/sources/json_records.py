"""Objects of a JSON file, one at a time, whichever way the file holds them.

One object a line; a JSON array; objects one after the other that are spread over lines, as `jq .` prints them; or one
object around them, such as ``{"data": [{…}, {…}]}``.

LLaVA's annotation files are arrays of up to gigabytes. `json.load` would hold all of it as Python objects;
here one record and what is buffered around it are in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from phi3v.data.faults import quote
from phi3v.data.jsonl import MAX_LINE_BYTES, read_lines, require_file
from phi3v.errors import UserError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")

_CHUNK = 2**20  # characters
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_HOPELESS = 2  # number of the line (from 0) up to which one must be JSON
_FORMS = "write one object a line, or all of them as one JSON array: [{…}, {…}]"
_SPACE = re.compile(r"[ \t\n\r]*")
# An object that has one of these is a record, not what is around them.
_RECORD_KEYS = ("conversations", "messages", "chosen", "completion")


class _Decoder(json.JSONDecoder):
    """Notes the keys that an object names twice; plain dicts keep the last value without a word."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._make_object)
        self.repeated: list[str] = []

    def _make_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            self.repeated.append(next(key for k, (key, _) in enumerate(pairs) if key in dict(pairs[:k])))
        return value


def json_rows(files: Sequence[Path]) -> Callable[[], Iterable[tuple[str, dict[str, Any] | UserError]]]:
    """`read_json_records` of files, one after the other, as often as it is called."""
    return lambda: chain.from_iterable(map(read_json_records, files))


def read_json_records(path: Path) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """(place, object) of each record of a JSON file.

    The place is ``file:line``; in an array the record's 0-based index follows, because whole arrays are often
    written as one line. A record that is no object or names a key twice, and of one object a line a line that is not
    JSON, comes as the error that says so, and the reading goes on.

    Raises:
        UserError: the file cannot be read or is not UTF-8, or it is broken in such a way that where its next record
            begins is anybody's guess.
    """
    require_file(path)
    require_text_encoding(path, utf16=False)
    lines = [raw.removeprefix(b"\xef\xbb\xbf").strip() for _, raw in islice(read_lines(path), 2)]
    if lines and lines[0].startswith(b"["):
        yield from _read_values(path, is_array=True)
        return
    records = _read_values(path, is_array=False) if lines and _is_spread(lines) else _read_json_lines(path)
    first = list(islice(records, 2))
    yield from _unpacked(*first[0], path) if len(first) == 1 else first
    yield from records


def _is_spread(lines: Sequence[bytes]) -> bool:
    """Whether the first object goes on after its line; ``lines`` are the first two that are not blank."""
    if not lines[0].startswith(b"{") or (len(lines) > 1 and lines[1].startswith(b"{")):
        return False
    text = lines[0].decode("utf-8", "replace")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False


def _unpacked(
    place: str, value: dict[str, Any] | UserError, path: Path
) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """What the only object of a file is around: a list of records under some key, or each under its id."""
    if isinstance(value, UserError) or any(key in value for key in _RECORD_KEYS):
        yield place, value
        return
    lists = [key for key, items in value.items() if _is_list_of_objects(items) and (items or len(value) == 1)]
    if len(lists) == 1:
        for k, item in enumerate(value[lists[0]]):
            yield f"{path}: {lists[0]}[{k}]", item
    elif lists:
        what = f"is one object with several lists: {', '.join(quote(key, 40) for key in lists[:8])}"
        hint = f"write each to a file of its own, e.g. `jq -c '.{lists[0]}[]' {path.name} > {lists[0]}.jsonl`"
        raise UserError(what, where=str(path), hint=hint)
    elif len(value) > 1 and all(isinstance(item, dict) for item in value.values()):
        for key, item in value.items():
            yield f"{path}: {quote(key, 40)}", {"id": key} | item
    else:
        yield place, value


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def require_text_encoding(path: Path, *, utf16: bool) -> str:
    """The encoding of a text file by its first bytes: UTF-8, or what its byte order mark says.

    Args:
        utf16: UTF-16 and UTF-32 with a mark are taken.

    Raises:
        UserError: it is in one of them and that is not taken, or without a mark.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    encoding = next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), None)
    if encoding is not None and utf16:
        return encoding
    if encoding is None:
        if start.count(0) < len(start) / 4 or not start:
            return "utf-8-sig"
        encoding = "utf-16le" if start[1::2].count(0) > start[::2].count(0) else "utf-16be"
    hint = f"save the file as UTF-8, e.g. `iconv -f {encoding.upper()} -t UTF-8 {path.name} > new{path.suffix}`"
    raise UserError(f"is not UTF-8 but {encoding.upper()}, if it is text at all", where=str(path), hint=hint)


def not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    """The error for a text file in another encoding."""
    hint = f"save the file as UTF-8, e.g. `iconv -f ENCODING -t UTF-8 {path.name} > new{path.suffix}`"
    return UserError(
        f"is not {error.encoding.upper()}: byte 0x{error.object[error.start]:02x}", where=str(path), hint=hint
    )


def _read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    decoder = _Decoder()
    records = 0
    for number, (line, raw) in enumerate(read_lines(path)):
        place = f"{path}:{line}"
        try:
            if len(raw) > MAX_LINE_BYTES:
                raise ValueError(f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB")
            decoder.repeated.clear()
            value = decoder.decode(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:  # both not UTF-8 and not JSON are ValueErrors
            fault = UserError(f"is not valid JSON: {error}", where=place, hint=_FORMS)
            if not records and number == _HOPELESS:
                raise UserError(f"{fault.what}; nor are the lines before it", where=place, hint=_FORMS) from None
            yield place, fault
        else:
            records += 1
            yield place, _object(value, place, decoder)


def _read_values(path: Path, *, is_array: bool) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """The values of an array, or of a text of objects with nothing between them but space."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text, index, after_comma = _Text(file, path), 0, False
            if is_array:
                text.skip("[")
            while text.next_character() != ("]" if is_array else "") or after_comma:
                place = f"{path}:{text.line}" + f": [{index}]" * is_array
                yield place, _object(text.take_value(), place, text.decoder)
                index += 1
                after_comma = is_array and text.next_character() != "]"
                if after_comma:
                    text.skip(",")
            if is_array:
                text.skip("]")
            if text.next_character():
                what = f"something follows the array: {quote(text.text[text.position :], 40)}"
                raise UserError(what, where=f"{path}:{text.line}", hint="write one array of all records")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None


class _Text:
    """A JSON file of which a part is in memory, from what is being read on.

    Attributes:
        text, position, line: the part, what of it has been read, and the line there.
        decoder: of the values.
    """

    def __init__(self, file: TextIO, path: Path) -> None:
        self.decoder = _Decoder()
        self.text, self.position, self.line = "", 0, 1
        self._file, self._path = file, path

    def next_character(self) -> str:
        """The next one that is no space, not taken; empty at the end."""
        while True:
            space = _SPACE.match(self.text, self.position)
            assert space is not None  # it matches nothing, too
            self._advance(space.end())
            if self.position < len(self.text) or not self._read_more():
                return self.text[self.position : self.position + 1]

    def skip(self, expected: str) -> None:
        """Take a character of an array."""
        if (found := self.next_character()) != expected:
            what = f"Expecting '{expected}' delimiter" if found else "the array has no end"
            raise self._broken(json.JSONDecodeError(what, self.text, self.position))
        self._advance(self.position + 1)

    def take_value(self) -> Any:
        size = _CHUNK
        while True:
            self.decoder.repeated.clear()
            fault, value, end = None, None, 0
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                fault = error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
                fault = json.JSONDecodeError(str(error), self.text, self.position)
            # What follows the value is there, so it is there in full.
            if fault is None and end < len(self.text):
                break
            if len(self.text) - self.position > MAX_LINE_BYTES:
                what = f"is not valid JSON: one value is longer than {MAX_LINE_BYTES // 2**20} MiB"
                hint = f"{_FORMS}, e.g. `jq -c '.data[]' {self._path.name}`"
                raise UserError(what, where=f"{self._path}:{self.line}", hint=hint)
            if not self._read_more(size):
                if fault is not None:
                    raise self._broken(fault)
                break
            size *= 2  # a large record is tried again few times
        self._advance(end)
        return value

    def _read_more(self, size: int | None = None) -> bool:
        more = self._file.read(size or _CHUNK)
        self.text, self.position = self.text[self.position :] + more, 0
        return bool(more)

    def _advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.position, end)
        self.position = end

    def _broken(self, error: json.JSONDecodeError) -> UserError:
        near = quote(self.text[max(0, error.pos - 20) : error.pos + 20])
        return UserError(
            f"is not valid JSON: {error.msg}",
            where=f"{self._path}:{self.line + self.text.count(chr(10), self.position, error.pos)}",
            hint=f"look near {near}; `python -m json.tool {self._path.name}` looks at the whole file",
        )


def _object(value: object, place: str, decoder: _Decoder) -> dict[str, Any] | UserError:
    if not isinstance(value, dict):
        return UserError("the record must be an object", where=place, hint='write {"id": "…", …}')
    if decoder.repeated:
        what = f"the key {quote(decoder.repeated[0], 40)} is there twice in one object"
        return UserError(what, where=place, hint="keep one of the two")
    return value
