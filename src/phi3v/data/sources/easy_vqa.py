"""easy-VQA: 5,000 drawings of one shape, 48,248 short questions about them.

From the ``easy-vqa`` package (Victor Zhou, https://github.com/vzhou842/easy-VQA), which holds the data:
``{train,test}/questions.json``, a list of [question, answer, image id], and ``{train,test}/images/ID.png``.
The split is its own.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from phi3v.data.convert import Conversion, ConversionResult, ConvertOptions, Unit
from phi3v.data.sources.media import Medium
from phi3v.data.sources.records import RawRecord, RawTurn, RecordWriter
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
    source = package_data() if options.source is None else Path(options.source)
    questions = {split: _read_questions(source / split / "questions.json") for split in ("train", "test")}
    with Conversion("easy-vqa", options) as conversion:
        for split, of_split in questions.items():
            conversion.write_split(
                split, _units(conversion, split, of_split, source / split / "images"), total=len(of_split)
            )
        return conversion.result()


def _units(conversion: Conversion, split: str, questions: Questions, folder: Path) -> Iterator[Unit]:
    writer = RecordWriter(conversion, "easy-vqa", folder)

    def records(image: int, of_image: list[tuple[str, str]]) -> list[RawRecord]:
        medium = Medium("image", path=f"{image}.png", stem=f"{split}/{image}")
        if split == "train":
            turns = [RawTurn(text, answer) for text, answer in of_image]
            return [RawRecord(f"train-{image:06d}", (replace(turns[0], media=(medium,)), *turns[1:]))]
        return [
            RawRecord(f"test-{image:06d}-{k:02d}", (RawTurn(text, answer, (medium,)),))
            for k, (text, answer) in enumerate(of_image)
        ]

    for image, of_image in questions.items():
        yield writer.unit(str(folder / f"{image}.png"), partial(records, image, of_image))


def package_data() -> Path:
    """The folder of the installed package's data.

    Raises:
        UserError: it is not installed.
    """
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
