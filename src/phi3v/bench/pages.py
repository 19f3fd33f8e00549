"""DocVQA-like data: scanned-looking pages of text, several short questions a page.

At ``num_crops=16`` five pages of six take 2509 tokens (letter, upright or lying, 4x4 crops) and one 1933 (legal, 4x3),
2413 in the mean; with 34 tokens of text a record has about 2447, where DocVQA's published mean is 2443. Nine pages of
ten have four questions, one has three: 3.9 a page.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from phi3v.processing.tiny_tokenizer import WORDS

LETTER, LYING, LEGAL = (1275, 1650), (1650, 1275), (1275, 2100)  # pixels at 150 dots per inch
SIZES = (LETTER, LETTER, LEGAL, LETTER, LYING, LETTER)
QUESTIONS = (4, 4, 4, 4, 4, 4, 4, 4, 4, 3)
QUESTIONS_PER_PAGE = sum(QUESTIONS) / len(QUESTIONS)


def draw_page(seed: int, size: tuple[int, int] = LETTER) -> bytes:
    """A grey page of lines of words, with a scanner's noise, as PNG."""
    rng = np.random.default_rng(seed)
    page = Image.new("L", size, 255)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(26)
    for y in range(80, size[1] - 80, 40):
        words = rng.choice(WORDS, size=int(rng.integers(3, 13)))
        draw.text((90, y), " ".join(map(str, words)), 0, font)
    grey = np.asarray(page, dtype=np.float32) + rng.normal(0, 2, size[::-1])
    file = io.BytesIO()
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()


def pages_for(questions: int) -> int:
    """Pages that have at least so many questions."""
    return math.ceil(questions / QUESTIONS_PER_PAGE) + 1


def write_pages(
    folder: Path,
    pages: int,
    sizes: Sequence[tuple[int, int]] = SIZES,
    questions: Sequence[int] = QUESTIONS,
    answer_characters: Sequence[int] | None = None,
) -> Path:
    """Write the data unless it is there already; a record a question, those of a page one after the other.

    Args:
        sizes, questions: of each page in turn.
        answer_characters: of all answers about each page in turn; by default an answer has three words.

    Returns:
        The JSONL file.
    """
    file = folder / "train.jsonl"
    if file.is_file():
        return file
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "images").mkdir(parents=True)
    lines = []
    for page in range(pages):
        name = f"page-{page:05}.png"
        (part / "images" / name).write_bytes(draw_page(page, sizes[page % len(sizes)]))
        rng = np.random.default_rng((page, 1))
        count = questions[page % len(questions)]
        characters = answer_characters[page % len(answer_characters)] // count if answer_characters else None
        for number in range(count):
            # An answer of so many characters is cut out of more words than it can hold.
            asked, answered = (" ".join(map(str, rng.choice(WORDS, size=n))) for n in (8, characters or 3))
            answered = answered[:characters].strip()
            turn = {"images": [name], "user": f"What is {asked}?", "assistant": answered}
            lines.append(json.dumps({"id": f"{page}-{number}", "conversations": [turn]}))
    (part / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)
    return file
