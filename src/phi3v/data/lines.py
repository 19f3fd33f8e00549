"""The lines of a data file, parsed one after the other."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from phi3v.data.faults import Fault, quote
from phi3v.data.jsonl import read_lines, require_file
from phi3v.data.other_formats import other_file
from phi3v.data.progress import LateProgress
from phi3v.data.schema import Line, SpecialText, read_line
from phi3v.errors import UserError


class DataLines:
    """The lines of a data file that are not blank, parsed one after the other: (1-based number, what it holds).

    A file of another format gives its fault alone.

    Raises:
        UserError: the file cannot be read, or holds no line.
    """

    def __init__(self, path: Path, special_text: SpecialText, *, progress: bool) -> None:
        self.path = path
        self.special_text = special_text
        self.progress = progress
        self._ids: list[str] = []
        self._lines_of_ids: list[int] = []

    def __iter__(self) -> Generator[tuple[int, Line]]:
        path, empty = self.path, True
        require_file(path)
        if other := other_file(path):
            yield other.line, Line(faults=[other])
            return
        with LateProgress(f"reading {path.name}", path.stat().st_size, enabled=self.progress) as bar:
            for number, raw in read_lines(path):
                line = read_line(raw, file=path, line=number, special_text=self.special_text)
                if line.id is not None:
                    self._ids.append(line.id)
                    self._lines_of_ids.append(number)
                yield number, line
                empty = False
                bar.advance(len(raw))
        if empty:
            raise UserError("holds no record", where=str(path), hint="a data file has one JSON object a line")

    def placed(self, fault: Fault) -> Fault:
        """A fault as it is told."""
        return fault

    def repeated_ids(self) -> list[Fault]:
        """One fault for each line read so far whose id an earlier line has, in line order."""
        ids, lines = pa.array(self._ids, pa.string()), self._lines_of_ids
        if pc.count_distinct(ids).as_py() == len(ids):
            return []
        counts = pc.value_counts(ids)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        first: dict[str, int] = {}
        faults = []
        for index in pc.indices_nonzero(pc.is_in(ids, value_set=repeated)).to_pylist():
            earlier = first.setdefault(self._ids[index], lines[index])
            if earlier != lines[index]:
                what = f"{quote(self._ids[index])} is the id of line {earlier} too"
                faults.append(Fault(self.path, lines[index], "id", what, "give each line an id of its own"))
        return faults
