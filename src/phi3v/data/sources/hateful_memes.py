"""Hateful Memes: is this image with its caption hateful? Yes or no.

Two forms give the same records for the same content:

* The hub's ``HuggingFaceM4/the_cauldron``, config ``hateful_memes`` (`questions.py`), or a folder of its parquet or
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
from itertools import islice
from pathlib import Path

from phi3v.data.convert import Conversion, ConversionResult, ConvertOptions
from phi3v.data.jsonl import read_lines
from phi3v.data.sources.media import Medium
from phi3v.data.sources.questions import Group, convert_dataset, id_of, json_line, question_of, text_of, write_groups
from phi3v.data.sources.records import RawRecord
from phi3v.errors import UserError

SOURCE = "hateful-memes"
QUESTION = "Is this meme hateful? Answer Yes or No."
SPLITS = ("train", "dev", "dev_seen", "dev_unseen", "test", "test_seen", "test_unseen")


def convert(options: ConvertOptions) -> ConversionResult:
    """Write ``images/SPLIT/N.png`` and ``SPLIT.jsonl`` of every split; see `questions.py`."""
    return convert_dataset(
        SOURCE,
        options,
        original="train.jsonl, dev_seen.jsonl … with img/",
        find_files=_annotation_files,
        write_original=_write_original,
    )


def _write_original(conversion: Conversion, folder: Path, files: dict[str, Path]) -> None:
    for split, file in files.items():
        if _has_labels(file):
            groups = (_group(f"{file}:{line}", raw, folder) for line, raw in read_lines(file))
            write_groups(conversion, SOURCE, split, groups, total=file.stat().st_size)
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


def _group(place: str, raw: bytes, root: Path) -> Group:
    def read() -> tuple[list[Medium], list[RawRecord]]:
        row = json_line(raw)
        label = row.get("label")
        if label not in (0, 1):
            what = "has no label" if label is None else f"label is neither 0 nor 1: {json.dumps(label):.60}"
            raise UserError(what, hint="there is nothing to learn from it")
        image = Medium("image", path=text_of(row.get("img"), "img"), root=root)
        return [image], [question_of(QUESTION, "Yes" if label else "No", id=id_of(row, "id"))]

    return Group(place, read, amount=len(raw))
