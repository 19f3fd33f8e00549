"""Hateful Memes: is this picture with its caption hateful? Yes or no.

Two forms give the same records for the same content:

* The hub's ``HuggingFaceM4/the_cauldron``, config ``hateful_memes`` (`cauldron.py`), or a folder of its parquet or
  arrow files. Its texts are taken verbatim.
* The original distribution: ``{train,dev_seen,dev_unseen,test_seen,test_unseen}.jsonl`` of
  ``{"id": 42953, "img": "img/42953.png", "label": 0, "text": "…"}`` beside ``img/``. Every file that is there becomes
  a split of its name, but for files without labels, as the challenge's test files once were.

For the original distribution ids are its own, the question is `QUESTION` and the answer ``Yes`` (label 1) or ``No``.
That wording is ours: the collection's own could not be looked up when this was written, so evaluate a model with data
from the same form that it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from phi3v.data.convert import Conversion, ConversionResult, ConvertOptions, Unit
from phi3v.data.jsonl import read_lines
from phi3v.data.sources import cauldron
from phi3v.data.sources.layouts import json_line
from phi3v.data.sources.questions import Group, Picture, Question, group_unit, id_of, text_of
from phi3v.errors import UserError

SOURCE = "hateful-memes"
QUESTION = "Is this meme hateful? Answer Yes or No."
SPLITS = ("train", "dev", "dev_seen", "dev_unseen", "test", "test_seen", "test_unseen")


def convert(options: ConvertOptions) -> ConversionResult:
    """Write ``images/SPLIT/N.png`` and ``SPLIT.jsonl`` of every split.

    Args:
        options: ``source`` is one of the forms above; default the hub's.

    Raises:
        UserError: the source is in none of the forms or cannot be read, ``out`` holds other data, or records are bad
            and are not to be skipped.
    """
    return cauldron.convert_original_or_tables(
        SOURCE,
        options,
        original="train.jsonl, dev_seen.jsonl … with img/",
        find_files=_annotation_files,
        write_original=_write_original,
        write_tables=partial(cauldron.write_tables, source=SOURCE, num_images=1),
    )


def _write_original(conversion: Conversion, folder: Path, files: dict[str, Path]) -> None:
    for split, file in files.items():
        if _has_labels(file):
            conversion.write_split(split, _units(conversion, split, file, folder), total=file.stat().st_size)
        else:
            conversion.note(f"{file.name} has no labels and is not converted")


def _annotation_files(folder: Path) -> dict[str, Path]:
    return {split: file for split in SPLITS if (file := folder / f"{split}.jsonl").is_file()}


def _has_labels(file: Path) -> bool:
    """Whether the first line has one; a line that cannot be read is left for the conversion to report."""
    try:
        return all("label" in json_line(raw) for _, raw in islice(read_lines(file), 1))
    except UserError:
        return True


def _units(conversion: Conversion, split: str, file: Path, root: Path) -> Iterator[Unit]:
    for index, (line, raw) in enumerate(read_lines(file)):
        yield _unit(conversion, split, index, f"{file}:{line}", raw, root)


def _unit(conversion: Conversion, split: str, index: int, place: str, raw: bytes, root: Path) -> Unit:
    def read() -> Group:
        row = json_line(raw)
        label = row.get("label")
        if label not in (0, 1):
            what = "has no label" if label is None else f"label is neither 0 nor 1: {json.dumps(label):.60}"
            raise UserError(what, hint="there is nothing to learn from it")
        picture = Picture(text_of(row.get("img"), "img"), root)
        return [picture], [Question(QUESTION, "Yes" if label else "No", id=id_of(row, "id"))]

    return group_unit(conversion, SOURCE, split, index, place, read, amount=len(raw))
