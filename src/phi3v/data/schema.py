"""What one line of a data file holds, and every way it can be wrong.

A line is one JSON object::

    {"id": "val-0300", "source": "ucf101", "conversations": [
        {"images": ["val/BabyCrawling/g21.0.jpg"], "user": "Which class?", "assistant": "BabyCrawling"}]}

Optional are ``source`` and ``system`` (a system message) of the record, and of a turn ``images``, ``image_offsets``
(where in ``user`` each image stands), ``weight`` (0: context, not a target) and ``answers`` (all reference answers, for
evaluation).
Nothing here touches the disk; `images.py` checks whether an image can be read.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi3v.data.faults import Fault, quote
from phi3v.processing.special_text import escape_special_text, find_special_text, shift_by_escapes

SpecialText = Literal["refuse", "escape"]

# Part of the name of every cached table: raise it whenever the same file would give other records.
SCHEMA_VERSION = 2

# A longer line is no conversation but a whole file without line breaks. The bound keeps memory flat.
MAX_LINE_BYTES = 64 * 2**20

_RECORD_KEYS = ("id", "source", "system", "conversations")
_TURN_KEYS = ("images", "image_offsets", "user", "assistant", "weight", "answers")
_ONE_A_LINE = "write one object a line, e.g. `jq -c '.[]' old.json > new.jsonl`"
_NO_LINE_BREAKS = "a record may not be spread over lines, e.g. `jq -c . old.json > new.jsonl` joins them"


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with its images, and its answer.

    Attributes:
        user: the question; empty only if the turn has images.
        assistant: the answer.
        images: paths relative to the data folder's ``images/``, with ``/``.
        answers: all reference answers, for evaluation; empty means that ``assistant`` is the only one.
        image_offsets: where in ``user`` each image stands, in characters; None: all before it, in a line of their own.
        weight: 1, or 0 for a turn that is context: its answer is neither a target of the loss nor evaluated.
    """

    user: str
    assistant: str
    images: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    image_offsets: tuple[int, ...] | None = None
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation: one line of a data file.

    Attributes:
        id: unique in its file.
        source: the dataset it came from.
        turns: at least one (key ``conversations`` in JSON).
        line: 1-based line in the file.
        system: the system message.
    """

    id: str
    source: str | None
    turns: tuple[Turn, ...]
    line: int
    system: str | None = None

    @property
    def images(self) -> tuple[str, ...]:
        """Those of all turns, in order."""
        return tuple(image for turn in self.turns for image in turn.images)

    @property
    def num_questions(self) -> int:
        """Turns with a weight."""
        return sum(turn.weight for turn in self.turns)


@dataclass(slots=True)
class Line:
    """A line after reading: its record, or its faults and what could be read all the same.

    Attributes:
        record: None exactly if there are faults.
        faults: all of them, in the order of the fields.
        id: the id, if that is valid.
        images: (field, path) of every image path that may be looked up on the disk.
    """

    record: Record | None = None
    faults: list[Fault] = field(default_factory=list)
    id: str | None = None
    images: list[tuple[str, str]] = field(default_factory=list)


def read_line(text: str | bytes, *, file: Path, line: int, special_text: SpecialText = "refuse") -> Line:
    """Read one line that is not blank; raises nothing for what the line holds.

    Args:
        text: the line; bytes are decoded as UTF-8. A byte order mark is tolerated on line 1.
        file: named in the faults.
        line: 1-based.
        special_text: whether literal special tokens in texts are faults or are escaped.
    """
    return _LineReader(file, line, special_text).read(text)


def image_path_fault(path: str) -> tuple[str, str] | None:
    """(what, hint) if ``path`` is no path inside the data folder's ``images/``, whatever the disk holds."""
    relative = "image paths are relative to the data folder's images/, e.g. 'train/0.png'"
    if not path.strip():
        return "is an empty path", 'name the file, or leave "images" out if the turn has none'
    if "\0" in path:
        return f"has a NUL character: {quote(path)}", relative
    if not path.isascii() and (half := _surrogate(path)):
        if "\udc80" <= half <= "\udcff":  # how Python reads such a name from the disk
            return f"has bytes that are not UTF-8: {quote(path)}", "rename the file"
        return f"has half of a surrogate pair: {quote(path)}", "correct the \\ud8… escape"
    if re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]+://|data:)", path):
        return f"is a URL, not a file: {quote(path)}", f"save the image in the data folder; {relative}"
    if path.startswith(("/", "\\\\")) or re.match(r"[A-Za-z]:[\\/]", path):
        return f"is an absolute path: {quote(path)}", relative
    if "\\" in path:
        return (
            f"has a backslash: {quote(path)}",
            f"separate folders with '/': {quote(path.replace(chr(92), '/'))}",
        )
    depth = 0
    for part in path.split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return f"leaves the data root: {quote(path)}", relative
    return None


