"""What one line of a data file holds, and every way it can be wrong.

A line is one JSON object::

    {"id": "val-0300", "source": "ucf101", "conversations": [
        {"images": ["val/BabyCrawling/g21.0.jpg"], "user": "Which class?", "assistant": "BabyCrawling"}]}

Optional are ``source`` and ``system`` (a system message) of the record, and of a turn ``images``, ``image_offsets``
(where in ``user`` each image stands), ``weight`` (0: context, not a target) and ``answers`` (all reference answers, for
evaluation).

The last turn may say how good its answer is, for training on preferences. ``rejected`` has one worse answer or a list
of them; ``scores``, optional, are numbers for ``assistant`` and for each rejected answer, in this order, higher being
better::

    {"user": "What is the total?", "assistant": "€ 12,50", "rejected": ["€ 1,25", "12"], "scores": [1.0, 0.5, 0.0]}

Where answers were judged one by one, ``label`` says whether ``assistant`` is a good answer (true) or a bad one (false).

Nothing here touches the disk; `images.py` checks whether an image can be read.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from phi3v.data.faults import Fault, quote
from phi3v.data.image_paths import image_path_fault, lone_surrogate
from phi3v.data.jsonl import BadLineError, RepeatedKeys, json_kind, read_object
from phi3v.processing.special_text import escape_special_text, find_special_text, shift_by_escapes

SpecialText = Literal["refuse", "escape"]

# Part of the name of every cached table: raise it whenever the same file would give other records.
SCHEMA_VERSION = 3

_RECORD_KEYS = ("id", "source", "system", "conversations")
_TURN_KEYS = ("images", "image_offsets", "user", "assistant", "weight", "answers", "rejected", "scores", "label")


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
        rejected: worse answers, each different from ``assistant``; of the last turn only.
        scores: of ``assistant`` and of each of ``rejected``; empty if there are none. No rejected answer has a higher
            score than ``assistant``.
        label: whether ``assistant`` is a good answer, where answers were judged one by one; of the last turn only, and
            never beside ``rejected``.
    """

    user: str
    assistant: str
    images: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    image_offsets: tuple[int, ...] | None = None
    weight: int = 1
    rejected: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    label: bool | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The question and all answers."""
        return (self.user, self.assistant, *self.answers, *self.rejected)


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation: one line of a data file.

    Attributes:
        id: unique in its file.
        source: the dataset it came from.
        turns: at least one (key ``conversations`` in JSON).
        line: 1-based line in the file.
        system: the system message.
        file: the data file, where it was read from a table.
    """

    id: str
    source: str | None
    turns: tuple[Turn, ...]
    line: int
    system: str | None = None
    file: Path | None = field(default=None, compare=False)

    @property
    def images(self) -> tuple[str, ...]:
        """Those of all turns, in order."""
        return tuple(image for turn in self.turns for image in turn.images)

    @property
    def num_questions(self) -> int:
        """Turns with a weight."""
        return sum(turn.weight for turn in self.turns)

    @property
    def rejected(self) -> tuple[str, ...]:
        """The rejected answers of the last turn."""
        return self.turns[-1].rejected

    @property
    def label(self) -> bool | None:
        """The label of the last turn."""
        return self.turns[-1].label

    def answered(self, answer: str) -> Record:
        """This conversation with ``answer`` at its end instead, and without preferences."""
        last = replace(self.turns[-1], assistant=answer, rejected=(), scores=(), label=None)
        return replace(self, turns=(*self.turns[:-1], last))


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


