"""LLaVA's training files: a JSON array or JSON lines of conversations with ``<image>`` and ``<video>`` tags.

::

    {"id": "7", "image": "coco/7.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A dog."}]}

``image`` and ``video`` are a path, a list of paths, or absent; ``user`` and ``assistant`` are taken for ``human`` and
``gpt``. A clip becomes frames. In LLaVA-Video's files the clip's tag is ``<image>``, which is understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from phi3v.data.convert import ConversionResult
from phi3v.data.faults import quote
from phi3v.data.sources.dialogue import Message, Role, dialogue_draft, require_text, tagged_message
from phi3v.data.sources.drafts import convert_rows
from phi3v.data.sources.json_records import JSON_SUFFIXES, json_rows
from phi3v.data.sources.own_data import OwnDataOptions
from phi3v.data.sources.splits import split_files
from phi3v.errors import UserError

SOURCE = "llava"

_ROLES: dict[object, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def convert(options: OwnDataOptions) -> ConversionResult:
    """Write ``SPLIT.jsonl`` and the pictures under their own names.

    Args:
        options: ``source`` is the file, or a folder of such files.

    Raises:
        UserError: the file cannot be read, ``out`` holds other data, or records are bad and are not to be skipped.
    """
    source = options.required_source("llava.json")
    files = split_files(source, JSON_SUFFIXES)
    root = options.image_root or (source.parent if source.is_file() else source)
    rows = {split: json_rows(of_split) for split, of_split in files.items()}
    make_draft = partial(dialogue_draft, key="conversations", read_message=_message)
    return convert_rows(SOURCE, options, rows, make_draft, image_root=root)


def _message(item: Mapping[str, object], where: str) -> Message:
    sender = item.get("from")
    if not isinstance(sender, str) or sender not in _ROLES:
        hint = f"known are {', '.join(map(str, _ROLES))}"
        raise UserError(f"is nobody known: {quote(repr(sender), 40)}", where=f"{where}.from", hint=hint)
    return tagged_message(_ROLES[sender], require_text(item.get("value"), f"{where}.value"), where)
