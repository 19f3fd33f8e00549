"""Indexes as others may make them: ours, with something changed, and hashes that fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from phi3v.data.record_rows import SCHEMA
from phi3v.data.shards.index import IMAGES, INDEX, RECORDS

Rows = list[dict[str, Any]]


def edit_table(folder: Path, name: str, change: Callable[[Rows], Any], schema: pa.Schema | None = None) -> None:
    """Change the rows of ``records.arrow`` or ``images.arrow`` in place."""
    with pa.ipc.open_stream((folder / name).read_bytes()) as reader:
        rows, schema = reader.read_all().to_pylist(), schema or reader.schema
    change(rows)
    write_batch(folder, name, pa.RecordBatch.from_pylist(rows, schema=schema))


def write_batch(folder: Path, name: str, batch: pa.RecordBatch) -> None:
    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    edit_index(folder, lambda _: None)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change ``index.json``, and have the sizes and hashes of its tables right before."""
    content = json.loads((folder / INDEX).read_text())
    for name in (RECORDS, IMAGES):
        data = (folder / name).read_bytes()
        content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


def with_column(name: str, kind: pa.DataType) -> pa.Schema:
    """The schema of records with another type of a column."""
    return pa.schema([field.with_type(kind) if field.name == name else field for field in SCHEMA])
