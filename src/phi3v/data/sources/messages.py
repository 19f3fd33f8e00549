"""Conversations in the style of OpenAI and TRL: ``messages`` of roles and contents, with ``images``.

::

    {"messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A dog."}], "images": ["7.jpg"]}

From JSON lines, a JSON array, or parquet files with embedded pictures. A content is a text, in which ``<image>`` and
``<video>`` tags are understood, or a list of parts. A part ``{"type": "image"}`` takes the next of ``images`` unless it
names an image itself, as ``image_url`` parts do: a path or a base64 ``data:`` URI. See `dialogue.py` for all else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from phi3v.data.convert import ConversionResult
from phi3v.data.sources.dialogue import KEYS, DialogueReader
from phi3v.data.sources.drafts import Row, convert_rows
from phi3v.data.sources.json_records import JSON_SUFFIXES, json_rows
from phi3v.data.sources.own_data import OwnDataOptions
from phi3v.data.sources.splits import split_files
from phi3v.data.sources.tables import Table, open_folder
from phi3v.errors import UserError

SOURCE = "messages"


def convert(options: OwnDataOptions) -> ConversionResult:
    """Write ``SPLIT.jsonl``, pictures under their own names and embedded ones in ``images/embedded/``.

    Args:
        options: ``source`` is a file, or a folder of such files.

    Raises:
        UserError: the data cannot be read, ``out`` holds other data, or records are bad and are not to be skipped.
    """
    return convert_chats(SOURCE, "chats.jsonl", options)


def convert_chats(name: str, example: str, options: OwnDataOptions) -> ConversionResult:
    """`convert`, under the name of a source; ``example`` is what its file may be called."""
    source = options.required_source(example)
    root = options.image_root or (source.parent if source.is_file() else source)
    tables = open_folder(source)
    rows: dict[str, Callable[[], Iterable[tuple[str, Row | UserError]]]]
    if tables:
        for table in tables.values():
            table.require([key for key in KEYS if key in table.columns] or KEYS[:1])
        rows = {split: table_rows(table) for split, table in tables.items()}
    else:
        files = split_files(source, (*JSON_SUFFIXES, ".parquet", ".arrow"))
        rows = {split: json_rows(of_split) for split, of_split in files.items()}
    return convert_rows(name, options, rows, DialogueReader(root), image_root=root)


def table_rows(table: Table) -> Callable[[], Iterable[tuple[str, Row | UserError]]]:
    """The rows of a table with their places, counted from 1."""
    return lambda: ((f"{table.name}: row {number}", row) for number, row in enumerate(table, start=1))
