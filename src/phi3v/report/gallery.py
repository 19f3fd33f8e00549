"""The predictions of a run as compact columns, with small images of right, wrong and changed ones alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from phi3v.data.image_store import FolderStore, ImageStore
from phi3v.data.images import load_image
from phi3v.data.mixture import MixtureStore
from phi3v.data.table import images_of
from phi3v.errors import UserError
from phi3v.evaluate.metrics import confusion_matrix
from phi3v.evaluate.text_scores import normalize_answer
from phi3v.paths import now_at, url_of
from phi3v.report.page import webp
from phi3v.report.run_files import RunFiles

MAX_TEXT = 4000  # characters of a text that are shown
MAX_IMAGES = 16  # of a question
# Without a score by class, answers are taken for classes if they are as few and as frequent as this.
MAX_CLASSES = 40
MIN_QUESTIONS_A_CLASS = 5


class Thumbnails:
    """Images of a page, each once.

    Args:
        budget: bytes that they may take in the page.
        side: pixels of the longer side.
        seconds: no image is begun after so long, so that a page of large scans is written all the same.
    """

    def __init__(self, budget: int, *, side: int = 256, seconds: float = 30.0) -> None:
        self.budget = budget
        self.side = side
        self.until = time.monotonic() + seconds
        self.encoded: list[str] = []
        self.failed: set[tuple[ImageStore, str]] = set()
        self.out_of_time = False
        self._places: dict[tuple[ImageStore, str], int] = {}

    @property
    def bytes(self) -> int:
        return sum(map(len, self.encoded))

    def add(self, store: ImageStore, names: list[str], **settings: Any) -> bool:
        """Take the images of one question, all or none; false once the budget is used up.

        Args:
            settings: of `load_image`.
        """
        new: dict[tuple[ImageStore, str], str] = {}
        for name in names:
            key = (store, name)
            if key in self._places or key in self.failed or key in new:
                continue
            if time.monotonic() > self.until:
                self.out_of_time = True
                return False
            try:
                new[key] = webp(load_image(name, store=store, **settings), self.side)
            except UserError:
                self.failed.add(key)
        size = sum(map(len, new.values()))
        if size > self.budget:
            return False
        self.budget -= size
        for key, encoded in new.items():
            self._places[key] = len(self.encoded)
            self.encoded.append(encoded)
        return True

    def place(self, store: ImageStore, name: str) -> int:
        """Index into ``encoded``, or -1."""
        return self._places.get((store, name), -1)


class _Texts:
    """Every text once; columns hold its number."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._number: dict[str, int] = {}

    def number(self, text: Any) -> int:
        text = text if isinstance(text, str) else "" if text is None else str(text)
        if len(text) > MAX_TEXT:
            text = f"{text[:MAX_TEXT]} … ({len(text):,} characters)"
        if text not in self._number:
            self._number[text] = len(self.all)
            self.all.append(text)
        return self._number[text]


def gallery(run: RunFiles, thumbnails: Thumbnails, seed: int = 0) -> dict[str, Any] | None:
    """Columns of the run's predictions, or None if there are none.

    Returns:
        ``texts``, all distinct texts; ``ids``, ``prompts``, ``references`` (a list a question), ``answers`` and
        ``before`` as numbers of texts (-1: not asked); ``right``, ``right_before`` and ``cut`` as 0, 1 or -1;
        ``scores`` and ``scores_before``; ``probabilities``; ``images``: a list of places among the thumbnails a
        question (-1: not taken along); ``files``: names of those, as numbers of texts.
    """
    lines = run.predictions.get("after") or run.predictions.get("before")
    if not lines:
        return None
    earlier = {(line.get("source"), line.get("id")): line for line in run.predictions.get("before", [])}
    has_before = "after" in run.predictions and bool(earlier)
    texts = _Texts()
    rows = []
    for line in lines:
        before = earlier.get((line.get("source"), line.get("id")), {}) if has_before else {}
        rows.append(
            {
                "ids": texts.number(line.get("id")),
                "prompts": texts.number(line.get("prompt")),
                "references": [texts.number(reference) for reference in _texts(line.get("references"))],
                "answers": texts.number(line["prediction"]),
                "before": texts.number(before["prediction"]) if before else -1,
                "right": _flag(line.get("correct")),
                "right_before": _flag(before.get("correct")),
                "cut": _flag(line.get("cut")),
                "scores": _score(line.get("score")),
                "scores_before": _score(before.get("score")),
                "files": [texts.number(name) for name in _texts(line.get("images"))[:MAX_IMAGES]],
            }
        )
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    shares = {index: line.get("probabilities") for index, line in enumerate(lines)}
    store = image_store(run)
    stored = [_stored_names(run, line) for line in lines]
    complete = store is not None and _draw(
        columns,
        stored,
        store,
        thumbnails,
        seed,
        exif_orientation=run.setting("data", "exif_orientation") is not False,
    )
    images = [[thumbnails.place(store, name) if store is not None else -1 for name in files] for files in stored]
    return {
        "when": "after" if "after" in run.predictions else "before",
        "has_before": has_before,
        "metric": (run.evaluations.get("after") or run.evaluations.get("before") or {}).get("metric"),
        "texts": texts.all,
        **columns,
        "images": images,
        "probabilities": {index: share for index, share in shares.items() if isinstance(share, dict)},
        "images_note": _images_note(store, thumbnails, complete, any(columns["files"])),
    }


