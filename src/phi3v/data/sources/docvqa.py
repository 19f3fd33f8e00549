"""DocVQA (Single Page): questions about scanned pages, about four a page.

Three forms give the same records for the same content:

* The hub's ``HuggingFaceM4/the_cauldron``, config ``docvqa`` (`cauldron.py`), or a folder of its parquet or arrow
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
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from phi3v.data.convert import BadUnit, Conversion, ConversionResult, ConvertOptions, Unit
from phi3v.data.faults import quote
from phi3v.data.sources import cauldron
from phi3v.data.sources.questions import Group, Picture, Question, group_unit, id_of, question_or_bad, text_of
from phi3v.data.sources.tables import Table
from phi3v.errors import UserError

SOURCE = "docvqa"


def convert(options: ConvertOptions) -> ConversionResult:
    """Write ``images/SPLIT/N.png`` and ``SPLIT.jsonl`` of every split.

    Args:
        options: ``source`` is one of the forms above; default the collection on the hub.

    Raises:
        UserError: the source is in none of the forms or cannot be read, ``out`` holds other data, or records are bad
            and are not to be skipped.
    """
    return cauldron.convert_original_or_tables(
        SOURCE,
        options,
        original="train_v1.0*.json, val_v1.0*.json with documents/",
        find_files=_annotation_files,
        write_original=_write_original,
        write_tables=_write_tables,
    )


def _write_tables(conversion: Conversion, tables: dict[str, Table]) -> None:
    if all(cauldron.is_cauldron(table) for table in tables.values()):
        cauldron.write_tables(conversion, tables, source=SOURCE, num_images=1)
    else:
        _write_rows(conversion, tables)


def _annotation_files(folder: Path) -> dict[str, Path]:
    """The newest file of each split, which is the last by name, in the folder or one below."""
    files = {}
    for split in ("train", "val", "test"):
        found = sorted([*folder.glob(f"{split}_v*.json"), *folder.glob(f"*/{split}_v*.json")])
        if found:
            files[split] = found[-1]
    return files


def _write_original(conversion: Conversion, folder: Path, files: dict[str, Path]) -> None:
    if "test" in files:
        conversion.note(f"{files['test'].name} has no answers and is not converted")
    for split in ("train", "val"):
        if split in files:
            file = files[split]
            pages, bad = _read_pages(file)
            root = file.parent if (file.parent / "documents").is_dir() else file.parent.parent
            units = _original_units(conversion, split, file, root, pages)
            conversion.write_split(split, chain(bad, units), total=len(bad) + len(pages))


def _read_pages(file: Path) -> tuple[dict[str, list[tuple[int, Question]]], list[BadUnit]]:
    """(entry, question) by page, in the order of the pages' first questions; and the entries that cannot be used."""
    try:
        entries = json.loads(file.read_bytes())["data"]
        if not isinstance(entries, list):
            raise ValueError('its "data" is no list')
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        hint = 'it is one JSON object whose "data" is a list; copy or download it again'
        raise UserError(f"cannot be read: {error}", where=str(file), hint=hint) from None
    pages: dict[str, list[tuple[int, Question]]] = {}
    bad = []
    for k, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise UserError("must be an object", hint="correct it")
            question = _question(entry.get("question"), entry)
            page = text_of(entry.get("image"), "image")
        except UserError as error:
            name = f" (questionId {entry['questionId']})" if isinstance(entry, dict) and "questionId" in entry else ""
            bad.append(BadUnit.of(f"{file}: data[{k}]{name}", error))
            continue
        pages.setdefault(page, []).append((k, question))
    return pages, bad


def _original_units(
    conversion: Conversion, split: str, file: Path, root: Path, pages: dict[str, list[tuple[int, Question]]]
) -> Iterator[Unit]:
    def unit(index: int, page: str, questions: list[tuple[int, Question]]) -> Unit:
        def read() -> Group:
            return [Picture(page, root)], [question for _, question in questions]

        return group_unit(conversion, SOURCE, split, index, f"{file}: data[{questions[0][0]}]", read)

    return (unit(index, page, questions) for index, (page, questions) in enumerate(pages.items()))


def _write_rows(conversion: Conversion, tables: dict[str, Table]) -> None:
    for table in tables.values():
        table.require(("image", "question" if "question" in table.columns else "query", "answers"))
    for split, table in tables.items():
        conversion.write_split(split, _row_units(conversion, split, table), total=table.num_rows)


def _row_units(conversion: Conversion, split: str, table: Table) -> Iterator[Unit]:
    def page(numbered: tuple[int, dict[str, Any]]) -> bytes:
        """Equal for the same page; rows without a picture stay alone, to be reported one by one."""
        k, row = numbered
        content = row["image"].get("bytes") if isinstance(row["image"], dict) else None
        return hashlib.blake2b(content).digest() if content else str(k).encode()

    def unit(index: int, rows: Sequence[tuple[int, dict[str, Any]]]) -> Unit:
        def read() -> Group:
            questions = [question_or_bad(f"{table.name}, row {k}", partial(_row_question, row)) for k, row in rows]
            return [cauldron.picture_of(rows[0][1]["image"])], questions

        place = f"{table.name}, row {rows[0][0]}"
        return group_unit(conversion, SOURCE, split, index, place, read, amount=len(rows))

    for index, (_, rows) in enumerate(groupby(enumerate(table), key=page)):
        yield unit(index, list(rows))


def _row_question(row: dict[str, Any]) -> Question:
    query = row.get("question", row.get("query"))
    return _question(query.get("en") if isinstance(query, dict) else query, row)


def _question(text: object, entry: dict[str, Any]) -> Question:
    answers = entry.get("answers")
    if not isinstance(answers, list) or not answers:
        raise UserError("has no answers", hint="there is nothing to learn from it")
    references = tuple(dict.fromkeys(text_of(answer, f"answers[{k}]") for k, answer in enumerate(answers)))
    return Question(
        text_of(text, f"the question {quote(str(text))}" if text else "the question"),
        references[0],
        references,
        id_of(entry, "questionId"),
    )