def other_format(value: dict[str, Any], file: Path) -> tuple[str, str] | None:
    """(what, hint) if an object is a record of LLaVA's or of OpenAI's format rather than one of ours."""
    pair = any(keys <= value.keys() for keys in ({"chosen", "rejected"}, {"prompt", "completion"}))
    if pair and "conversations" not in value:
        hint = f"convert it first: `phi3v data convert messages --source {shlex.quote(str(file))} --out DIR`"
        return "looks like a file of preferences in TRL's format", hint
    for key, name, source in (("conversations", "LLaVA's", "llava"), ("messages", "a chat", "messages")):
        items = value.get(key)
        first = items[0] if isinstance(items, list) and items else None
        if isinstance(first, dict) and not {"user", "assistant"} & first.keys() and {"from", "role"} & first.keys():
            hint = f"convert it first: `phi3v data convert {source} --source {shlex.quote(str(file))} --out DIR`"
            return f"looks like {name} format", hint
    return None


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
        try:
            self.record(read_object(raw, self.line))
        except BadLineError as bad:
            self.fault("", bad.what, bad.hint)
        return self.result

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
        last = len(items) - 1
        turns = [self.turn(item, f"conversations[{k}]", last=k == last) for k, item in enumerate(items)]
        return tuple(turn for turn in turns if turn is not None)

    def turn(self, value: object, where: str, *, last: bool) -> Turn | None:
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
        rejected = self.rejected(value.get("rejected"), f"{where}.rejected", assistant, answers)
        scores = self.scores(value, f"{where}.scores", len(rejected))
        label = self.label(value, f"{where}.label")
        for key in ("rejected", "label"):
            if value.get(key) is not None and not last:
                what = "stands in a turn that is not the last: only the last answer of a record can be judged"
                self.fault(f"{where}.{key}", what, "end the record with this turn")
            elif value.get(key) is not None and weight == 0:
                what = "stands in a turn of weight 0, whose answer is not trained on"
                self.fault(f"{where}.{key}", what, 'leave "weight" out, or this key')
        if len(self.result.faults) > faults_before:
            return None
        assert user is not None
        assert assistant is not None
        return Turn(user, assistant, images, answers, offsets, int(weight), rejected, scores, label)

    def rejected(self, value: object, where: str, chosen: str | None, answers: tuple[str, ...]) -> tuple[str, ...]:
        """The rejected answers; each must differ from every other answer by more than white space."""
        if value == []:
            self.fault(where, "is an empty list", 'list the worse answers, or leave "rejected" out')
        known = {_words(text): f"answers[{k}]" for k, text in enumerate(answers)}
        if chosen is not None:
            known[_words(chosen)] = "assistant"
        hint = 'write the worse answer in quotes, or several as a list: "rejected": ["…", "…"]'
        one = isinstance(value, str)
        texts = []
        for at, text in self.strings([value] if one else value, where, hint, hint):
            at = where if one else at
            text = self.special(text, at)
            if not text.strip():
                self.fault(at, "is empty", "write the worse answer, or remove it")
            elif same := known.get(_words(text)):
                what = f"is the same text as {same}: there is nothing to prefer"
                self.fault(at, what, "white space does not count; write another answer, or remove this one")
            known.setdefault(_words(text), at.rpartition(".")[2])
            texts.append(text)
        return tuple(texts)

    def scores(self, value: dict[str, Any], where: str, num_rejected: int) -> tuple[float, ...]:
        scores = value.get("scores")
        if scores is None:
            return ()
        hint = 'write a number for "assistant" and one for each rejected answer, in this order, or leave "scores" out'
        if value.get("rejected") is None:
            self.fault(where, 'is of no use without "rejected"', 'add "rejected", or leave "scores" out')
        elif not isinstance(scores, list):
            self.fault(where, f"must be a list of numbers, not {json_kind(scores)}", hint)
        elif len(scores) != 1 + num_rejected:
            what = f"must have {1 + num_rejected} numbers, not {len(scores)}"
            self.fault(where, f"{what}: one for assistant and one for each rejected answer", hint)
        else:
            numbers = tuple(self.score(item, f"{where}[{k}]") for k, item in enumerate(scores))
            best = max(numbers[1:], default=-math.inf)
            if best > numbers[0]:
                what = f"says that rejected is better: {best:g} against {numbers[0]:g} of assistant"
                self.fault(where, what, "swap the two answers, correct the scores, or leave them out")
            return numbers
        return ()

    def score(self, value: object, where: str) -> float:
        number = math.nan
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                number = float(value)
        if not math.isfinite(number):
            kind = "infinity" if type(value) in (int, float) else json_kind(value)
            self.fault(where, f"must be a finite number, not {kind}", 'higher is better; leave "scores" out if unknown')
        return number

    def label(self, value: dict[str, Any], where: str) -> bool | None:
        label = value.get("label")
        if label is not None and not isinstance(label, bool):
            self.fault(
                where, f"must be true or false, not {json_kind(label)}", "true for a good answer, false for a bad"
            )
            return None
        if label is not None and value.get("rejected") is not None:
            hint = "keep one: a worse answer beside this one, or whether this one is good"
            self.fault(where, 'and "rejected" stand in one turn', hint)
        return label

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
            return None
        if offsets != sorted(offsets):
            self.fault(where, "must not decrease: images are listed in the order in which they stand", hint)
        elif len(offsets) != num_images:
            self.fault(where, f"must have one offset for each image: {len(offsets)} given, images: {num_images}", hint)
        return tuple(offsets)

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
        if not value.isascii() and lone_surrogate(value):
            self.fault(where, f"has half of a surrogate pair: {quote(value)}", "correct the \\ud8… escape")
            return None
        return value

    def keys(self, value: dict[str, Any], prefix: str, known: tuple[str, ...]) -> None:
        if isinstance(value, RepeatedKeys):
            for name in value.repeated:
                self.fault(f"{prefix}{_key(name)}", "is there twice in one object", "keep one of the two")
        for name in value:
            if known is _RECORD_KEYS and name in _TURN_KEYS:
                self.fault(name, "is a key of a turn, not of the record", 'write it in an object of "conversations"')
            elif name not in known:
                near = difflib.get_close_matches(name.lower(), known, n=1)
                hint = f'did you mean "{near[0]}"?' if near else f"the keys here are {', '.join(known)}"
                self.fault(f"{prefix}{_key(name)}", "is an unknown key", hint)


def _words(text: str) -> str:
    """A text without regard to its white space."""
    return " ".join(text.split())


def _key(name: str) -> str:
    """A key of the file for a message: as it is if it is a plain word."""
    return name if name.isidentifier() and len(name) <= 40 else quote(name, 40)
