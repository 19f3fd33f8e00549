"""Datasets in the form of tables: from the hub, or as parquet and arrow files in a folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from phi3v.data.sources.splits import split_name, unknown_layout
from phi3v.errors import UserError
from phi3v.paths import is_hub_id

_BATCH_ROWS = 16  # a row may hold scanned pages of a megabyte each
_SPLITS = ("train", "val", "eval", "test")

_Opened: TypeAlias = pq.ParquetFile | pa.RecordBatchReader | pa.ipc.RecordBatchFileReader
_Cells = Mapping[str, Callable[[Any], Any]]  # by column, from what is stored to what was meant


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one split, read one by one.

    Attributes:
        name: for messages: a folder and split, or a hub id and split.
        columns: their names.
        num_rows: how many.
        rows: gives them as dicts, as often as it is called; images are ``{"bytes": …, "path": …}``, not decoded, and
            the cells of a folder's files are those that a person put in (`_cells`, `_class_cells`).
    """

    name: str
    columns: tuple[str, ...]
    num_rows: int
    rows: Callable[[], Iterable[dict[str, Any]]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.rows()
        except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
            raise _cannot_read(self.name, error) from None

    def numbered(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place, row) of every row, counted from 1."""
        return ((f"{self.name}: row {number}", row) for number, row in enumerate(self, start=1))

    def require(self, columns: Iterable[str]) -> None:
        """Raise `UserError` unless all of these columns are there."""
        missing = [column for column in columns if column not in self.columns]
        if missing:
            raise UserError(
                f"lacks the columns {', '.join(missing)}; it has {', '.join(self.columns)}",
                where=self.name,
                hint="is this the dataset that the command names?",
            )


def local_source(source: str | None) -> Path | None:
    """The folder or file that ``source`` names here; None if it is to come from the hub.

    Raises:
        UserError: it is neither there nor the shape of a hub id.
    """
    if source is None:
        return None
    path = os.path.expanduser(source)
    if os.path.exists(path):
        return Path(path)
    if is_hub_id(source):
        return None
    raise UserError("no such file or folder", where=source, hint="--source takes a path here or a hub id (owner/name)")


def open_tables(source: str | None, default: str, config: str, *, original: str) -> dict[str, Table]:
    """The splits that ``source`` names, in a folder here or on the hub, which is asked only if it is none here.

    Args:
        source: a path, a hub id, or None for ``default``.
        default, config: id of the dataset on the hub, and the name of the part of it that is meant.
        original: what the original distribution looks like, for the refusal of a folder of something else.

    Raises:
        UserError: the folder has no table, or the hub cannot be reached.
    """
    folder = local_source(source)
    if folder is None:
        return open_hub(source, default, config)
    tables = open_folder(folder)
    if not tables:
        raise unknown_layout(folder, [original, "parquet or arrow files"])
    return tables


def open_hub(source: str | None, default: str, config: str) -> dict[str, Table]:
    """The splits of a dataset on the hub, downloaded into the cache of ``datasets``.

    Args:
        source: a hub id, ``owner/name``; None for ``default``.
        default, config: as of `open_tables`; another dataset is taken as a whole.

    Raises:
        UserError: it cannot be reached.
    """
    hub_id, part = (default, config) if source in (None, default) else (source, None)
    label = f"{hub_id} ({part})" if part else str(hub_id)
    try:
        splits = datasets.load_dataset(hub_id, part)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise cannot_reach_hub(label, error) from None
    return {
        split_name(split) or split: Table(
            f"{label}, {split}",
            tuple(rows.column_names),
            len(rows),
            partial(iter, rows.to_iterable_dataset().decode(False)),
        )
        for split, rows in splits.items()
    }


def cannot_reach_hub(dataset: str, error: Exception) -> UserError:
    """The error for a dataset that the hub does not give."""
    return UserError(
        f"cannot be had from the hub: {_first_line(error)}",
        where=dataset,
        hint="is the network there, and the name spelled right? Or give a copy with --source: parquet or arrow files, "
        "or the original distribution",
    )


def open_folder(folder: Path) -> dict[str, Table]:
    """The splits of a folder of parquet or arrow files; empty if there is no such file.

    A file belongs to the split that its name begins with (``train-00000-of-00017.parquet``), else to that its
    folder is named after (``validation/data-00000-of-00001.arrow``, as ``save_to_disk`` writes), else to train.

    Raises:
        UserError: a file cannot be read.
    """
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.parquet")) or sorted(folder.rglob("*.arrow"))
    files = [file for file in files if file.suffix in (".parquet", ".arrow")]
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, folder), []).append(file)
    cells = _cells(files)
    return {split: _table(f"{folder}, {split}", by_split[split], cells) for split in _SPLITS if split in by_split}


def _split_of(file: Path, folder: Path) -> str:
    inner = file.parent.relative_to(folder).parts if file != folder else ()
    for name in (file.name, *reversed(inner)):
        word = re.match(r"[A-Za-z]+", name)
        if word and (split := split_name(word[0])):
            return split
    return "train"


def _table(name: str, files: list[Path], cells: _Cells) -> Table:
    num_rows, columns = 0, ()
    for file in files:
        with _open(file) as opened:
            columns = tuple(_schema(opened).names)
            if isinstance(opened, pq.ParquetFile):
                num_rows += opened.metadata.num_rows
            else:
                num_rows += sum(batch.num_rows for batch in _batches(opened))
    return Table(name, columns, num_rows, partial(_rows, files, cells))


def _rows(files: list[Path], cells: _Cells) -> Iterator[dict[str, Any]]:
    for file in files:
        with _open(file) as opened:
            of_file = {**cells, **_class_cells(file, _schema(opened))}
            for batch in _batches(opened):
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                        yield row | {name: cell(row[name]) for name, cell in of_file.items()}


def _cells(files: Sequence[Path]) -> _Cells:
    """What gives the cell that a person put in, for columns of floats and times.

    Where a cell is missing, libraries read whole numbers as 3.0 and none as NaN; days they read as midnights. A column
    is of whole numbers or days if all its cells are, in all files.
    """
    cells: dict[str, Callable[[Any], Any]] = {}
    is_whole: dict[str, bool] = {}
    for file in files:
        with _open(file) as opened:
            schema = _schema(opened)
            types = {field.name: field.type for field in schema}
            loose = [name for name, kind in types.items() if pa.types.is_floating(kind) or pa.types.is_timestamp(kind)]
            undecided = [name for name in loose if is_whole.setdefault(name, True)]
            for batch in _batches(opened, undecided) if undecided else ():
                for name in undecided:
                    is_whole[name] &= _is_whole(batch.column(batch.schema.get_field_index(name)))
        for name in loose:
            if pa.types.is_timestamp(types[name]):
                cells[name] = _unless_missing(datetime.date if is_whole[name] else lambda cell: cell)
            elif types[name] == pa.float32() and not is_whole[name]:
                cells[name] = _unless_missing(lambda cell: float(str(np.float32(cell))))  # 0.1, not 0.10000000149
            else:
                cells[name] = _unless_missing(int if is_whole[name] else float)
    return cells


def _is_whole(column: pa.Array) -> bool:
    if pa.types.is_timestamp(column.type):
        return bool(pc.all(pc.equal(pc.floor_temporal(column, unit="day"), column)).as_py() in (True, None))
    values = column.drop_null().to_numpy(zero_copy_only=False).astype(np.float64)
    values = values[~np.isnan(values)]
    return bool((np.isfinite(values) & (values == np.floor(values))).all())


def _unless_missing(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``convert``, and None of a cell that is none or NaN."""
    return lambda cell: None if cell is None or cell != cell else convert(cell)


def _class_cells(file: Path, schema: pa.Schema) -> _Cells:
    """What gives the names of class labels, which are stored as numbers, from what ``datasets`` says in the schema.

    Raises:
        UserError: that cannot be read.
    """
    said = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(said)["info"]["features"] if said else {}
        names = {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and column in schema.names
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        hint = "save the table again, with `datasets` or without its metadata"
        raise UserError(f"the features in its schema cannot be read: {error}", where=str(file), hint=hint) from None
    return {column: partial(_class_name, file, column, of_column) for column, of_column in names.items()}


def _class_name(file: Path, column: str, names: Sequence[str], cell: object) -> object:
    if cell is None or cell == -1 or isinstance(cell, str):  # -1 stands for no label
        return None if cell == -1 else cell
    if isinstance(cell, int) and 0 <= cell < len(names):
        return names[cell]
    what = f"{cell!r:.40} is no label of the column {column}, which has {len(names)} classes"
    raise UserError(what, where=str(file), hint="save the table again")


@contextlib.contextmanager
def _open(file: Path) -> Iterator[_Opened]:
    try:
        if file.suffix == ".parquet":
            # Read through a buffer. Left to itself the reader loads a whole row group, which some files consist of.
            with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as parquet:
                yield parquet
            return
        with pa.memory_map(str(file)) as source:
            try:
                reader = pa.ipc.open_stream(source)  # what `datasets` writes
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(source)
            yield reader
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise _cannot_read(str(file), error) from None


def _schema(opened: _Opened) -> pa.Schema:
    return opened.schema_arrow if isinstance(opened, pq.ParquetFile) else opened.schema


def _batches(opened: _Opened, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """All of the file, of some columns or of each."""
    if isinstance(opened, pq.ParquetFile):
        size = _BATCH_ROWS if columns is None else 2**16
        yield from opened.iter_batches(batch_size=size, columns=columns, use_threads=False)
        return
    is_file = isinstance(opened, pa.ipc.RecordBatchFileReader)
    for batch in map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened:
        batch.validate(full=True)  # what is damaged is mapped as it is, and reading it would end the process
        yield batch


def _cannot_read(where: str, error: Exception) -> UserError:
    return UserError(f"cannot be read: {_first_line(error)}", where=where, hint="copy or download it again")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
