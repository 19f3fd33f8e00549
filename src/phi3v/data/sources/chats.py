"""Chats with images, in the formats of LLaVA and of OpenAI and TRL: the sources ``llava`` and ``messages``.

The two differ in what people call them; a file of either is read by what its records hold::

    {"id": "7", "image": "coco/7.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A dog."}]}

    {"messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A dog."}], "images": ["7.jpg"]}

From JSON lines, a JSON array, or parquet files with embedded images. ``image``, ``images``, ``video`` and ``videos``
are a path, a list of paths, or absent. A content is a text, in which image and video tags are understood, or a list of
parts. A part ``{"type": "image"}`` takes the next of ``images`` unless it names an image itself, as ``image_url`` parts
do: a path or a base64 ``data:`` URI. A clip becomes frames; in LLaVA-Video's files its tag is ``<image>``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from phi3v.data.convert import ConversionResult
from phi3v.data.faults import quote
from phi3v.data.jsonl import json_kind
from phi3v.data.sources.json_records import JSON_SUFFIXES, json_rows
from phi3v.data.sources.media import Medium, MediumKind, media_of, medium_of, medium_size
from phi3v.data.sources.preferences import COLUMNS, ROLES, Role, Said, chat_of
from phi3v.data.sources.questions import id_of
from phi3v.data.sources.records import OwnDataOptions, RawRecord, RawTurn, Row, Rows, convert_rows
from phi3v.data.sources.splits import split_files
from phi3v.data.sources.tables import open_folder
from phi3v.data.sources.tags import BOX, Objects, Tag, like_a_tag, names_an_image, refuse_control_tokens, split_tags
from phi3v.errors import UserError

UNTAGGED = "a record had images and no tag; they are in its first turn"
TAG_IN_ANSWER = "an answer holds an image tag, which is trained on as plain text"
MARKUP = "a record has no image and a question with one in Markdown or HTML, which stays text"

_TEXTS = ("text", "input_text", "output_text")
_MEDIA: dict[str, MediumKind] = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}
# What says whether an answer is trained on, and which value says that it is.
_TRAINED_ON = {"weight": True, "train": True, "training": True, "trainable": True, "loss": True, "mask": False}
_NAMES_AN_IMAGE = re.compile(
    r"(?:image|img|picture|photo|video|clip)s?(?:_?(?:path|file|file_?name|url|name)s?)?", re.I
)

Piece = str | Tag | Medium


@dataclass(slots=True)
class Message:
    """What one side said.

    Attributes:
        where: the field, for messages about it.
        pieces: plain texts, and what stands between them; a tag stands for one of the record's images or clips.
        weight: 0 if it is not trained on.
    """

    role: Role
    where: str
    pieces: list[Piece]
    weight: int = 1

    @property
    def text(self) -> str:
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def tags(self) -> list[Tag]:
        return [piece for piece in self.pieces if isinstance(piece, Tag)]

    @property
    def media(self) -> list[Medium]:
        return [piece for piece in self.pieces if isinstance(piece, Medium)]


def convert(source: str, options: OwnDataOptions) -> ConversionResult:
    """Write ``SPLIT.jsonl``, images under their own names and embedded ones in ``images/embedded/``.

    Args:
        source: ``llava`` or ``messages``.
        options: ``source`` is a file, or a folder of such files.

    Raises:
        UserError: the data cannot be read, ``out`` holds other data, or records are bad and are not to be skipped.
    """
    path = options.required_source("llava.json" if source == "llava" else "chats.jsonl")
    root = options.image_root or (path.parent if path.is_file() else path)
    rows: dict[str, Rows]
    if tables := open_folder(path):
        for table in tables.values():
            table.require([name for name in COLUMNS if name in table.columns] or COLUMNS[:1])
        rows = {split: table.numbered for split, table in tables.items()}
    else:
        files = split_files(path, (*JSON_SUFFIXES, ".parquet", ".arrow"))
        rows = {split: json_rows(of_split) for split, of_split in files.items()}
    make_record = partial(record_of_chat, image_root=root)
    return convert_rows(source, options, rows, make_record, image_root=root, eval_share=options.eval_share)


def record_of_chat(row: Row, notes: Counter[str], *, image_root: Path) -> RawRecord:
    """The raw record of one that holds a conversation, and its media beside it in ``image`` and ``video``.

    Args:
        notes: counts what was decided on the way, and keys that have no use here.

    Raises:
        UserError: the record cannot be used.
    """
    decided: Counter[str] = Counter()  # not in `notes` yet: a record that is refused has decided nothing
    media = [*media_of(row, "image"), *media_of(row, "video")]
    images = [medium for medium in media if medium.kind == "image"]
    objects = Objects(row.get("objects"), len(images), lambda index: medium_size(images[index], image_root))
    chat = chat_of(row, decided)
    messages = [_message(said, objects, decided) for said in chat.messages]
    rejected = [_message(said, objects, decided) for said in chat.rejected]
    for message in rejected:
        if message.role != "assistant":
            raise UserError(f"is a message of the {message.role}", where=message.where, hint="it must be an answer")
    objects.require_all_used()
    decided[BOX] += objects.boxes
    used = chat.used | {"id", "system", *(["objects"] if objects.used else []), *_media_keys(row)}
    _weight(row, "", used)
    system, messages = _system(row.get("system"), messages)
    _require_alternating(messages)
    _place_media(messages, media, decided)
    _require_images(row, messages, used, decided)
    _count_unused(row, used, "", decided)
    pairs = zip(messages[::2], messages[1::2], strict=True)
    turns = [_turn(question, answer) for question, answer in pairs]
    others = tuple(message.text for message in rejected)
    turns[-1] = replace(turns[-1], rejected=others, scores=chat.scores, label=chat.label)
    notes.update(+decided)
    return RawRecord(id_of(row, "id"), tuple(turns), system)


def _message(said: Said, objects: Objects, decided: Counter[str]) -> Message:
    item, where, path = said.content, said.where, re.sub(r"\[\d+\]", "[]", said.where) + "."
    if said.role is not None:
        return Message(said.role, where, _of_text(item, said.role, where, objects, decided))
    if not isinstance(item, Mapping):
        what = f"must be an object, not {json_kind(item)}"
        raise UserError(what, where=where, hint="write one message as {…}")
    if "user" in item and "assistant" in item:
        hint = "`phi3v data check` looks at it; it needs no conversion"
        raise UserError("is a turn of the format that training reads", where=where, hint=hint)
    role_key, content_key = ("from", "value") if item.get("from") is not None else ("role", "content")
    sender = item.get(role_key)
    role = ROLES.get(sender.lower()) if isinstance(sender, str) else None
    if role is None and sender is None:
        hint = 'a message is {"role": "user", "content": "…"} or {"from": "human", "value": "…"}'
        raise UserError("says neither role nor from", where=where, hint=hint)
    if role is None:
        what = f"is no role known here: {quote(sender, 40) if isinstance(sender, str) else json_kind(sender)}"
        hint = f"known are {', '.join(ROLES)}; tools have no place in this model's chat format"
        raise UserError(what, where=f"{where}.{role_key}", hint=hint)
    if item.get("tool_calls") or item.get("function_call"):
        hint = "tools have no place in this model's chat format: leave the record out"
        raise UserError("calls a tool", where=where, hint=hint)
    used = {role_key, content_key, "tool_calls", "function_call", *_media_keys(item)}
    weight = _weight(item, where, used if role == "assistant" else set())
    if role != "assistant" and not weight:  # what it asks for is what happens
        used |= _TRAINED_ON.keys()
    content, at = item.get(content_key), f"{where}.{content_key}"
    if isinstance(content, list):
        pieces = _of_parts(content, role, at, f"{path}{content_key}[].", objects, decided)
    else:
        pieces = _of_text(content, role, at, objects, decided)
    own = [*media_of(item, "image"), *media_of(item, "video")]
    message = Message(role, where, pieces, weight)
    if role == "user":
        message.pieces = _with_own_media(message, own)
    elif own or message.media or message.tags:
        kind = "an answer" if role == "assistant" else "a system message"
        raise UserError(f"is {kind} with an image", where=where, hint="images belong to the user's messages")
    _count_unused(item, used, path, decided)
    return message


def _weight(item: Mapping[str, Any], where: str, used: set[str]) -> int:
    """1, or 0 where a key says that the answer is not trained on. Adds the keys to ``used``.

    Raises:
        UserError: a weight is another number; or the whole record (``where`` is empty) is not to be trained on.
    """
    weight = 1
    for key, trained_on in _TRAINED_ON.items():
        value = item.get(key)
        if isinstance(value, bool | int | float) and value in (0, 1):
            used.add(key)
            if bool(value) != trained_on:
                weight = 0
                if not where:
                    raise UserError("the record is marked as not to be trained on", where=key, hint="leave it out")
        elif key == "weight" and value is not None and where:
            hint = "1 trains on the answer, 0 only reads it"
            raise UserError(f"must be 0 or 1, not {value!r:.20}", where=f"{where}.weight", hint=hint)
    return weight


def _of_text(content: object, role: Role, where: str, objects: Objects, decided: Counter[str]) -> list[Piece]:
    if not isinstance(content, str):
        what = f"must be a string, not {json_kind(content)}"
        raise UserError(what, where=where, hint="write the text in quotes")
    text = objects.fill(content, where)
    pieces = split_tags(text)
    plain = "\n".join(piece for piece in pieces if isinstance(piece, str))
    refuse_control_tokens(plain, where, is_answer=role == "assistant")
    tags = [piece for piece in pieces if isinstance(piece, Tag)]
    if role == "user":
        return [
            piece if isinstance(piece, str) or piece.path is None else medium_of(piece.path, piece.kind, where)
            for piece in pieces
        ]
    if role == "system" and tags:
        hint = "images belong to the user's messages"
        raise UserError(f"is a system message with an image: {quote(tags[0].written, 40)}", where=where, hint=hint)
    for tag in tags:
        if "|" in tag.written:
            hint = "the model writes text only: remove the token from the answer"
            raise UserError(f"is an answer with an image: {quote(tag.written, 40)}", where=where, hint=hint)
    decided[TAG_IN_ANSWER] += bool(tags)
    return [text]


def _of_parts(
    parts: list[Any], role: Role, where: str, path: str, objects: Objects, decided: Counter[str]
) -> list[Piece]:
    """Parts are joined by line breaks, but for images side by side and where white space is beside an image already."""
    joined: list[Piece] = []
    for k, part in enumerate(parts):
        at = f"{where}[{k}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            raise UserError("is no part of a message", where=at, hint='write {"type": "text", "text": "…"}')
        if kind in _TEXTS:
            pieces = _of_text(part.get("text"), role, f"{at}.text", objects, decided)
            used = {"type", "text"}
        elif kind in _MEDIA:
            key, medium = _part_medium(part, _MEDIA[kind], at)
            pieces, used = [medium], {"type", key}
            if isinstance(value := part.get(key), Mapping):
                _count_unused(value, {"url", "bytes", "path"}, f"{path}{key}.", decided)
        else:
            hint = f"known are text, {', '.join(_MEDIA)}"
            raise UserError(f"is of a type unknown here: {quote(kind)}", where=at, hint=hint)
        _count_unused(part, used, path, decided)
        before, after = (joined or [""])[-1], (pieces or [""])[0]
        texts = [beside for beside in (before, after) if isinstance(beside, str)]
        at_white_space = len(texts) == 1 and bool(re.search(r"\s\Z" if texts[0] is before else r"\A\s", texts[0]))
        if k and texts and not at_white_space:
            joined.append("\n")
        joined += pieces
    return joined


def _part_medium(part: Mapping[str, Any], kind: MediumKind, where: str) -> tuple[str, Medium | Tag]:
    """The key that names a medium, and that; a tag if none does, then it takes the record's next."""
    for key in (f"{kind}_url", kind, "url", "path"):
        value = part.get(key)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        if value:  # tables fill the keys of other parts with nulls
            return key, medium_of(value, kind, f"{where}.{key}")
    if part.get("type") != kind:
        hint = f'write {{"type": "{kind}_url", "{kind}_url": {{"url": "…"}}}}'
        raise UserError("names no file", where=where, hint=hint)
    return kind, Tag(kind, f"<{kind}>")


