"""Questions about one picture or a few: the records of every dataset of that form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.data.convert import BadUnit, Conversion, JsonRecord, Unit
from phi3v.data.schema import json_kind
from phi3v.errors import UserError


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the source.

    Attributes:
        content: its bytes, or its path relative to ``root``.
        root: the folder of the source's pictures.
    """

    content: bytes | str
    root: Path = Path()


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, all reference answers if there are several, and the dataset's own id if it has one."""

    user: str
    assistant: str
    answers: tuple[str, ...] = ()
    id: str | None = None


Group = tuple[Sequence[Picture], Sequence[Question | BadUnit]]


def group_unit(
    conversion: Conversion, source: str, split: str, index: int, place: str, read: Callable[[], Group], amount: int = 1
) -> Unit:
    """The unit of pictures that belong together and of the questions about them.

    The pictures are written once, as ``SPLIT/INDEX.png`` (or ``.jpg``), several as ``SPLIT/INDEX.0.png`` …; every
    question is a record that names them. It keeps the dataset's own id, which official evaluators ask for; without one
    it is ``SPLIT-INDEX-00``, ``SPLIT-INDEX-01`` … But for ids, the same content gives the same records from the hub and
    from its own distribution.

    Args:
        conversion: that the unit belongs to.
        source: key ``source`` of the records.
        split: name of the split.
        index: place of the group in the split, from 0.
        place: where it is in the source, for messages.
        read: gives pictures and questions, a `BadUnit` in place of each bad question; runs in the worker. Raises
            `UserError` if the whole group is bad.
        amount: as of `Unit`.
    """

    def work() -> list[JsonRecord | BadUnit]:
        pictures, questions = read()
        if not pictures or not questions:
            raise UserError(f"has no {'picture' if questions else 'question'}", hint="complete it, or leave it out")
        bad = [question for question in questions if isinstance(question, BadUnit)]
        if len(bad) == len(questions):
            return [*bad]
        stem = f"{split}/{index:06d}"
        images = []
        for k, picture in enumerate(pictures):
            own_stem = stem if len(pictures) == 1 else f"{stem}.{k}"
            if isinstance(picture.content, bytes):
                images.append(conversion.images.add(own_stem, picture.content, name=f"picture {k}"))
            else:
                images.append(conversion.images.add_file(own_stem, picture.content, root=picture.root))
        name = f"{split}-{index:06d}"
        return [
            question
            if isinstance(question, BadUnit)
            else {"id": question.id or f"{name}-{k:02d}", "source": source, "conversations": [_turn(images, question)]}
            for k, question in enumerate(questions)
        ]

    return Unit(place, work, amount)


def question_or_bad(place: str, read: Callable[[], Question]) -> Question | BadUnit:
    """What ``read`` gives, or what is wrong with it."""
    try:
        return read()
    except UserError as error:
        return BadUnit.of(place, error)


def id_of(row: Mapping[str, Any], key: str) -> str | None:
    """The id that a row names under ``key``, as text; None if it names none.

    Raises:
        UserError: it is neither text nor a number.
    """
    value = row.get(key)
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as tables keep whole numbers beside missing ones
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return str(value)
    hint = f'write "{key}": "…"'
    raise UserError(f"must be text or a number, not {json_kind(value)}", where=key, hint=hint)


def text_of(value: object, name: str) -> str:
    """``value`` if it is a text that is not blank.

    Raises:
        UserError: it is not; ``name`` says what it should be.
    """
    if not isinstance(value, str) or not value.strip():
        kind = "missing" if value is None else "empty" if isinstance(value, str) else f"{json_kind(value)}, not text"
        raise UserError(f"{name} is {kind}", hint="complete it")
    return value


def _turn(images: list[str], question: Question) -> dict[str, Any]:
    turn: dict[str, Any] = {"images": images, "user": question.user, "assistant": question.assistant}
    if len(question.answers) > 1:
        turn["answers"] = list(question.answers)
    return turn
