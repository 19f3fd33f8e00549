"""Which split a file, folder or record belongs to."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from phi3v.errors import UserError

_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "eval",
    "evaluation": "eval",
    "test": "test",
    "testing": "test",
}


def split_name(text: str) -> str | None:
    """``train``, ``val``, ``eval`` or ``test`` if ``text`` is one of their usual names, whatever its case."""
    return _NAMES.get(text.strip().lower())


def split_files(source: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """The data files of each split: ``source`` itself, or those that lie in it as a folder.

    A file belongs to the split that a word of its name says (``train.jsonl``, ``mine_val.json``). One that stands
    alone is ``train`` if its name says nothing.

    Raises:
        UserError: there is no such file, or of several files one says no split.
    """
    if source.is_file():
        if source.suffix.lower() not in suffixes:
            raise UserError("is no file of this form", where=str(source), hint=f"it takes {', '.join(suffixes)}")
        return {"train": [source]}
    files = sorted(
        path
        for path in source.iterdir()
        if path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith(".")
    )
    if not files:
        raise unknown_layout(source, [f"a file with the ending {' or '.join(suffixes)}"])
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = (split_name(word) for word in re.split(r"[^A-Za-z]+", file.stem))
        split = next((word for word in words if word), "train" if len(files) == 1 else None)
        if split is None:
            hint = "name one file with --source, or put the split into each name, e.g. train.jsonl"
            raise UserError("its name does not say which split it is", where=str(file), hint=hint)
        by_split.setdefault(split, []).append(file)
    return by_split


def unknown_layout(folder: Path, known: Sequence[str]) -> UserError:
    """The error for a folder or file that is in none of the known forms."""
    if folder.is_dir():
        inside = sorted(path.name + ("/" if path.is_dir() else "") for path in islice(folder.iterdir(), 200))
        found = ", ".join(inside[:8]) + (" …" if len(inside) > 8 else "") if inside else "nothing"
        found = f"; it holds {found}"
    else:
        found = ""
    return UserError(
        f"is in no form that is known here{found}",
        where=str(folder),
        hint=f"known are: {'; '.join(known)}",
    )


def hash_share(key: str) -> float:
    """A number in 0 to 1 (without 1) that looks random and depends on ``key`` alone.

    Choosing by it never moves a record because others were added.
    """
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def eval_limit(lowest: float, highest: float, share: float) -> float:
    """The `hash_share` below which keys are held out: ``share``, moved where either side would be empty.

    Args:
        lowest, highest: of the hashes of all keys.

    Raises:
        UserError: they are one.
    """
    if lowest == highest:
        what = "all records are about the same images, so none can be held out"
        raise UserError(what, where="--eval-share", hint="leave it out, or give it more data")
    return min(max(share, math.nextafter(lowest, 1)), highest)


def choose_eval(keys: Sequence[str], share: float) -> set[str]:
    """The ``share`` of ``keys`` with the lowest `hash_share`, rounded; at least one of two or more, never all.

    More keys move at most as many others as they are themselves.
    """
    if share <= 0 or len(keys) < 2:
        return set()
    count = min(max(1, int(len(keys) * share + 0.5)), len(keys) - 1)
    return set(sorted(keys, key=lambda key: (hash_share(key), key))[:count])
