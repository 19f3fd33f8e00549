"""Pairs of answers about the images of easy-vqa."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_pairs(easy_vqa: Path, name: str, records: int | None = None) -> Path:
    """Questions about three pages, one without an image, one with two rejected answers, one of several turns."""
    lines = [json.loads(line) for line in (easy_vqa / "test.jsonl").read_text().splitlines()[:60]]
    pages: dict[str, list[Any]] = {}
    for line in lines:
        pages.setdefault(line["conversations"][0]["images"][0], []).append(line)
    first, second, third, *_ = pages.values()
    chosen = [*first[:3], *second[:2], third[0], third[1]]
    for index, line in enumerate(chosen):
        line["conversations"][-1]["rejected"] = "a triangle" if index % 2 else "none"
    chosen[0]["conversations"][0]["assistant"] = "a blue rectangle on a white ground, and nothing else"
    chosen[1]["conversations"][0]["rejected"] = ["nothing", "it cannot be told from this image, I am afraid"]
    question = chosen[5]["conversations"][0]
    chosen[5]["conversations"] = [
        question | {"rejected": []},
        {"user": "are you sure?", "assistant": "yes", "rejected": "no"},
    ]
    del chosen[5]["conversations"][0]["rejected"]
    chosen[6]["conversations"][0]["images"] = []
    path = easy_vqa / name
    path.write_text("".join(json.dumps(line) + "\n" for line in chosen[:records]))
    return path
