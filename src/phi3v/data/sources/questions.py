"""Questions about one image or a few: what the converters of public datasets share.

Each reads its dataset's original distribution, or its part of the hub's ``HuggingFaceM4/the_cauldron``: rows of
``images`` and of ``texts``, a list of {``user``, ``assistant``, ``source``}. Both texts are taken verbatim. The
collection has a train split only; as in the recipe, its first 500 rows are held out as ``val``. A copy that is smaller
than 2,500 rows holds out a fifth, and one with splits of its own keeps those.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from phi3v.data.convert import BadUnit, Conversion, ConversionResult, ConvertOptions, Unit
from phi3v.data.jsonl import json_kind
from phi3v.data.sources.media import Medium
from phi3v.data.sources.records import RawRecord, RawTurn, RecordWriter
from phi3v.data.sources.tables import Table, local_source, open_tables
from phi3v.errors import UserError

HUB_ID = "HuggingFaceM4/the_cauldron"
COLUMNS = ("images", "texts")
HELD_OUT = 500


@dataclass(frozen=True, slots=True)
class Group:
    """Images that belong together and the questions about them.

    Attributes:
        place: where it is in the source, for messages.
        read: gives the images and the questions (`question_of`), a `BadUnit` in place of each bad one; runs in the
            worker. Raises `UserError` if the whole group is bad.
        amount: as of `Unit`.
    """

    place: str
    read: Callable[[], tuple[Sequence[Medium], Sequence[RawRecord | BadUnit]]]
    amount: int = 1


def convert_dataset(
    source: str,
    options: ConvertOptions,
    *,
    original: str,
    find_files: Callable[[Path], dict[str, Path]],
    write_original: Callable[[Conversion, Path, dict[str, Path]], None],
    write_tables: Callable[[Conversion, dict[str, Table]], None] | None = None,
    num_images: int = 1,
) -> ConversionResult:
    """Convert a dataset from its original distribution, or from its part of the collection.

    Args:
        source: the dataset's name; with ``_`` for ``-`` its part of the collection.
        options: ``source`` is a folder of either form, or a hub id; default the hub's collection.
        original: what the original distribution consists of, for messages.
        find_files: the annotation files of the original distribution in a folder, by split.
        write_original: writes them; takes the folder and the files.
        write_tables: writes tables with other columns than the collection's, by split.
        num_images: of a row of the collection.

    Raises:
        UserError: the source is in neither form or cannot be read, ``out`` holds other data, or records are bad and
            are not to be skipped.
    """
    folder = local_source(options.source)
    files = {} if folder is None else find_files(folder)
    with Conversion(source, options) as conversion:
        if folder is not None and files:
            write_original(conversion, folder, files)
        else:
            tables = open_tables(options.source, HUB_ID, source.replace("-", "_"), original=original)
            if write_tables is None or all(set(COLUMNS) <= set(table.columns) for table in tables.values()):
                _write_cauldron(conversion, source, tables, num_images)
            else:
                write_tables(conversion, tables)
        return conversion.result()


def write_groups(
    conversion: Conversion, source: str, split: str, groups: Iterable[Group | BadUnit], *, total: int
) -> None:
    """Write a split of groups.

    The images of a group are written once, as ``SPLIT/N.png`` (or ``.jpg``), several as ``SPLIT/N.0.png`` …; every
    question is a record that names them. It keeps the dataset's own id, which official evaluators ask for; without one
    it is ``SPLIT-N-00``, ``SPLIT-N-01`` … But for ids, the same content gives the same records from the hub and from
    its own distribution.

    Args:
        conversion: to write into.
        source: key ``source`` of the records.
        split: its name.
        groups: in order, with a `BadUnit` for what belongs to no group.
        total: the sum of their amounts.

    Raises:
        UserError: as `Conversion.write_split`.
    """
    writer = RecordWriter(conversion, source)

    def records(number: int, group: Group) -> list[RawRecord | BadUnit]:
        images, questions = group.read()
        if not images or not questions:
            raise UserError(f"has no {'image' if questions else 'question'}", hint="complete it, or leave it out")
        stem, name = f"{split}/{number:06d}", f"{split}-{number:06d}"
        media = tuple(
            replace(image, stem=stem if len(images) == 1 else f"{stem}.{k}", name=f"image {k}")
            for k, image in enumerate(images)
        )
        return [
            question
            if isinstance(question, BadUnit)
            else RawRecord(question.id or f"{name}-{k:02d}", (replace(question.turns[0], media=media),))
            for k, question in enumerate(questions)
        ]

    def units() -> Iterator[Unit | BadUnit]:
        number = 0
        for group in groups:
            if isinstance(group, BadUnit):
                yield group
            else:
                yield writer.unit(group.place, partial(records, number, group), group.amount)
                number += 1

    conversion.write_split(split, units(), total=total)


def _write_cauldron(conversion: Conversion, source: str, tables: dict[str, Table], num_images: int) -> None:
    """Write tables of the collection by split, holding out rows of a train split that is alone.

    Raises:
        UserError: a table lacks a column.
    """

    def write(split: str, table: Table, start: int, stop: int) -> None:
        def group(number: int, row: dict[str, Any]) -> Group:
            place = f"{table.name}, row {number}"
            return Group(place, lambda: _read(place, row, num_images))

        rows = islice(enumerate(table), start, stop)
        write_groups(conversion, source, split, (group(*numbered) for numbered in rows), total=stop - start)

    for table in tables.values():
        table.require(COLUMNS)
    if list(tables) != ["train"]:
        for split, table in tables.items():
            write(split, table, 0, table.num_rows)
        return
    table = tables["train"]
    held_out = min(HELD_OUT, max(1, table.num_rows // 5))
    if table.num_rows < 2:
        raise UserError("has one row, too few to hold one out", where=table.name, hint="give it more data")
    conversion.note(f"there is a train split only; its first {held_out:,} rows are held out as val")
    write("val", table, 0, held_out)
    write("train", table, held_out, table.num_rows)


def _read(place: str, row: dict[str, Any], num_images: int) -> tuple[list[Medium], list[RawRecord | BadUnit]]:
    images = [image_of(image) for image in _list(row, "images")]
    if len(images) != num_images:
        raise UserError(f"has {len(images)} images, not {num_images}", hint="complete it, or leave it out")
    texts = enumerate(_list(row, "texts"))
    return images, [question_or_bad(f"{place}, texts[{k}]", partial(_question, text)) for k, text in texts]


def _list(row: dict[str, Any], column: str) -> list[Any]:
    value = row[column] or []
    if not isinstance(value, list):
        raise UserError(f"{column} is no list: {value!r:.60}", hint="is this the dataset that the command names?")
    return value


def _question(text: object) -> RawRecord:
    if not isinstance(text, dict):
        raise UserError(f"is no pair of texts: {text!r:.60}", hint='it holds "user" and "assistant"')
    return question_of(text_of(text.get("user"), "user"), text_of(text.get("assistant"), "assistant"))


def image_of(value: object) -> Medium:
    """The image that a cell of a table holds.

    Raises:
        UserError: the cell has none, or only the name of a file elsewhere.
    """
    content = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(content, bytes):
        raise UserError("the image is not in the table", hint="save the table with its images embedded")
    return Medium("image", data=content)


def question_of(user: str, assistant: str, answers: Sequence[str] = (), id: str | None = None) -> RawRecord:
    """A question of a `Group`, whose images come with the group, and the dataset's own id if it has one."""
    return RawRecord(id, (RawTurn(user, assistant, answers=tuple(answers)),))


def question_or_bad(place: str, read: Callable[[], RawRecord]) -> RawRecord | BadUnit:
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


def json_line(raw: bytes) -> dict[str, Any]:
    """The object of one line.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not valid JSON: {error}", hint="one JSON object a line") from None
    if not isinstance(value, dict):
        raise UserError(f"must be a JSON object, not {json_kind(value)}", hint="one JSON object a line")
    return value
