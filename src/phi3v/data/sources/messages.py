"""Conversations in the style of OpenAI and TRL: ``messages`` of roles and contents, with ``images``.

::

    {"messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A dog."}], "images": ["7.jpg"]}

From JSON lines, a JSON array, or parquet files with embedded pictures. A content is a text (in which ``<image>`` and
``<video>`` tags are understood) or a list of parts; texts of several parts are joined by line breaks. A part
``{"type": "image"}`` takes the next of ``images`` unless it names a picture itself, as ``image_url`` parts do: a path
or a base64 ``data:`` URI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from phi3v.data.convert import ConversionResult
from phi3v.data.faults import quote
from phi3v.data.sources.dialogue import Message, Role, dialogue_draft, require_text, tagged_message
from phi3v.data.sources.drafts import Medium, MediumKind, Row, convert_rows, medium_of
from phi3v.data.sources.json_records import JSON_SUFFIXES, json_rows
from phi3v.data.sources.own_data import OwnDataOptions
from phi3v.data.sources.splits import split_files
from phi3v.data.sources.tables import Table, open_folder
from phi3v.errors import UserError

SOURCE = "messages"

_ROLES: dict[object, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_KINDS: dict[object, MediumKind] = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


def convert(options: OwnDataOptions) -> ConversionResult:
    """Write ``SPLIT.jsonl``, pictures under their own names and embedded ones in ``images/embedded/``.

    Args:
        options: ``source`` is a file, or a folder of such files.

    Raises:
        UserError: the data cannot be read, ``out`` holds other data, or records are bad and are not to be skipped.
    """
    source = options.required_source("chats.jsonl")
    root = options.image_root or (source.parent if source.is_file() else source)
    tables = open_folder(source)
    rows: dict[str, Callable[[], Iterable[tuple[str, Row | UserError]]]]
    if tables:
        for table in tables.values():
            table.require(["messages"])
        rows = {split: table_rows(table) for split, table in tables.items()}
    else:
        files = split_files(source, (*JSON_SUFFIXES, ".parquet", ".arrow"))
        rows = {split: json_rows(of_split) for split, of_split in files.items()}
    make_draft = partial(dialogue_draft, key="messages", read_message=_message)
    return convert_rows(SOURCE, options, rows, make_draft, image_root=root)


def table_rows(table: Table) -> Callable[[], Iterable[tuple[str, Row | UserError]]]:
    """The rows of a table with their places, counted from 1."""
    return lambda: ((f"{table.name}: row {number}", row) for number, row in enumerate(table, start=1))


def _message(item: Mapping[str, object], where: str) -> Message:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        hint = f"known are {', '.join(map(str, _ROLES))}; tools have no place in this model's chat format"
        raise UserError(f"is no role known here: {quote(repr(role), 40)}", where=f"{where}.role", hint=hint)
    if item.get("tool_calls") or item.get("function_call"):
        hint = "tools have no place in this model's chat format: leave the record out"
        raise UserError("calls a tool", where=where, hint=hint)
    content = item.get("content")
    if isinstance(content, list):
        return _of_parts(_ROLES[role], content, where)
    return tagged_message(_ROLES[role], require_text(content, f"{where}.content"), where)


def _of_parts(role: Role, parts: list[object], where: str) -> Message:
    message = Message(role, "", where)
    texts: list[str] = []
    for k, part in enumerate(parts):
        at = f"{where}.content[{k}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(kind, str):
            raise UserError("is no part of a message", where=at, hint='write {"type": "text", "text": "…"}')
        if kind == "text":
            texts.append(require_text(part.get("text"), f"{at}.text"))
        elif kind in _KINDS:
            message.media.append(_part_medium(part, _KINDS[kind], at))
            message.moved += bool(texts)
        else:
            hint = f"known are text, {', '.join(map(str, _KINDS))}"
            raise UserError(f"is of a type unknown here: {quote(kind)}", where=at, hint=hint)
    message.text = "\n".join(texts)
    return message


def _part_medium(part: Mapping[str, Any], kind: MediumKind, where: str) -> Medium | MediumKind:
    """What the part names; the bare kind if it names nothing, then it takes the record's next."""
    for key in (f"{kind}_url", kind, "url", "path"):
        value = part.get(key)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        if value:  # tables fill the keys of other parts with nulls
            return medium_of(value, kind, f"{where}.{key}")
    if part.get("type") != kind:
        hint = f'write {{"type": "{kind}_url", "{kind}_url": {{"url": "…"}}}}'
        raise UserError("names no file", where=where, hint=hint)
    return kind