def _with_own_media(message: Message, own: list[Medium]) -> list[Piece]:
    """The pieces of a message; if it has images of its own, its tags stand for these."""
    if not own or not message.tags:
        return [*own, *message.pieces]
    _require_count(len(message.tags), len(own), own[0].kind, message.where)
    there = iter(own)
    return [next(there) if isinstance(piece, Tag) else piece for piece in message.pieces]


def _system(of_record: object, messages: list[Message]) -> tuple[str | None, list[Message]]:
    """The system message, of the record or the first of its messages, and the other messages."""
    if of_record is not None and not isinstance(of_record, str):
        what = f"must be a string, not {json_kind(of_record)}"
        raise UserError(what, where="system", hint="write the text in quotes")
    told = [of_record] if of_record and of_record.strip() else []
    if messages and messages[0].role == "system":
        told += [messages[0].text] if messages[0].text.strip() else []
        messages = messages[1:]
    if len(set(told)) > 1:
        what = "is another text than that of the system's message"
        raise UserError(what, where="system", hint="a record has one system message")
    return (told[0] if told else None), messages


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


def _place_media(messages: Sequence[Message], media: list[Medium], decided: Counter[str]) -> None:
    """Replace every tag by the medium of the record that it stands for.

    Raises:
        UserError: the number of tags is not that of media, or numbers in tags do not tell them apart.
    """
    questions = messages[::2]
    tags = [tag for message in questions for tag in message.tags]
    named = [medium for message in questions for medium in message.media]
    if not tags and named == media:
        return  # named twice, beside the text and in it
    if media and not tags and not named:
        if decided[TAG_IN_ANSWER]:
            what = "the only image tag is in an answer, and the model writes text only"
            raise UserError(what, hint="put the tag into a question")
        for message in questions:
            if found := like_a_tag(message.text):
                raise _unknown_tag(found, message.where)
        messages[0].pieces[:0] = media
        decided[UNTAGGED] += 1
        return
    there: dict[MediumKind, list[Medium]] = {"image": [], "video": []}
    for medium in media:
        there[medium.kind].append(medium)
    if not there["image"] and all(tag.kind == "image" for tag in tags):
        # LLaVA-Video marks its clips with <image>.
        there = {"image": there["video"], "video": []}
    taken: dict[MediumKind, Iterator[Medium]] = {}
    for kind, of_kind in there.items():
        numbers = [tag.number for tag in tags if tag.kind == kind]
        _require_count(len(numbers), len(of_kind), "video" if of_kind and of_kind[0].kind == "video" else kind)
        taken[kind] = iter(of_kind if set(numbers) <= {None} else _by_number(numbers, of_kind, kind))
    for message in questions:
        message.pieces = [next(taken[p.kind]) if isinstance(p, Tag) else p for p in message.pieces]