def _surrogate(text: str) -> str | None:
    """The first half of a surrogate pair that stands alone."""
    return next((character for character in text if "\ud800" <= character <= "\udfff"), None)


def other_format(value: dict[str, Any], file: Path) -> tuple[str, str] | None:
    """(what, hint) if an object is a record of LLaVA's or of OpenAI's format rather than one of ours."""
    for key, name, source in (("conversations", "LLaVA's", "llava"), ("messages", "a chat", "messages")):
        items = value.get(key)
        first = items[0] if isinstance(items, list) and items else None
        if isinstance(first, dict) and not {"user", "assistant"} & first.keys() and {"from", "role"} & first.keys():
            hint = f"convert it first: `phi3v data convert {source} --source {shlex.quote(str(file))} --out DIR`"
            return f"looks like {name} format", hint
    return None


@dataclass(frozen=True, slots=True)
class _NotANumber:
    """NaN, Infinity or -Infinity, which Python's JSON reader lets through. No field takes one."""

    name: str


class _RepeatedKeys(dict[str, Any]):
    """An object that names a key twice; plain dicts keep the last value without a word."""

    repeated: tuple[str, ...] = ()


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    marked = _RepeatedKeys(plain)
    counts = Counter(name for name, _ in pairs)
    marked.repeated = tuple(name for name in plain if counts[name] > 1)
    return marked


_decode_json = json.JSONDecoder(object_pairs_hook=_make_object, parse_constant=_NotANumber).decode


def json_kind(value: object) -> str:
    """What JSON calls ``value``: "a number", "null", "a list" …"""
    if isinstance(value, _NotANumber):
        return value.name
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", type(None): "null"}
    return kinds.get(type(value), "bytes" if isinstance(value, bytes) else "an object")


