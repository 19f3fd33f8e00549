"""Which ids are there twice, without holding a million strings."""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path

import numpy as np

from phi3v.data.faults import Fault, quote
from phi3v.data.jsonl import read_lines


class IdIndex:
    """Remembers 16 bytes a record: an 8-byte hash of the id, and the line."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._lines = array("Q")

    def add(self, record_id: str, line: int) -> None:
        """The id of ``line``."""
        digest = hashlib.blake2b(record_id.encode(), digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest, "little"))
        self._lines.append(line)

    def faults(self, file: Path) -> list[Fault]:
        """One fault for each line whose id an earlier line has, in line order.

        Lines of equal hash are read again from ``file``, so that a chance collision is no fault.
        """
        suspects = self._lines_of_equal_hash()
        if not suspects:
            return []
        first: dict[str, int] = {}
        faults = []
        for line, raw in read_lines(file):
            if line not in suspects:
                continue
            record_id = json.loads(raw.removeprefix(b"\xef\xbb\xbf"))["id"]
            earlier = first.setdefault(record_id, line)
            if earlier != line:
                what = f"{quote(record_id)} is the id of line {earlier} too"
                faults.append(Fault(file, line, "id", what, "give each line an id of its own"))
        return faults

    def _lines_of_equal_hash(self) -> set[int]:
        hashes = np.frombuffer(self._hashes, dtype=np.uint64) if self._hashes else np.zeros(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        equal = hashes[order][1:] == hashes[order][:-1]
        positions = np.concatenate([order[1:][equal], order[:-1][equal]])
        return {self._lines[position] for position in positions}