def _by_number(numbers: Sequence[int | None], media: Sequence[Medium], kind: MediumKind) -> list[Medium]:
    """The media in the order of tags that number them, from 1 or from 0."""
    first = 0 if 0 in numbers else 1
    if sorted(number if number is not None else -1 for number in numbers) != list(range(first, first + len(media))):
        shown = ", ".join(f"<{kind}>" if number is None else f"<{kind}{number}>" for number in numbers)
        hint = f"each {kind} has one tag; where a text speaks of one again, write so in words"
        raise UserError(f"the tags {shown} do not name each of {len(media)} {kind}s once", hint=hint)
    return [media[number - first] for number in numbers if number is not None]


def _require_count(tags: int, there: int, kind: MediumKind, where: str | None = None) -> None:
    if tags != there:
        what = f"{tags} <{kind}> tag{'' if tags == 1 else 's'} for {there} {kind}{'' if there == 1 else 's'}"
        hint = f"each tag stands for one {kind}, in order"
        raise UserError(what, where=where, hint=hint)


def _require_images(row: Row, messages: Sequence[Message], used: set[str], decided: Counter[str]) -> None:
    """Raise `UserError` if a record of text alone seems to be about an image."""
    questions = messages[::2]
    if any(message.media for message in questions):
        return
    for message in questions:
        if found := like_a_tag(message.text):
            raise _unknown_tag(found, message.where)
    for key, value in row.items():
        if key not in used and value and not isinstance(value, bool | int | float) and _NAMES_AN_IMAGE.fullmatch(key):
            what = "the record has no image, and this key, which is not read, seems to name one"
            raise UserError(what, where=key, hint='name it "image" (or "images", "video", "videos")')
    decided[MARKUP] += any(names_an_image(message.text) for message in questions)


