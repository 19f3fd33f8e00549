"""Images within parquet files: bytes, the ``{"bytes": …, "path": …}`` of the `datasets` library, or lists of these."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 64  # that are in memory at a time


def image_columns(schema: pa.Schema) -> tuple[str, ...]:
    """The columns that hold images' bytes."""
    return tuple(field.name for field in schema if _holds_bytes(field.type))


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def images_of(value: Any) -> list[bytes]:
    """The images of a cell."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return [value]
    return [image for item in value for image in images_of(item)] if isinstance(value, list) else []


def rows_of(file: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file, of some of its columns."""
    with pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(ROWS, columns=columns):
            yield from batch.to_pylist()


def write_images_of(file: Path, columns: Sequence[str]) -> None:
    """Put the images of a parquet file in its place: those of the columns of each row, one after the other."""
    images = file.with_name(f"{file.name}.images")
    try:
        with images.open("wb") as target:
            for row in rows_of(file, columns):
                for column in columns:
                    target.writelines(images_of(row[column]))
        os.replace(images, file)
    finally:
        images.unlink(missing_ok=True)
