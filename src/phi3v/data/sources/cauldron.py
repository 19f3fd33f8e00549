"""The parts of the hub's ``HuggingFaceM4/the_cauldron``: rows of pictures and question–answer pairs.

Columns: ``images``, a list of pictures, and ``texts``, a list of {``user``, ``assistant``, ``source``}. Both texts are
taken verbatim. There is a train split only; as in the recipe, its first 500 rows are held out as ``val``. A copy that
is smaller than 2,500 rows holds out a fifth, and one with splits of its own keeps those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from phi3v.data.convert import Conversion, ConversionResult, ConvertOptions, Unit
from phi3v.data.sources.questions import Group, Picture, Question, group_unit, question_or_bad, text_of
from phi3v.data.sources.tables import HubTable, Table, local_source, open_tables
from phi3v.errors import UserError

HUB_ID = "HuggingFaceM4/the_cauldron"
COLUMNS = ("images", "texts")
HELD_OUT = 500


def convert_original_or_tables(
    source: str,
    options: ConvertOptions,
    *,
    original: str,
    find_files: Callable[[Path], dict[str, Path]],
    write_original: Callable[[Conversion, Path, dict[str, Path]], None],
    write_tables: Callable[[Conversion, dict[str, Table]], None],
) -> ConversionResult:
    """Convert a dataset from its original distribution, or from its part of the collection.

    Args:
        source: the dataset's name; with ``_`` for ``-`` its part of the collection.
        options: ``source`` is a folder of either form, or a hub id; default the hub's collection.
        original: what the original distribution consists of, for messages.
        find_files: the annotation files of the original distribution in a folder, by split.
        write_original: writes them; takes the folder and the files.
        write_tables: writes tables, by split.

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
            tables = open_tables(options.source, hub_table(source.replace("-", "_")), original=original)
            write_tables(conversion, tables)
        return conversion.result()


def hub_table(config: str) -> HubTable:
    """The part of the collection that has this name."""
    return HubTable(HUB_ID, config)


def is_cauldron(table: Table) -> bool:
    """Whether a table has the collection's columns."""
    return all(column in table.columns for column in COLUMNS)


def write_tables(conversion: Conversion, tables: dict[str, Table], *, source: str, num_images: int) -> None:
    """Write all splits, holding out rows of a train split that is alone.

    Args:
        conversion: to write into.
        tables: by split.
        source: key ``source`` of the records.
        num_images: pictures of a row.

    Raises:
        UserError: a table lacks a column.
    """
    for table in tables.values():
        table.require(COLUMNS)
    if list(tables) != ["train"]:
        for split, table in tables.items():
            units = (_unit(conversion, source, split, k, k, table, row, num_images) for k, row in enumerate(table))
            conversion.write_split(split, units, total=table.num_rows)
        return
    table = tables["train"]
    held_out = min(HELD_OUT, max(1, table.num_rows // 5))
    if table.num_rows < 2:
        raise UserError("has one row, too few to hold one out", where=table.name, hint="give it more data")
    conversion.note(f"there is a train split only; its first {held_out:,} rows are held out as val")
    conversion.write_split("val", _slice(conversion, source, "val", table, 0, held_out, num_images), total=held_out)
    rest = _slice(conversion, source, "train", table, held_out, table.num_rows, num_images)
    conversion.write_split("train", rest, total=table.num_rows - held_out)


def _slice(
    conversion: Conversion, source: str, split: str, table: Table, start: int, stop: int, num_images: int
) -> Iterator[Unit]:
    for k, row in enumerate(table):
        if k >= stop:
            return
        if k >= start:
            yield _unit(conversion, source, split, k - start, k, table, row, num_images)


def _unit(
    conversion: Conversion,
    source: str,
    split: str,
    index: int,
    row_number: int,
    table: Table,
    row: dict[str, Any],
    num_images: int,
) -> Unit:
    place = f"{table.name}, row {row_number}"
    return group_unit(conversion, source, split, index, place, lambda: _read(place, row, num_images))


def _read(place: str, row: dict[str, Any], num_images: int) -> Group:
    images = [picture_of(image) for image in _list(row, "images")]
    if len(images) != num_images:
        raise UserError(f"has {len(images)} pictures, not {num_images}", hint="complete it, or leave it out")
    questions = [
        question_or_bad(f"{place}, texts[{k}]", partial(_question, text)) for k, text in enumerate(_list(row, "texts"))
    ]
    return images, questions


def _list(row: dict[str, Any], column: str) -> list[Any]:
    value = row[column] or []
    if not isinstance(value, list):
        raise UserError(f"{column} is no list: {value!r:.60}", hint="is this the dataset that the command names?")
    return value


def _question(text: object) -> Question:
    if not isinstance(text, dict):
        raise UserError(f"is no pair of texts: {text!r:.60}", hint='it holds "user" and "assistant"')
    return Question(text_of(text.get("user"), "user"), text_of(text.get("assistant"), "assistant"))


def picture_of(value: object) -> Picture:
    """The picture that a cell of a table holds.

    Raises:
        UserError: the cell has none, or only the name of a file elsewhere.
    """
    content = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(content, bytes):
        raise UserError("the picture is not in the table", hint="save the table with its pictures embedded")
    return Picture(content)
