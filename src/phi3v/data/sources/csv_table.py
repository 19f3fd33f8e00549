"""A table of one's own, a record a row: CSV, TSV or parquet, with the columns named on the command line.

Columns that are not named are chosen by their usual names, and what was chosen is said. The first row of a CSV holds
the names; the delimiter is the one of ``, ; tab |`` that it has most of. Cells may be quoted and hold line breaks.
"""

from __future__ import annotations

import csv
import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from phi3v.data.convert import ConversionResult
from phi3v.data.faults import quote
from phi3v.data.jsonl import require_file
from phi3v.data.schema import MAX_LINE_BYTES
from phi3v.data.sources.drafts import Draft, DraftTurn, Row, convert_rows, medium_of
from phi3v.data.sources.json_records import not_utf8
from phi3v.data.sources.messages import table_rows
from phi3v.data.sources.own_data import OwnDataOptions
from phi3v.data.sources.questions import id_of
from phi3v.data.sources.splits import split_files, split_name
from phi3v.data.sources.tables import open_folder
from phi3v.errors import UserError

SOURCE = "csv"
SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow")

# The usual names of a column, most telling first; compared without case, spaces and underscores.
_USUAL = {
    "image": ("image", "images", "imagepath", "imagefile", "imagename", "img", "imgpath", "filename", "file", "path"),
    "question": ("question", "prompt", "query", "instruction", "user"),
    "answer": ("answer", "label", "caption", "response", "output", "target", "assistant", "text", "class"),
    "split": ("split",),
    "id": ("id",),
}


@dataclass(frozen=True, slots=True)
class _Columns:
    """The column of each part of a record."""

    images: tuple[str, ...]
    answer: str
    question: str | None
    split: str | None
    id: str | None


def convert(options: OwnDataOptions) -> ConversionResult:
    """Write ``SPLIT.jsonl`` and the pictures under their own names.

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

    def make_draft(row: Row, _: Counter[str]) -> Draft:
        media = tuple(medium_of(_path(row[name]), "image", name) for name in columns.images if _filled(row[name]))
        question = options.question or ("" if columns.question is None else _text(row[columns.question]))
        name = None if columns.id is None else id_of(row, columns.id)
        return Draft(name, (DraftTurn(question, _text(row[columns.answer]), media),))

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
        make_draft,
        image_root=root,
        split_of=split_of if columns.split is not None else None,
        notes=notes,
    )


def _open(source: Path) -> tuple[tuple[str, ...], dict[str, Callable[[], Iterable[tuple[str, Row | UserError]]]]]:
    """The names of the columns, which all files have, and the rows of each split."""
    if tables := open_folder(source):
        names = next(iter(tables.values())).columns
        for table in tables.values():
            table.require(names)
        return names, {split: table_rows(table) for split, table in tables.items()}
    files = split_files(source, SUFFIXES)
    headers = {file: _header(file) for of_split in files.values() for file in of_split}
    first, (names, _) = next(iter(headers.items()))
    for file, (other, _) in headers.items():
        if other != names:
            raise UserError(f"has other columns than {first.name}", where=str(file), hint="give them one by one")

    def rows(of_split: list[Path]) -> Callable[[], Iterable[tuple[str, Row | UserError]]]:
        return lambda: chain.from_iterable(_read(file, *headers[file]) for file in of_split)

    return names, {split: rows(of_split) for split, of_split in files.items()}


def _header(file: Path) -> tuple[tuple[str, ...], str]:
    """(the names of the columns, the delimiter)."""
    require_file(file)
    with file.open(encoding="utf-8-sig", newline="") as text:
        try:
            first = text.readline()
        except UnicodeDecodeError as error:
            raise not_utf8(file, error) from None
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t|", key=first.count)
    names = tuple(name.strip() for name in next(csv.reader([first], delimiter=delimiter), []))
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not any(names):
        raise UserError("the first row is empty", where=str(file), hint="it holds the names of the columns")
    if repeated:
        what = f"two columns have the name {quote(repeated[0])}"
        raise UserError(what, where=f"{file}:1", hint="give each column a name of its own")
    return names, delimiter


def _read(file: Path, names: Sequence[str], delimiter: str) -> Iterator[tuple[str, Row | UserError]]:
    """(``file:line`` where the row begins, the row) of every row that is not blank."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        line = 1
        try:
            for number, cells in enumerate(reader):
                place, line = f"{file}:{line}", reader.line_num + 1
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

    def column(part: str, named: str | None) -> str | None:
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
        found = next((plain[usual] for usual in _USUAL[part] if usual in plain), None)
        if found is not None:
            guessed.append(f"{part}: {quote(found)}")
        return found

    def required(part: str, named: str | None, other: str = "") -> str:
        found = column(part, named)
        if found is None:
            what = f"no column looks like the {part}; there are {', '.join(map(quote, names))}"
            raise UserError(what, where=str(source), hint=f"name it with --{part}-column{other}")
        return found

    images = tuple(required("image", name) for name in options.image_columns or (None,))
    question = None if options.question else required("question", options.question_column, " or write --question TEXT")
    answer = required("answer", options.answer_column)
    split, own_id = column("split", options.split_column), column("id", options.id_column)
    if question == answer or answer in images or question in images:
        hint = "name --image-column, --question-column and --answer-column"
        raise UserError("two parts of a record are the same column", where=str(source), hint=hint)
    notes = [f"columns chosen by their names: {', '.join(guessed)}"] if guessed else []
    return _Columns(images, answer, question, split, own_id), notes


def _filled(cell: object) -> bool:
    return bool(cell.strip()) if isinstance(cell, str) else cell is not None


def _path(cell: object) -> object:
    return cell.strip() if isinstance(cell, str) else cell


def _text(cell: Any) -> str:
    """A cell of text as it is; of a parquet file, a number or date as Python writes it."""
    if isinstance(cell, bytes | list | Mapping):
        raise UserError(f"a cell must be text, not {quote(repr(cell), 40)}", hint="is this the right column?")
    return "" if cell is None else str(cell)
