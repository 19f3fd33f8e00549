"""From other people's chat formats to ours: messages with pictures in their text become turns with pictures before it.

What `llava` and `messages` share: tags in texts, which picture belongs to which turn, and where a system
message goes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from phi3v.data.faults import quote
from phi3v.data.sources.drafts import Draft, DraftTurn, Medium, MediumKind, Row, media_of
from phi3v.data.sources.questions import id_of
from phi3v.errors import UserError

Role = Literal["system", "user", "assistant"]

MOVED = "a picture tag was in the middle or at the end of a text; the picture comes before the text of its turn"
SYSTEM = "a system message was put at the front of the first question, before a blank line"
UNTAGGED = "a record had pictures and no tag; they are in its first turn"

_TAG = re.compile(r"<(image|video)>")
_LEADING_TAGS = re.compile(r"\s*(?:<(?:image|video)>\s*)+")
# A tag goes with the space before it if what follows needs none; "see <image>, then" becomes "see, then".
_LATER_TAG = re.compile(r"\s*<(?:image|video)>\s*\Z|\s+<(?:image|video)>(?=[\s.,;:?!)])|<(?:image|video)>")


@dataclass(slots=True)
class Message:
    """What one side said.

    Attributes:
        role: who.
        text: what, without tags.
        media: in order; a mere kind stands for the record's next picture or clip.
        moved: how many of them stood behind some of the text.
        where: the field, for messages about it.
    """

    role: Role
    text: str
    where: str
    media: list[MediumKind | Medium] = field(default_factory=list)
    moved: int = 0


def take_tags(text: str) -> tuple[str, list[MediumKind], int]:
    """(the text without its ``<image>`` and ``<video>`` tags, what they stand for, how many stood after text).

    Tags at the start or end go with the white space around them. Otherwise the text stays as it is.
    """
    kinds: list[MediumKind] = ["image" if kind == "image" else "video" for kind in _TAG.findall(text)]
    if not kinds:
        return text, [], 0
    leading = _LEADING_TAGS.match(text)
    rest = text[leading.end() :] if leading else text
    later = len(_TAG.findall(rest))
    return _LATER_TAG.sub("", rest), kinds, later


def tagged_message(role: Role, text: str, where: str) -> Message:
    """The message of a text with tags; in an answer they are text as any other, for it cannot bring a picture."""
    if role != "user":
        return Message(role, text, where)
    plain, kinds, moved = take_tags(text)
    return Message(role, plain, where, [*kinds], moved)


def dialogue_draft(
    row: Row, notes: Counter[str], *, key: str, read_message: Callable[[Mapping[str, object], str], Message]
) -> Draft:
    """The draft of a record that holds a list of messages, and its media beside them in ``image`` and ``video``.

    Args:
        row: the record.
        notes: as of `build_turns`.
        key: of the list.
        read_message: makes a message of an item and the item's place.

    Raises:
        UserError: a message or a medium is wrong.
    """
    messages = []
    for k, item in enumerate(require_list(row.get(key), key)):
        where = f"{key}[{k}]"
        if not isinstance(item, Mapping):
            raise UserError("must be an object", where=where, hint="write one message as {…}")
        messages.append(read_message(item, where))
    media = [*media_of(row, "image"), *media_of(row, "video")]
    return Draft(id_of(row, "id"), tuple(build_turns(messages, media, notes)))


def build_turns(messages: Sequence[Message], media: Sequence[Medium], notes: Counter[str]) -> list[DraftTurn]:
    """Pair questions with answers and give each question the pictures whose tags stand in it.

    Args:
        messages: in order: at most one of the system, then user and assistant in turn.
        media: the record's pictures and clips, in order, for the messages' bare kinds. If no message has one,
            all of them go to the first question.
        notes: counts what was decided on the way (`MOVED`, `SYSTEM`, `UNTAGGED`).

    Raises:
        UserError: roles are out of order, or the number of tags is not that of pictures; ``where`` is the field.
    """
    decided: Counter[str] = Counter()
    system = ""
    if messages and messages[0].role == "system":
        system, messages = messages[0].text, messages[1:]
        decided[SYSTEM] += bool(system.strip())
    _require_alternating(messages)
    _place_media(messages, media, decided)
    turns = []
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        decided[MOVED] += question.moved
        # What is a bare kind no more is a medium; `_place_media` saw to that.
        of_turn = tuple(medium for medium in question.media if isinstance(medium, Medium))
        turns.append(DraftTurn(question.text, answer.text, of_turn))
    if system.strip():
        turns[0] = DraftTurn(f"{system}\n\n{turns[0].user}".rstrip(), turns[0].assistant, turns[0].media)
    notes.update(+decided)  # only now: a record that is refused has decided nothing
    return turns


def _require_alternating(messages: Sequence[Message]) -> None:
    alternate = "after an optional system message, user and assistant alternate, and the assistant has the last word"
    if not messages:
        raise UserError("the conversation has no message", hint="remove the record, or add a question and its answer")
    for k, message in enumerate(messages):
        expected = ("user", "assistant")[k % 2]
        if message.role != expected:
            what = f"is a message of the {message.role} where one of the {expected} must stand"
            raise UserError(what, where=message.where, hint=alternate)
    if len(messages) % 2:
        raise UserError("the last question has no answer", where=messages[-1].where, hint=alternate)
    for message in messages[1::2]:
        if message.media:
            hint = "the model writes text only: remove the picture from the answer"
            raise UserError("is an answer with a picture", where=message.where, hint=hint)


def _place_media(messages: Sequence[Message], media: Sequence[Medium], decided: Counter[str]) -> None:
    """Replace every bare kind by the record's next medium of that kind."""
    open_kinds = [kind for message in messages for kind in message.media if not isinstance(kind, Medium)]
    if media and not any(message.media for message in messages):
        messages[0].media[:0] = media
        decided[UNTAGGED] += 1
        return
    waiting: dict[MediumKind, list[Medium]] = {"image": [], "video": []}
    for medium in media:
        waiting[medium.kind].append(medium)
    # LLaVA-Video marks its clips with <image>.
    as_image = not waiting["image"] and "video" not in open_kinds and bool(waiting["video"])
    if as_image:
        waiting["image"], waiting["video"] = waiting["video"], []
    for kind, there in waiting.items():
        tags = open_kinds.count(kind)
        if tags != len(there):
            name = "video" if as_image or kind == "video" else "image"
            raise UserError(
                f"{_count(tags, f'<{kind}> tag')} for {_count(len(there), name)}",
                hint=f"a tag for each {name} where it belongs; or no tag at all, then the first question gets them",
            )
    for message in messages:
        message.media = [medium if isinstance(medium, Medium) else waiting[medium].pop(0) for medium in message.media]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def require_list(value: object, where: str) -> list[object]:
    """``value`` if it is a list.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, list):
        what = "is missing" if value is None else f"must be a list, not {quote(repr(value), 40)}"
        raise UserError(what, where=where, hint="is this the right source for the file?")
    return value


def require_text(value: object, where: str) -> str:
    """``value`` if it is a string.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, str):
        raise UserError(f"must be a string, not {quote(repr(value), 40)}", where=where, hint="write the text in quotes")
    return value
