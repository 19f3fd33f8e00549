"""DocVQA (Single Page): questions about scanned pages, about four a page.

Three forms give the same records for the same content:

* The hub's ``HuggingFaceM4/the_cauldron``, config ``docvqa`` (`questions.py`), or a folder of its parquet or arrow
  files. Texts verbatim; one answer a question.
* Tables with one question a row: ``image``, ``query`` ({"en": …} or a text; or ``question``) and ``answers``, as in
  ``nielsr/docvqa_1200_examples`` (train and test), which is the recipe's small split. Rows of the same page that
  follow each other share its file.
* The original distribution: ``{train,val}_v1.0*.json`` (``data`` is a list of ``question``, ``image``
  (``documents/….png``) and ``answers``) beside ``documents/``. Its test split has no answers and is not converted.

The questions of a page are records one after the other that name the same file; their ids are the ``questionId``, where
the form has it. ``assistant`` is the first answer; where there are several, all of them are ``answers``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from phi3v.data.convert import BadUnit, Conversion, ConversionResult, ConvertOptions
from phi3v.data.faults import quote
from phi3v.data.sources import questions
from phi3v.data.sources.media import Medium
from phi3v.data.sources.questions import Group, id_of, question_of, question_or_bad, text_of, write_groups
from phi3v.data.sources.records import RawRecord
from phi3v.data.sources.tables import Table
from phi3v.errors import UserError

SOURCE = "docvqa"


def convert(options: ConvertOptions) -> ConversionResult:
    """Write ``images/SPLIT/N.png`` and ``SPLIT.jsonl`` of every split; see `questions.py`."""
    return questions.convert_dataset(
        SOURCE,
        options,
        original="train_v1.0*.json, val_v1.0*.json with documents/",
        find_files=_annotation_files,
        write_original=_write_original,
        write_tables=_write_tables,
    )


def _annotation_files(folder: Path) -> dict[str, Path]:
    """The newest file of each split, which is the last by name, in the folder or one below."""
    files = {}
    for split in ("train", "val", "test"):
        found = sorted([*folder.glob(f"{split}_v*.json"), *folder.glob(f"*/{split}_v*.json")])
        if found:
            files[split] = found[-1]
    return files


def _write_original(conversion: Conversion, folder: Path, files: dict[str, Path]) -> None:
    for split, file in files.items():
        if split == "test":
            conversion.note(f"{file.name} has no answers and is not converted")
            continue
        pages, bad = _read_pages(file)
        root = file.parent if (file.parent / "documents").is_dir() else file.parent.parent
        groups = (_page(file, root, page, entries) for page, entries in pages.items())
        write_groups(conversion, SOURCE, split, chain(bad, groups), total=len(bad) + len(pages))


def _read_pages(file: Path) -> tuple[dict[str, list[tuple[int, RawRecord]]], list[BadUnit]]:
    """(entry, question) by page, in the order of the pages' first questions; and the entries that cannot be used."""
    try:
        entries = json.loads(file.read_bytes())["data"]
        if not isinstance(entries, list):
            raise ValueError('its "data" is no list')
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        hint = 'it is one JSON object whose "data" is a list; copy or download it again'
        raise UserError(f"cannot be read: {error}", where=str(file), hint=hint) from None
    pages: dict[str, list[tuple[int, RawRecord]]] = {}
    bad = []
    for k, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise UserError("must be an object", hint="correct it")
            question = _question(entry.get("question"), entry)
            pages.setdefault(text_of(entry.get("image"), "image"), []).append((k, question))
        except UserError as error:
            name = f" (questionId {entry['questionId']})" if isinstance(entry, dict) and "questionId" in entry else ""
            bad.append(BadUnit.of(f"{file}: data[{k}]{name}", error))
    return pages, bad


def _page(file: Path, root: Path, page: str, entries: list[tuple[int, RawRecord]]) -> Group:
    image = Medium("image", path=page, root=root)
    return Group(f"{file}: data[{entries[0][0]}]", lambda: ([image], [question for _, question in entries]))


def _write_tables(conversion: Conversion, tables: dict[str, Table]) -> None:
    for table in tables.values():
        table.require(("image", "question" if "question" in table.columns else "query", "answers"))
    for split, table in tables.items():
        write_groups(conversion, SOURCE, split, _row_pages(table), total=table.num_rows)


def _row_pages(table: Table) -> Iterator[Group]:
    def page(numbered: tuple[int, dict[str, Any]]) -> bytes:
        """Equal for the same page; rows without an image stay alone, to be reported one by one."""
        k, row = numbered
        content = row["image"].get("bytes") if isinstance(row["image"], dict) else None
        return hashlib.blake2b(content).digest() if content else str(k).encode()

    def group(rows: list[tuple[int, dict[str, Any]]]) -> Group:
        def read() -> tuple[list[Medium], list[RawRecord | BadUnit]]:
            asked = [question_or_bad(f"{table.name}, row {k}", partial(_row_question, row)) for k, row in rows]
            return [questions.image_of(rows[0][1]["image"])], asked

        return Group(f"{table.name}, row {rows[0][0]}", read, amount=len(rows))

    return (group(list(rows)) for _, rows in groupby(enumerate(table), key=page))


def _row_question(row: dict[str, Any]) -> RawRecord:
    query = row.get("question", row.get("query"))
    return _question(query.get("en") if isinstance(query, dict) else query, row)


def _question(text: object, entry: dict[str, Any]) -> RawRecord:
    answers = entry.get("answers")
    if not isinstance(answers, list) or not answers:
        raise UserError("has no answers", hint="there is nothing to learn from it")
    references = tuple(dict.fromkeys(text_of(answer, f"answers[{k}]") for k, answer in enumerate(answers)))
    text = text_of(text, f"the question {quote(str(text))}" if text else "the question")
    return question_of(text, references[0], references, id_of(entry, "questionId"))
