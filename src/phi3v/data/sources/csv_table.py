"""A table of one's own, a record a row: CSV, TSV or parquet, with the columns named on the command line.

Columns that are not named are chosen by their usual names, and what was chosen is said. The first row of a CSV holds
the names; the delimiter is the one of ``, ; tab |`` that it has most of, or what Excel's ``sep=;`` before it says.
Cells may be quoted and hold line breaks.
"""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any

from phi3v.data.convert import ConversionResult
from phi3v.data.faults import quote
from phi3v.data.jsonl import MAX_LINE_BYTES, json_kind, require_file
from phi3v.data.sources.json_records import not_utf8, require_text_encoding
from phi3v.data.sources.media import medium_of
from phi3v.data.sources.questions import id_of
from phi3v.data.sources.records import OwnDataOptions, RawRecord, RawTurn, Row, Rows, convert_rows
from phi3v.data.sources.splits import split_files, split_name
from phi3v.data.sources.tables import open_folder
from phi3v.errors import UserError

SOURCE = "csv"
SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow")

# The usual names of a column, most telling first; compared without case, spaces and underscores.
_USUAL = {
    "image": ("image", "images", "imagepath", "imagefile", "imagename", "img", "imgpath", "filename", "file", "path"),
    "question": ("question", "prompt", "query", "instruction", "user"),
    "answer": (
        *("answer", "completion", "label", "caption", "response", "output", "target", "assistant", "text"),
        "class",
    ),
    "rejected": ("rejected", "rejectedresponse"),
    "label": ("ktotag",),
    "split": ("split",),
    "id": ("id",),
}

