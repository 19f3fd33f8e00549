"""Records as rows of an Arrow table, in a file that is mapped into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from phi3v.data.schema import Record, Turn

if TYPE_CHECKING:
    import datasets

TURN = pa.struct(
    [
        ("user", pa.string()),
        ("assistant", pa.string()),
        ("images", pa.list_(pa.string())),
        ("answers", pa.list_(pa.string())),
        ("image_offsets", pa.list_(pa.int32())),
        ("weight", pa.int8()),
        ("rejected", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float64())),
        ("label", pa.bool_()),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("system", pa.string()),
        ("line", pa.int64()),
        ("turns", pa.list_(TURN)),
        ("questions", pa.list_(pa.int32())),
        ("num_images", pa.int32()),
        ("num_rejected", pa.int32()),
        ("label", pa.bool_()),
    ]
)

_BATCH_ROWS = 4096
_BATCH_CHARACTERS = 16 * 2**20  # whichever comes first ends a batch


@contextlib.contextmanager
def writing_records(file: Path) -> Iterator[Callable[[Record], None]]:
    """Takes all records of a table in order, and writes them to ``file``."""
    rows: list[dict[str, Any]] = []
    characters = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:

        def write() -> None:
            nonlocal characters
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
            rows.clear()
            characters = 0

        def add(record: Record) -> None:
            nonlocal characters
            rows.append(row_of(record))
            characters += sum(len(text) for turn in record.turns for text in turn.texts)
            if len(rows) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
                write()

        yield add
        if rows:
            write()


def open_records(file: Path) -> datasets.Dataset:
    """Map what `writing_records` wrote.

    Raises:
        OSError, ValueError, ArrowException: it is not that.
    """
    import datasets  # takes a second, and a check may do without

    map_records(file)
    return datasets.Dataset.from_file(str(file))


def map_records(file: Path) -> pa.Table:
    """As `open_records`, as Arrow has it; what is in the buffers is not looked at."""
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        if not reader.schema.equals(SCHEMA, check_metadata=True):
            raise ValueError("it has other columns")
        return reader.read_all()


def row_of(record: Record) -> dict[str, Any]:
    """A record as plain values by column."""
    return {
        "id": record.id,
        "source": record.source,
        "system": record.system,
        "line": record.line,
        "turns": [{name: getattr(turn, name) for name in TURN.names} for turn in record.turns],
        "questions": [index for index, turn in enumerate(record.turns) if turn.weight],
        "num_images": len(record.images),
        "num_rejected": len(record.rejected),
        "label": record.label,
    }


def object_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row, sound or not, as the object of a line of a data file, without what it does not say."""
    system = {} if row["system"] is None else {"system": row["system"]}
    turns = row["turns"] and [turn and _said(turn) for turn in row["turns"]]
    return {"id": row["id"], "source": row["source"], **system, "conversations": turns}


def _said(turn: dict[str, Any]) -> dict[str, Any]:
    said = {key: list(value) if isinstance(value, tuple) else value for key, value in turn.items()}
    return {
        key: value
        for key, value in said.items()
        if key in ("user", "assistant") or (value not in (None, []) and (key, value) != ("weight", 1))
    }


def record_of(row: dict[str, Any], file: Path) -> Record:
    """The record of a row of ``file``."""
    return Record(row["id"], row["source"], tuple(map(_turn, row["turns"])), row["line"], row["system"], file)


def _turn(row: dict[str, Any]) -> Turn:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Turn(**values)
