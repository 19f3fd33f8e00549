"""Tables in the schemas of the hub, written as its files are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

CAULDRON = datasets.Features(
    {
        "images": datasets.Sequence(datasets.Image()),
        "texts": [{name: datasets.Value("string") for name in ("user", "assistant", "source")}],
    }
)
# nielsr/docvqa_1200_examples, as its dataset card lists it
DOCVQA_1200 = datasets.Features(
    {
        "id": datasets.Value("string"),
        "image": datasets.Image(),
        "query": {language: datasets.Value("string") for language in ("de", "en", "es", "fr", "it")},
        "answers": datasets.Sequence(datasets.Value("string")),
        "words": datasets.Sequence(datasets.Value("string")),
        "bounding_boxes": datasets.Sequence(datasets.Sequence(datasets.Value("float32"), length=4)),
        "answer": {
            "match_score": datasets.Value("float64"),
            "matched_text": datasets.Value("string"),
            "start": datasets.Value("int64"),
            "text": datasets.Value("string"),
        },
    }
)


def cauldron_row(images: Sequence[bytes], texts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "images": [{"bytes": data, "path": None} for data in images],
        "texts": [{"user": user, "assistant": assistant, "source": "x"} for user, assistant in texts],
    }


def docvqa_row(image: bytes, question: str, answers: Sequence[str]) -> dict[str, Any]:
    return {
        "id": f"train_{question}",
        "image": {"bytes": image, "path": None},
        "query": dict.fromkeys(("de", "es", "fr", "it"), "-") | {"en": question},
        "answers": list(answers),
        "words": ["a"],
        "bounding_boxes": [[0.0, 0.0, 1.0, 1.0]],
        "answer": {"match_score": 1.0, "matched_text": answers[0] if answers else "", "start": 0, "text": ""},
    }


def write_parquet(file: Path, rows: Sequence[dict[str, Any]], features: datasets.Features = CAULDRON) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(list(rows), features=features)
    table.to_parquet(file, batch_size=2)
    return file


def save_to_disk(folder: Path, splits: dict[str, Sequence[dict[str, Any]]]) -> Path:
    tables = {split: datasets.Dataset.from_list(list(rows), features=CAULDRON) for split, rows in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(folder)
    return folder
