"""easy-VQA: 5,000 drawings of one shape, 48,248 short questions about them.

From the ``easy-vqa`` package (Victor Zhou, https://github.com/vzhou842/easy-VQA), which holds the data:
``{train,test}/questions.json``, a list of [question, answer, image id], and ``{train,test}/images/ID.png``.
The split is its own.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3v.data.jsonl import replacing, write_jsonl
from phi3v.data.progress import LateProgress
from phi3v.errors import UserError

Questions = dict[int, list[tuple[str, str]]]  # image id -> (question, answer), in the order of the file


def convert_easy_vqa(out: Path, *, source: Path | None = None, progress: bool = True) -> dict[str, Path]:
    """Write ``images/{train,test}/N.png``, ``train.jsonl`` and ``test.jsonl`` into ``out``.

    Train has one conversation an image with all its questions as turns; test one record a question, those
    of an image one after the other. Texts are verbatim. Interrupted and run again, it goes on where it
    stopped.

    Args:
        out: the data folder, made if need be.
        source: a folder laid out as the package's ``data/``; default the installed package.
        progress: show a bar if it takes long and standard error is a terminal.

    Returns:
        The .jsonl file of each split.

    Raises:
        UserError: the package is not installed, the source is incomplete, or ``out`` holds other data.
    """
    source = _package_data() if source is None else source
    questions = {split: _read_questions(source / split / "questions.json") for split in ("train", "test")}
    with LateProgress("copying images", sum(map(len, questions.values())), enabled=progress) as bar:
        for split, of_split in questions.items():
            for image in of_split:
                _copy(source / split / "images" / f"{image}.png", out / "images" / split / f"{image}.png")
                bar.advance(1)
    files = {split: out / f"{split}.jsonl" for split in questions}
    write_jsonl(files["train"], _train_records(questions["train"]))
    write_jsonl(files["test"], _test_records(questions["test"]))
    return files


def _train_records(questions: Questions) -> Iterator[dict[str, Any]]:
    for image, of_image in questions.items():
        turns: list[dict[str, Any]] = [{"user": text, "assistant": answer} for text, answer in of_image]
        turns[0] = {"images": [f"train/{image}.png"], **turns[0]}
        yield {"id": f"train-{image:06d}", "source": "easy-vqa", "conversations": turns}


def _test_records(questions: Questions) -> Iterator[dict[str, Any]]:
    for image, of_image in questions.items():
        for k, (text, answer) in enumerate(of_image):
            turn = {"images": [f"test/{image}.png"], "user": text, "assistant": answer}
            yield {"id": f"test-{image:06d}-{k:02d}", "source": "easy-vqa", "conversations": [turn]}


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
    except (OSError, ValueError, TypeError) as error:
        hint = "it is a JSON list of [question, answer, image id]"
        raise UserError(f"cannot be read: {error}", where=str(file), hint=hint) from None
    if not questions:
        raise UserError("holds no question", where=str(file), hint="take the package's own file")
    return dict(sorted(questions.items()))


def _copy(image: Path, to: Path) -> None:
    """Copy unless it is there already; the copy appears complete or not at all."""
    if not image.is_file():
        raise UserError("no such image", where=str(image), hint="the questions name it; is the source complete?")
    if to.exists():
        if to.read_bytes() != image.read_bytes():
            raise UserError("exists with other content", where=str(to), hint="convert into another folder")
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as temporary:
        shutil.copyfile(image, temporary)
