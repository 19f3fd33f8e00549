"""A fault of a data file: where it is, what is wrong, what to do."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from phi3v.errors import UserError
from phi3v.paths import shown


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with one line of a data file.

    Attributes:
        file: the data file, as the caller named it.
        line: 1-based, as editors count; blank lines count. Of shards, the place among all records.
        field: e.g. ``conversations[2].images[0]`` (0-based, as in JSON paths); empty for the whole line.
        what: what is wrong, so that "``field``: ``what``" reads well.
        hint: what to do about it.
        record: of shards, what the record is called; its file is the shard.
    """

    file: Path
    line: int
    field: str
    what: str
    hint: str
    record: str | None = None

    def __str__(self) -> str:
        field = f"{self.field}: " if self.field else ""
        file = shown(self.file)
        place = f"{file}:{self.line}" if self.record is None else f"{file}: record {self.record}"
        return f"{place}: {field}{self.what}\n  → {self.hint}"

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "file": shown(self.file),
            "line": self.line,
            "field": self.field,
            "what": self.what,
            "hint": self.hint,
        } | ({} if self.record is None else {"record": self.record})


class DataFaultsError(UserError):
    """A data file has faults; the message lists them.

    Args:
        file: the data file.
        faults: the first faults, in line order.
        total: how many there are in all.
        exact: false if reading stopped early, so that ``total`` is a lower bound.
        hint: default: to correct the file.
    """

    def __init__(
        self, file: Path | str, faults: Sequence[Fault], *, total: int, exact: bool = True, hint: str | None = None
    ) -> None:
        self.file = file
        self.faults = tuple(faults)
        self.total = total
        self.exact = exact
        count = f"{total:,} fault{'s' if total != 1 else ''}"
        if not exact:
            count = f"at least {count}"
        if len(self.faults) < total:
            count += f" (the first {len(self.faults)} follow)"
        super().__init__(count, where=str(file), hint=hint or f"correct them; `phi3v data check {file}` looks again")

    def __str__(self) -> str:
        return "\n".join([f"{self.where}: {self.what}", *map(str, self.faults), f"  → {self.hint}"])


def quote(text: str, limit: int = 80) -> str:
    """``text`` in quotes, cut to ``limit`` characters, with control characters made visible.

    Data may hold terminal escape sequences, so a message never prints it raw.
    """
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def near_name(name: str, folder: Path) -> str | None:
    """A name in ``folder`` that ``name`` may have meant: other case, other extension, or a slip."""
    try:
        # Bounded, so that a million images with one missing do not make a check slow.
        names = [entry.name for entry in islice(os.scandir(folder), 20_000)]
    except OSError:
        return None
    for same in (str.lower, lambda text: Path(text).stem, lambda text: Path(text).stem.lower()):
        for candidate in sorted(names):
            if same(candidate) == same(name):
                return candidate
    near = difflib.get_close_matches(name, names[:2_000], n=1, cutoff=0.8)
    return near[0] if near else None
