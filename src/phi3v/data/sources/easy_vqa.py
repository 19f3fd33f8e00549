"""easy-VQA: 5,000 drawings of one shape, 48,248 short questions about them.

From the ``easy-vqa`` package (Victor Zhou, https://github.com/vzhou842/easy-VQA), which holds the data:
``{train,test}/questions.json``, a list of [question, answer, image id], and ``{train,test}/images/ID.png``.
The split is its own.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3v.data.convert import Conversion, ConversionResult, ConvertOptions, Unit
from phi3v.errors import UserError

Questions = dict[int, list[tuple[str, str]]]  # image id -> (question, answer), in the order of the file


def convert(options: ConvertOptions) -> ConversionResult:
    """Write ``images/{train,test}/N.png``, ``train.jsonl`` and ``test.jsonl``.

    Train has one conversation an image with all its questions as turns; test one record a question, those
    of an image one after the other. Texts are verbatim.

    Args:
        options: ``source`` is a folder laid out as the package's ``data/``; default the installed package.

    Raises:
        UserError: the package is not installed, the source is incomplete, or ``out`` holds other data.
    """
    source = _package_data() if options.source is None else Path(options.source)
    questions = {split: _read_questions(source / split / "questions.json") for split in ("train", "test")}
    with Conversion("easy-vqa", options) as conversion:
        for split, of_split in questions.items():
            conversion.write_split(split, _units(conversion, split, of_split, source), total=len(of_split))
        return conversion.result()


def _units(conversion: Conversion, split: str, questions: Questions, source: Path) -> Iterator[Unit]:
    folder = source / split / "images"

    def unit(image: int, of_image: list[tuple[str, str]]) -> Unit:
        def work() -> list[dict[str, Any]]:
            path = conversion.images.add_file(f"{split}/{image}", f"{image}.png", root=folder)
            turns: list[dict[str, Any]] = [{"user": text, "assistant": answer} for text, answer in of_image]
            if split == "train":
                turns[0] = {"images": [path], **turns[0]}
                return [{"id": f"train-{image:06d}", "source": "easy-vqa", "conversations": turns}]
            return [
                {
                    "id": f"test-{image:06d}-{k:02d}",
                    "source": "easy-vqa",
                    "conversations": [{"images": [path], **turn}],
                }
                for k, turn in enumerate(turns)
            ]

        return Unit(str(folder / f"{image}.png"), work)

    return (unit(image, of_image) for image, of_image in questions.items())


def _package_data() -> Path:
    # Found, not imported: only its files are wanted.
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("the easy-vqa package is not installed", hint='pip install "phi3v[easy-vqa]"')
    return Path(spec.origin).parent / "data"


def _read_questions(file: Path) -> Questions:
    """By image id, ascending."""
    questions: Questions = {}
    try:
        for text, answer, image in json.loads(file.read_text(encoding="utf-8")):
            questions.setdefault(int(image), []).append((str(text), str(answer)))
    except FileNotFoundError:
        hint = "--source is a folder with train/questions.json, train/images/, test/questions.json, test/images/"
        raise UserError("no such file", where=str(file), hint=hint) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        hint = "it is a JSON list of [question, answer, image id]"
        raise UserError(f"cannot be read: {error}", where=str(file), hint=hint) from None
    if not questions:
        raise UserError("holds no question", where=str(file), hint="take the package's own file")
    return dict(sorted(questions.items()))