def image_store(run: RunFiles) -> ImageStore | None:
    """The images that the run was evaluated on, if they are still there."""
    data = run.setting("data", "eval")
    written_in = str(run.setting("training", "output_dir") or run.folder)

    def beside(path: Any) -> ImageStore:
        file = Path(now_at(str(path), written_in, run.folder))
        try:
            return images_of(file) if url_of(file) is None else FolderStore.beside(file)  # nothing is fetched
        except UserError:
            return FolderStore.beside(file)

    def is_here(store: ImageStore) -> bool:
        return not isinstance(store, FolderStore) or store.root.is_dir()

    if isinstance(data, str):
        store = beside(data)
        return store if is_here(store) else None
    stores = tuple(beside(source.get("path")) for source in _sources(data))
    return MixtureStore(stores) if any(map(is_here, stores)) else None


def _sources(data: Any) -> list[dict[str, Any]]:
    return [source for source in data if isinstance(source, dict)] if isinstance(data, list) else []


def _stored_names(run: RunFiles, line: dict[str, Any]) -> list[str]:
    """The images of a prediction by their names in `image_store`."""
    images = _texts(line.get("images"))[:MAX_IMAGES]
    sources = [source.get("name") for source in _sources(run.setting("data", "eval"))]
    if not sources:
        return images
    place = sources.index(line.get("source")) if line.get("source") in sources else 0
    return [f"{place}/{name}" for name in images]


def _draw(
    columns: dict[str, list[Any]],
    stored: Sequence[list[str]],
    store: ImageStore,
    thumbnails: Thumbnails,
    seed: int,
    *,
    exif_orientation: bool,
) -> bool:
    """Take images in turn for what was lost, is wrong, was gained and is right; whether all went in."""
    kinds: dict[str, list[int]] = {"lost": [], "wrong": [], "gained": [], "right": []}
    for index, (right, before) in enumerate(zip(columns["right"], columns["right_before"], strict=True)):
        changed = before >= 0 and right != before
        kinds[("gained" if changed else "right") if right == 1 else ("lost" if changed else "wrong")].append(index)
    generator = Random(seed)
    for kind in kinds.values():
        generator.shuffle(kind)
    while any(kinds.values()):
        for kind in kinds.values():
            if not kind:
                continue
            if not thumbnails.add(store, stored[kind.pop()], exif_orientation=exif_orientation):
                return False
    return True


def _images_note(store: ImageStore | None, thumbnails: Thumbnails, complete: bool, has_images: bool) -> str | None:
    if not has_images:
        return None
    if store is None:
        return "The images are not where the run's data.eval says; run phi3v report where the run was started."
    notes = []
    if not complete:
        why = "seconds" if thumbnails.out_of_time else "bytes"
        notes.append(
            f"The page keeps {len(thumbnails.encoded):,} small images, as many as its budget of {why} allows, drawn "
            "in turn from answers that are right, wrong, newly right and newly wrong."
        )
    if thumbnails.failed:
        notes.append(f"{len(thumbnails.failed):,} images could not be read.")
    return " ".join(notes) or None


def class_scores(run: RunFiles) -> dict[str, Any]:
    """``before`` and ``after``: the confusion matrix, of the evaluation, or of few and frequent answers."""
    found: dict[str, Any] = {}
    for when in ("before", "after"):
        for score in run.evaluations.get(when, {}).get("scores", {}).values():
            if _is_confusion(score.get("confusion")):
                found[when] = score["confusion"]
        lines = run.predictions.get(when)
        if when in found or not lines:
            continue
        references = [_texts(line.get("references")) for line in lines]
        classes = {normalize_answer(of_question[0]) for of_question in references if of_question}
        if all(references) and 2 <= len(classes) <= min(MAX_CLASSES, len(lines) // MIN_QUESTIONS_A_CLASS):
            predictions = [line["prediction"] for line in lines]
            found[when] = confusion_matrix(references, predictions, [_flag(line.get("correct")) > 0 for line in lines])
    return found


def _is_confusion(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    rows, columns, counts = value.get("rows"), value.get("columns"), value.get("counts")
    if not (isinstance(rows, list) and isinstance(columns, list) and isinstance(counts, list)):
        return False
    return len(rows) == len(counts) and all(
        isinstance(line, list) and len(line) == len(columns) and all(isinstance(count, int) for count in line)
        for line in counts
    )


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _flag(value: Any) -> int:
    return int(value) if isinstance(value, bool) else -1


def _score(value: Any) -> float | None:
    return round(float(value), 4) if isinstance(value, int | float) else None
