"""Which ids are there twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from phi3v.data.faults import Fault, quote


def repeated_ids(file: Path, ids: Sequence[str], lines: Sequence[int]) -> list[Fault]:
    """One fault for each line of ``file`` whose id an earlier line has, in line order.

    Args:
        ids, lines: each record's id and its line.
    """
    column = pa.array(ids, pa.string())
    if pc.count_distinct(column).as_py() == len(column):
        return []
    counts = pc.value_counts(column)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    first: dict[str, int] = {}
    faults = []
    for index in pc.indices_nonzero(pc.is_in(column, value_set=repeated)).to_pylist():
        earlier = first.setdefault(ids[index], lines[index])
        if earlier != lines[index]:
            what = f"{quote(ids[index])} is the id of line {earlier} too"
            faults.append(Fault(file, lines[index], "id", what, "give each line an id of its own"))
    return faults