def _unknown_tag(found: str, where: str) -> UserError:
    hint = "write <image> where an image stands; if it is meant as text, put it in other words"
    return UserError(f"holds what may be an image tag and is not known: {quote(found, 40)}", where=where, hint=hint)


def _media_keys(item: Mapping[str, Any]) -> list[str]:
    """The keys that `media_of` reads."""
    return [kind if item.get(kind) else f"{kind}s" for kind in ("image", "video")]


def _count_unused(item: Mapping[str, Any], used: set[str], path: str, decided: Counter[str]) -> None:
    """Count the keys of an object that nothing was made of; tables fill those that an object lacks with nulls."""
    for key, value in item.items():
        if key not in used and value is not None and value != [] and value != "":
            decided[f"the key {path}{key} is not used"] += 1


def _turn(question: Message, answer: Message) -> RawTurn:
    """Leading images come before the text in a line of their own; if there are others, all keep their places."""
    media, text = tuple(question.media), ""
    places: list[int] = []
    for piece in question.pieces:
        if isinstance(piece, str):
            text += piece
        else:
            places.append(len(text))
    if not text[: max(places, default=0)].strip():
        return RawTurn(text.lstrip() if media else text, answer.text, media, weight=answer.weight)
    return RawTurn(text, answer.text, media, tuple(places), answer.weight)
