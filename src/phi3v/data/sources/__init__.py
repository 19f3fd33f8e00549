"""Converters of datasets into our format, by the name that ``phi3v data convert`` takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

# (output folder, the dataset's path or hub id, None for its usual place) -> the .jsonl file of each split
Converter = Callable[[Path, str | None], dict[str, Path]]


def _easy_vqa(out: Path, source: str | None) -> dict[str, Path]:
    from phi3v.data.sources.easy_vqa import convert_easy_vqa

    return convert_easy_vqa(out, source=None if source is None else Path(source))


# Each imports its module when it is called, so that looking up names stays fast.
SOURCES: dict[str, Converter] = {
    "easy-vqa": _easy_vqa,
}
