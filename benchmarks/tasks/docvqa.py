"""A stand-in of DocVQA: pages of labelled fields in many fonts, four questions a page.

Three kinds of page (a form, a receipt, a letter) with a title and four fields each, set a character a cell
(`drawing.write`).
Written as the dataset is distributed: ``{train,val}_v1.0.json`` and ``documents/ID.png``. A field's value is one of
six, so a constant answer gets little, and no page of ``val`` has the four values of a page of ``train``.
`make_tables` writes the same pages as the parquet files of the hub's ``nielsr/docvqa_1200_examples``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from PIL import ImageDraw

from drawing import CELL, CELLS, choose, nudge, write
from tasks.parts import Rng, Sizes, Split, any_font, background, generators

QUESTIONS_A_PAGE = 4
SIDE = CELL * CELLS


def _one_of(*values: str) -> Callable[[Rng], list[str]]:
    return lambda rng: [choose(rng, values)]


def _date(*days: str) -> Callable[[Rng], list[str]]:
    """A day, printed one way; the month first is as right."""

    def value(rng: Rng) -> list[str]:
        day, month = choose(rng, days).split()
        return [f"{day} {month}", f"{month} {day}"]

    return value


def _amount(*amounts: str) -> Callable[[Rng], list[str]]:
    def value(rng: Rng) -> list[str]:
        amount = choose(rng, amounts)
        return [f"${amount}", amount]

    return value


@dataclass(frozen=True)
class Field:
    """A labelled value and how it is asked for."""

    label: str
    questions: tuple[str, ...]
    values: Callable[[Rng], list[str]]  # the value as printed, then other answers that are as right


PAGES: dict[str, tuple[Field, ...]] = {
    "Form": (
        Field("Name", ("What is the name given in the form?", "Who filled in the form?"), _one_of(
            "Anna", "Ben", "Clara", "Felix", "Grace", "Hugo")),
        Field("City", ("Which city is given in the form?",), _one_of(
            "Bonn", "Rome", "Oslo", "Paris", "Cairo", "Tokyo")),
        Field("Room", ("What is the room number?",), _one_of("17", "23", "48", "56", "60", "92")),
        Field("Team", ("Which team is mentioned in the form?",), _one_of(
            "sales", "legal", "press", "design", "export", "audit")),
    ),
    "Receipt": (
        Field("Shop", ("What is the name of the shop?",), _one_of(
            "Miller", "Corner", "Garden", "Star", "Union", "Lake")),
        Field("Item", ("Which item was bought?", "What is the item on the receipt?"), _one_of(
            "tea", "bread", "milk", "soap", "shoes", "paper")),
        Field("Total", ("What is the total amount on the receipt?",), _amount("12", "25", "39", "47", "68", "80")),
        Field("Date", ("What is the date of the receipt?",), _date(
            "3 Jan", "14 Feb", "6 Mar", "21 Apr", "9 Jun", "5 Aug")),
    ),
    "Letter": (
        Field("To", ("To whom is the letter addressed?",), _one_of("Ida", "Jonas", "Karl", "Lena", "Mark", "Nora")),
        Field("From", ("Who is the sender of the letter?", "From whom is the letter?"), _one_of(
            "Otto", "Peter", "Rosa", "Sofia", "Tom", "Vera")),
        Field("Date", ("What is the date mentioned in the letter?",), _date(
            "2 May", "13 Jul", "8 Sep", "24 Oct", "7 Nov", "19 Dec")),
        Field("Re", ("What is the letter about?", "What is the subject of the letter?"), _one_of(
            "rent", "visit", "order", "repair", "school", "holiday")),
    ),
}  # fmt: skip


def make(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write the stand-in into ``folder``; ``test`` of ``sizes`` is the size of ``val``, the split to measure on."""
    (folder / "documents").mkdir(parents=True, exist_ok=True)
    seen: set[tuple[str, ...]] = set()
    for split, name, count in (("train", "train", sizes.train), ("test", "val", sizes.test)):
        entries: list[dict[str, Any]] = []
        pages = _pages(seed, split, seen)
        for number in range(count):
            document = f"{name[0]}{number:05d}"
            page, questions = next(pages)
            page.save(folder / "documents" / f"{document}_1.png")
            for question, answers in questions:
                entries.append(
                    {
                        "questionId": len(entries) + (1_000_000 if name == "val" else 0),
                        "question": question,
                        "image": f"documents/{document}_1.png",
                        "docId": number,
                        "ucsf_document_id": document,
                        "ucsf_document_page_no": "1",
                        "answers": answers,
                        "data_split": name,
                    }
                )
        content = {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": name, "data": entries}
        (folder / f"{name}_v1.0.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def make_tables(original: Path, folder: Path) -> None:
    """What `make` wrote, as ``data/{train,test}-00000-of-00001.parquet`` with one question a row."""
    from datasets import Dataset, Features, Image, Value

    features = Features(
        {"id": Value("string"), "image": Image(), "query": {"en": Value("string")}, "answers": [Value("string")]}
    )
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, table in (("train", "train"), ("val", "test")):
        entries = json.loads((original / f"{name}_v1.0.json").read_text(encoding="utf-8"))["data"]
        rows = [
            {
                "id": f"{name}_{entry['questionId']}",
                "image": {"bytes": (original / entry["image"]).read_bytes(), "path": None},
                "query": {"en": entry["question"]},
                "answers": entry["answers"],
            }
            for entry in entries
        ]
        Dataset.from_list(rows, features=features).to_parquet(folder / "data" / f"{table}-00000-of-00001.parquet")


def _pages(seed: int, split: Split, seen: set[tuple[str, ...]]) -> Iterator[tuple[PIL.Image.Image, list[Any]]]:
    """Pages with their (question, answers), none with the values of an earlier one."""
    for rng in generators(seed, split):
        kind = choose(rng, list(PAGES))
        filled = [(field, field.values(rng)) for field in PAGES[kind]]
        values = (kind, *(answers[0] for _, answers in filled))
        if values in seen:
            continue
        seen.add(values)
        filled = [filled[index] for index in rng.permutation(len(filled))]
        lines = [f"{field.label}: {answers[0]}" for field, answers in filled]
        questions = [(choose(rng, field.questions), answers) for field, answers in filled]
        yield _draw(rng, split, kind, lines), questions


def _draw(rng: Rng, split: Split, title: str, lines: list[str]) -> PIL.Image.Image:
    """A page: the title, a rule below it, the lines."""
    page = background(rng, split, (SIDE, SIDE), strength=rng.uniform(0.0, 0.15))
    draw, font, shift = ImageDraw.Draw(page), any_font(rng), nudge(rng)
    ink = tuple(int(value) for value in rng.integers(0, 80, size=3))
    write(draw, title, (CELLS - len(title)) // 2, 0, font, ink, nudge=shift)
    draw.line((CELL, 1.5 * CELL, SIDE - CELL, 1.5 * CELL), fill=ink, width=2)
    rows = sorted(int(row) for row in rng.permutation(range(2, CELLS))[: len(lines)])
    for row, line in zip(rows, lines, strict=True):
        column = int(rng.integers(min(1, CELLS - len(line)) + 1))
        write(draw, line, column, row, font, ink, nudge=shift)
    return page