class _LineReader:
    """Collects the faults of one line while it reads the fields."""

    def __init__(self, file: Path, line: int, special_text: SpecialText) -> None:
        self.file = file
        self.line = line
        self.special_text = special_text
        self.result = Line()

    def fault(self, where: str, what: str, hint: str) -> None:
        self.result.faults.append(Fault(self.file, self.line, where, what, hint))

    def read(self, raw: str | bytes) -> Line:
        text = self.decode(raw)
        value = None if text is None else self.json(text)
        if value is not None:
            self.record(value)
        return self.result

    def decode(self, raw: str | bytes) -> str | None:
        if len(raw) > MAX_LINE_BYTES:
            self.fault("", f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB", _ONE_A_LINE)
            return None
        if isinstance(raw, bytes):
            try:
                raw = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
                encoding = "UTF-16" if utf16 else "ENCODING"
                self.fault(
                    "",
                    f"is not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line",
                    f"save the file as UTF-8, e.g. `iconv -f {encoding} -t UTF-8 old.jsonl > new.jsonl`",
                )
                return None
        return raw.removeprefix("\ufeff") if self.line == 1 else raw

    def json(self, text: str) -> dict[str, Any] | None:
        text = text.strip()
        try:
            value = _decode_json(text)
        except json.JSONDecodeError as error:
            self.fault("", f"is not valid JSON: {error.msg} (column {error.colno})", _json_hint(text, error.pos))
            return None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
            self.fault("", f"is not usable JSON: {error}", "no field of the format needs this; remove it")
            return None
        if not isinstance(value, dict):
            self.fault("", f"must be an object, not {json_kind(value)}", _ONE_A_LINE)
            return None
        return value

    def record(self, value: dict[str, Any]) -> None:
        if other := other_format(value, self.file):
            self.fault("", *other)
            return
        self.keys(value, "", _RECORD_KEYS)
        self.result.id = self.id(value)
        source = value.get("source")
        if source is not None:
            source = self.string(source, "source", 'name the dataset in quotes, or leave "source" out')
        system = value.get("system")
        if system is not None:
            system = self.string(system, "system", 'write the text in quotes, or leave "system" out')
        if system is not None:
            if not system.strip():
                self.fault("system", "is empty", 'write the system message, or leave "system" out')
            system = self.special(system, "system")
        turns = self.turns(value)
        if not self.result.faults and not any(turn.weight for turn in turns):
            hint = "remove the line, or give a turn weight 1"
            self.fault("conversations", "has only turns of weight 0: there is nothing to train on", hint)
        if not self.result.faults:
            assert self.result.id is not None
            self.result.record = Record(self.result.id, source, turns, self.line, system)

    def id(self, value: dict[str, Any]) -> str | None:
        if "id" not in value:
            self.fault("id", "is missing", 'add "id": "…", a name that no other line has')
            return None
        name = value["id"]
        quoted = f'quote it: "id": "{name}"' if type(name) in (int, float) else "give it a name in quotes"
        name = self.string(name, "id", quoted)
        if name is not None and not name.strip():
            self.fault("id", "is empty", "give it a name that no other line has")
            return None
        return name

    def turns(self, value: dict[str, Any]) -> tuple[Turn, ...]:
        shape = 'write a list of turns: "conversations": [{"user": "…", "assistant": "…"}]'
        if "conversations" not in value:
            self.fault("conversations", "is missing", shape)
            return ()
        items = value["conversations"]
        if not isinstance(items, list):
            self.fault("conversations", f"must be a list, not {json_kind(items)}", shape)
            return ()
        if not items:
            self.fault("conversations", "has no turn", f"remove the line, or {shape}")
            return ()
        turns = [self.turn(item, f"conversations[{k}]") for k, item in enumerate(items)]
        return tuple(turn for turn in turns if turn is not None)

    def turn(self, value: object, where: str) -> Turn | None:
        """None if the turn has a fault."""
        if not isinstance(value, dict):
            self.fault(where, f"must be an object, not {json_kind(value)}", 'write {"user": "…", "assistant": "…"}')
            return None
        faults_before = len(self.result.faults)
        self.keys(value, f"{where}.", _TURN_KEYS)
        images = self.images(value.get("images"), f"{where}.images")
        offsets = self.offsets(value, f"{where}.image_offsets", len(images))
        user = self.text(value, "user", where)
        if user is not None and offsets:
            if offsets[-1] > len(value["user"]):
                what = f"is beyond the end of the question, which has {len(value['user']):,} characters"
                self.fault(f"{where}.image_offsets", what, "count characters from the start of the question, from 0")
            if user != value["user"]:
                offsets = tuple(shift_by_escapes(value["user"], offset) for offset in offsets)
        if user is not None and not user.strip() and not value.get("images"):
            self.fault(f"{where}.user", "is empty and the turn has no images", "ask something, or add images")
        assistant = self.text(value, "assistant", where)
        if assistant is not None and not assistant.strip():
            self.fault(
                f"{where}.assistant",
                "is empty: there is nothing to train on",
                "add the answer, or remove the turn",
            )
        answers = self.answers(value.get("answers"), f"{where}.answers")
        weight = value.get("weight")
        weight = 1 if weight is None else weight
        if isinstance(weight, bool) or weight not in (0, 1):
            hint = "1 to train on the answer, which is the default; 0 for a turn that is context"
            self.fault(f"{where}.weight", "must be 0 or 1", hint)
        if len(self.result.faults) > faults_before:
            return None
        assert user is not None
        assert assistant is not None
        return Turn(user, assistant, images, answers, offsets, int(weight))

    def images(self, value: object, where: str) -> tuple[str, ...]:
        hint = f'write a list: "images": ["{value}"]' if isinstance(value, str) else 'write "images": ["a.png"]'
        paths = []
        for at, path in self.strings(value, where, hint, "name the file in quotes; images lie in files of their own"):
            if wrong := image_path_fault(path):
                self.fault(at, *wrong)
                continue
            paths.append(path)
            self.result.images.append((at, path))
        return tuple(paths)

    def offsets(self, value: dict[str, Any], where: str, num_images: int) -> tuple[int, ...] | None:
        offsets = value.get("image_offsets")
        if offsets is None:
            return None
        hint = 'write the place of each image in "user", in characters from 0, or leave it out: all come first'
        if not isinstance(offsets, list) or not all(type(item) is int and item >= 0 for item in offsets):
            self.fault(where, "must be a list of whole numbers from 0", hint)
        elif offsets != sorted(offsets):
            self.fault(where, "must not decrease: images are listed in the order in which they stand", hint)
        elif len(offsets) != num_images:
            self.fault(where, f"must have one offset for each image: {len(offsets)} given, images: {num_images}", hint)
        return tuple(offsets) if isinstance(offsets, list) else None

    def answers(self, value: object, where: str) -> tuple[str, ...]:
        if value == []:
            self.fault(where, "is an empty list", 'list the reference answers, or leave "answers" out')
        texts = []
        for at, text in self.strings(value, where, 'write "answers": ["…", "…"]', "write the answer in quotes"):
            if not text.strip():
                self.fault(at, "is empty", "write the answer, or remove it")
            texts.append(self.special(text, at))
        return tuple(texts)

    def strings(self, value: object, where: str, hint: str, hint_of_each: str) -> Iterator[tuple[str, str]]:
        """Place and text of each string of an optional list."""
        if value is not None and not isinstance(value, list):
            self.fault(where, f"must be a list, not {json_kind(value)}", hint)
        for k, item in enumerate(value if isinstance(value, list) else ()):
            text = self.string(item, f"{where}[{k}]", hint_of_each)
            if text is not None:
                yield f"{where}[{k}]", text

    def text(self, value: dict[str, Any], key: str, where: str) -> str | None:
        """A required text that the model will read or write."""
        if key not in value:
            self.fault(f"{where}.{key}", "is missing", f'add "{key}": "…" to the turn')
            return None
        text = self.string(value[key], f"{where}.{key}", "write the text in quotes")
        return None if text is None else self.special(text, f"{where}.{key}")

    def special(self, text: str, where: str) -> str:
        if "<" not in text:
            return text
        found = find_special_text(text)
        if not found:
            return text
        if self.special_text == "escape":
            return escape_special_text(text)
        names = ", ".join(dict.fromkeys(found))
        hint = "remove it (images need no tag), or set special_text to escape to keep it as plain text"
        self.fault(where, f"holds text that the tokenizer reads as a special token: {names}", hint)
        return text

    def string(self, value: object, where: str, hint: str) -> str | None:
        if not isinstance(value, str):
            self.fault(where, f"must be a string, not {json_kind(value)}", hint)
            return None
        if not value.isascii() and _surrogate(value):
            self.fault(where, f"has half of a surrogate pair: {quote(value)}", "correct the \\ud8… escape")
            return None
        return value

    def keys(self, value: dict[str, Any], prefix: str, known: tuple[str, ...]) -> None:
        if isinstance(value, _RepeatedKeys):
            for name in value.repeated:
                self.fault(f"{prefix}{_key(name)}", "is there twice in one object", "keep one of the two")
        for name in value:
            if name not in known:
                near = difflib.get_close_matches(name.lower(), known, n=1)
                hint = f'did you mean "{near[0]}"?' if near else f"the keys here are {', '.join(known)}"
                self.fault(f"{prefix}{_key(name)}", "is an unknown key", hint)


def _key(name: str) -> str:
    """A key of the file for a message: as it is if it is a plain word."""
    return name if name.isidentifier() and len(name) <= 40 else quote(name, 40)


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
