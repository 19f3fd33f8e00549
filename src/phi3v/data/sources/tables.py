"""Datasets in the form of tables: from the hub, or as parquet and arrow files in a folder."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from phi3v.data.sources.layouts import unknown_layout
from phi3v.errors import UserError

_BATCH_ROWS = 16  # a row may hold scanned pages of a megabyte each
_SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}


@dataclass(frozen=True, slots=True)
class HubTable:
    """Where the hub has a dataset.

    Attributes:
        id: of the repository.
        config: name of the part, if it has several.
    """

    id: str
    config: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one split, read one by one.

    Attributes:
        name: for messages: a folder and split, or a hub id and split.
        columns: their names.
        num_rows: how many.
        rows: an iterable over them as dicts; images are ``{"bytes": …, "path": …}``, not decoded.
    """

    name: str
    columns: tuple[str, ...]
    num_rows: int
    rows: Iterable[dict[str, Any]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.rows
        except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"cannot be read: {_first_line(error)}", where=self.name, hint="copy or download it again"
            ) from None

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
    path = Path(source).expanduser()
    if path.exists():
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return None
    raise UserError("no such file or folder", where=source, hint="--source takes a path here or a hub id (owner/name)")


def open_tables(source: str | None, default: HubTable, *, original: str) -> dict[str, Table]:
    """The splits that ``source`` names, in a folder here or on the hub, which is asked only if it is none here.

    Args:
        source: a path, a hub id, or None for ``default``.
        default: the dataset on the hub.
        original: what the original distribution looks like, for the refusal of a folder of something else.

    Raises:
        UserError: the folder has no table, or the hub cannot be reached.
    """
    folder = local_source(source)
    if folder is None:
        return open_hub(source, default)
    tables = open_folder(folder)
    if not tables:
        raise unknown_layout(folder, [original, "parquet or arrow files"])
    return tables


def open_hub(source: str | None, default: HubTable) -> dict[str, Table]:
    """The splits of a dataset on the hub, downloaded into the cache of ``datasets``.

    Args:
        source: a hub id, ``owner/name``; None for ``default``.
        default: also says which part of a dataset of the same id is meant.

    Raises:
        UserError: it cannot be reached.
    """
    wanted = default if source in (None, default.id) else HubTable(str(source))
    label = f"{wanted.id} ({wanted.config})" if wanted.config else wanted.id
    try:
        splits = datasets.load_dataset(wanted.id, wanted.config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise cannot_reach_hub(label, error) from None
    return {
        _SPLIT_NAMES.get(split, split): Table(
            f"{label}, {split}", tuple(rows.column_names), len(rows), rows.to_iterable_dataset().decode(False)
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
    return {split: _table(f"{folder}, {split}", by_split[split]) for split in _SPLITS if split in by_split}


def _split_of(file: Path, folder: Path) -> str:
    inner = file.parent.relative_to(folder).parts if file != folder else ()
    for name in (file.name, *reversed(inner)):
        word = re.match(r"[A-Za-z]+", name)
        if word and (split := _SPLIT_NAMES.get(word[0].lower(), word[0].lower())) in _SPLITS:
            return split
    return "train"


def _table(name: str, files: list[Path]) -> Table:
    num_rows, columns = 0, ()
    for file in files:
        try:
            with _open(file) as opened:
                if isinstance(opened, pq.ParquetFile):
                    num_rows, columns = num_rows + opened.metadata.num_rows, tuple(opened.schema_arrow.names)
                else:
                    columns = tuple(opened.schema.names)
                    num_rows += sum(batch.num_rows for batch in _arrow_batches(opened))
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"cannot be read: {_first_line(error)}", where=str(file), hint="copy or download it again"
            ) from None
    return Table(name, columns, num_rows, _Rows(files))


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of files, as often as they are asked for."""

    files: list[Path]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for file in self.files:
            with _open(file) as opened:
                if isinstance(opened, pq.ParquetFile):
                    batches = opened.iter_batches(batch_size=_BATCH_ROWS, use_threads=False)
                else:
                    batches = _arrow_batches(opened)
                for batch in batches:
                    for start in range(0, batch.num_rows, _BATCH_ROWS):
                        yield from batch.slice(start, _BATCH_ROWS).to_pylist()


@contextlib.contextmanager
def _open(file: Path) -> Iterator[pq.ParquetFile | pa.RecordBatchReader | pa.ipc.RecordBatchFileReader]:
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


def _arrow_batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return (reader.get_batch(k) for k in range(reader.num_record_batches))
    return iter(reader)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