_TRUTH = {"true": True, "1": True, "false": False, "0": False}
_SEPARATOR = re.compile(r"""["']?sep=(\\t|[^"'\n])["']?[,;|\t]*\s*""", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Form:
    """How a CSV file is written: its encoding, its delimiter, the names of its columns and their line, from 1."""

    encoding: str
    delimiter: str
    names: tuple[str, ...]
    line: int


@dataclass(frozen=True, slots=True)
class _Columns:
    """The column of each part of a record."""

    images: tuple[str, ...]
    answer: str
    rejected: tuple[str, ...]
    label: str | None
    question: str | None
    split: str | None
    id: str | None


def convert(options: OwnDataOptions) -> ConversionResult:
    """Write ``SPLIT.jsonl`` and the images under their own names.

    Args:
        options: ``source`` is a file, or a folder of one or of one for each split; its columns say the rest.

    Raises:
        UserError: a column is missing or cannot be guessed, the file cannot be read, ``out`` holds other data, or
            rows are bad and are not to be skipped.
    """
    if options.question and options.question_column:
        raise UserError("either --question or --question-column, not both", hint="leave one of them out")
    source = options.required_source("labels.csv")
    root = options.image_root or (source.parent if source.is_file() else source)
    names, rows = _open(source)
    columns, notes = _choose(names, options, source)

    def make_record(row: Row, _: Counter[str]) -> RawRecord:
        return _record(row, columns, options)

    def split_of(row: Row) -> str:
        assert columns.split is not None
        value = _text(row[columns.split])
        name = split_name(value)
        if name is None:
            hint = "it is train, val, eval or test"
            raise UserError(f"is no split: {quote(value)}", where=columns.split, hint=hint)
        return name

    return convert_rows(
        SOURCE,
        options,
        rows,
        make_record,
        image_root=root,
        eval_share=options.eval_share,
        split_of=split_of if columns.split is not None else None,
        notes=notes,
    )


def _record(row: Row, columns: _Columns, options: OwnDataOptions) -> RawRecord:
    cells = ((name, cell.strip() if isinstance(cell := row[name], str) else cell) for name in columns.images)
    media = tuple(medium_of(cell, "image", name) for name, cell in cells if cell is not None and cell != "")
    question = options.question or ("" if columns.question is None else _text(row[columns.question]))
    name = None if columns.id is None else id_of(row, columns.id)
    rejected = tuple(text for column in columns.rejected for text in _texts(row[column]))
    answer = _text(row[columns.answer])
    if rejected and not options.rejected_columns:
        _refuse_mark(rejected, answer, columns.rejected[0])
    label = None if columns.label is None else _truth(row[columns.label], columns.label)
    return RawRecord(name, (RawTurn(question, answer, media, rejected=rejected, label=label),))


def record_of_row(row: Row, options: OwnDataOptions) -> RawRecord:
    """The record of a row by itself, whose columns are guessed by their names.

    Raises:
        UserError: one cannot be guessed, or the row is bad.
    """
    return _record(row, _choose(tuple(row), options, Path(options.source or ""))[0], options)


def _open(source: Path) -> tuple[tuple[str, ...], dict[str, Rows]]:
    """The names of the columns, which all files have, and the rows of each split."""
    if tables := open_folder(source):
        names = next(iter(tables.values())).columns
        for table in tables.values():
            table.require(names)
        return names, {split: table.numbered for split, table in tables.items()}
    files = split_files(source, SUFFIXES)
    forms = {file: _form(file) for of_split in files.values() for file in of_split}
    first = next(iter(forms))
    names = forms[first].names
    for file, form in forms.items():
        if form.names != names:
            raise UserError(f"has other columns than {first.name}", where=str(file), hint="give them one by one")

    def rows(of_split: list[Path]) -> Rows:
        return lambda: chain.from_iterable(_read(file, forms[file]) for file in of_split)

    return names, {split: rows(of_split) for split, of_split in files.items()}


def _form(file: Path) -> _Form:
    """Raises `UserError` if it is no table of text."""
    require_file(file)
    encoding = require_text_encoding(file, utf16=True)
    try:
        with file.open(encoding=encoding, newline="") as text:
            first, line = text.readline(MAX_LINE_BYTES), 1
            said = _SEPARATOR.fullmatch(first)
            if said:
                first, line = text.readline(MAX_LINE_BYTES), 2
    except UnicodeDecodeError as error:
        raise not_utf8(file, error) from None
    if said:
        delimiter = said[1].replace("\\t", "\t")
    else:
        outside_quotes = re.sub(r'"[^"]*"', "", first)
        delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t|", key=outside_quotes.count)
    where = f"{file}:{line}"
    try:
        names = tuple(name.strip() for name in next(csv.reader([first], delimiter=delimiter), []))
    except csv.Error as error:
        raise UserError(f"is not valid CSV: {error}", where=where, hint="it holds the names of the columns") from None
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not any(names):
        raise UserError("the first row is empty", where=str(file), hint="it holds the names of the columns")
    if repeated:
        what = f"two columns have the name {quote(repeated[0])}"
        raise UserError(what, where=where, hint="give each column a name of its own")
    return _Form(encoding, delimiter, names, line)


def _read(file: Path, form: _Form) -> Iterator[tuple[str, Row | UserError]]:
    """(``file:line`` where the row begins, the row) of every row that is not blank."""
    csv.field_size_limit(MAX_LINE_BYTES)
    names, delimiter = form.names, form.delimiter
    with file.open(encoding=form.encoding, newline="") as text:
        for _ in range(form.line - 1):
            text.readline(MAX_LINE_BYTES)
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        line = form.line
        try:
            for number, cells in enumerate(reader):
                place, line = f"{file}:{line}", reader.line_num + form.line
                if number == 0 or not any(cell.strip() for cell in cells):
                    continue
                if len(cells) == len(names):
                    yield place, dict(zip(names, cells, strict=True))
                else:
                    what = f"has {len(cells)} cells; there are {len(names)} columns"
                    hint = f"quote a cell that holds a {delimiter!r}" if len(cells) > len(names) else "complete the row"
                    yield place, UserError(what, where=place, hint=hint)
        except UnicodeDecodeError as error:
            raise not_utf8(file, error) from None
        except csv.Error as error:
            hint = "look at the quotes of this row: a cell that holds one writes it twice and stands in quotes"
            raise UserError(f"is not valid CSV: {error}", where=f"{file}:{line}", hint=hint) from None


def _choose(names: Sequence[str], options: OwnDataOptions, source: Path) -> tuple[_Columns, list[str]]:
    """The columns, and what to say about those that were guessed."""
    guessed: list[str] = []

    def column(part: str, named: str | None, first: tuple[str, ...] = ()) -> str | None:
        if named is not None:
            if named in names:
                return named
            near = difflib.get_close_matches(named, names, n=1) or [n for n in names if n.lower() == named.lower()]
            raise UserError(
                f"there is no column {quote(named)}; there are {', '.join(map(quote, names))}",
                where=f"--{part}-column",
                hint=f"did you mean {quote(near[0])}?" if near else f"name one of these columns of {source}",
            )
        plain = {name.lower().replace("_", "").replace(" ", ""): name for name in reversed(names)}
        found = next((plain[usual] for usual in (*first, *_USUAL[part]) if usual in plain), None)
        if found is not None:
            guessed.append(f"{part}: {quote(found)}")
        return found

    def required(part: str, named: str | None, other: str = "", first: tuple[str, ...] = ()) -> str:
        found = column(part, named, first)
        if found is None:
            what = f"no column looks like the {part}; there are {', '.join(map(quote, names))}"
            raise UserError(what, where=str(source), hint=f"name it with --{part}-column{other}")
        return found

    images = tuple(required("image", name) for name in options.image_columns or (None,))
    question = None if options.question else required("question", options.question_column, " or write --question TEXT")
    rejected = tuple(found for name in options.rejected_columns or (None,) if (found := column("rejected", name)))
    answer = required("answer", options.answer_column, first=("chosen",) if rejected else ())
    # A column of this name says whether a completion is good in TRL's tables; in others it may be anything.
    label = column("label", options.label_column, ("label",) if answer == "completion" else ())
    if rejected and label:
        what = f"there are rejected answers ({quote(rejected[0])}) and labels ({quote(label)})"
        hint = "a record has one of the two: leave an option out, or drop a column"
        raise UserError(what, where=str(source), hint=hint)
    split, own_id = column("split", options.split_column), column("id", options.id_column)
    if question == answer or answer in images or question in images:
        hint = "name --image-column, --question-column and --answer-column"
        raise UserError("two parts of a record are the same column", where=str(source), hint=hint)
    notes = [f"columns chosen by their names: {', '.join(guessed)}"] if guessed else []
    return _Columns(images, answer, rejected, label, question, split, own_id), notes


def _texts(cell: Any) -> list[str]:
    """A cell as texts; those of parquet may hold several."""
    return [_text(item) for item in cell] if isinstance(cell, list) else [_text(cell)]


def _refuse_mark(rejected: Sequence[str], answer: str, column: str) -> None:
    """Raise `UserError` where a column that was taken for rejected answers says whether a row was rejected."""
    if answer.strip().lower() in _TRUTH:  # then so may the rejected answer be
        return
    for text in rejected:
        if text.strip().lower() in _TRUTH:
            what = f"{quote(text, 40)} looks like a mark that the row was rejected, not like a rejected answer"
            hint = f"name it with --rejected-column if it is an answer, or take {quote(column)} out of the table"
            raise UserError(what, where=column, hint=hint)


def _truth(cell: Any, column: str) -> bool:
    """A cell as true or false."""
    text = _text(cell).strip().lower()
    if text not in _TRUTH:
        hint = "write true for a good answer, false for a bad one"
        raise UserError(f"is neither true nor false: {quote(text, 40)}", where=column, hint=hint)
    return _TRUTH[text]


def _text(cell: Any) -> str:
    """A cell as text; numbers and dates of a parquet file as a person would write them."""
    if isinstance(cell, str):
        return cell
    if cell is None:
        return ""
    if isinstance(cell, Decimal) and cell.is_finite():
        return f"{cell:f}"
    if isinstance(cell, bool | int | date | time) or (isinstance(cell, float) and math.isfinite(cell)):
        return str(cell)
    raise UserError(f"a cell must be text, not {json_kind(cell)}", hint="is this the right column?")
