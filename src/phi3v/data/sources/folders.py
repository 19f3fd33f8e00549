"""Folders of images or clips that say the answer: the sources ``image-folder`` and ``video-folder``.

Known forms, each with or without folders ``train/``, ``val/``, ``test/`` around it:

* ``CLASS/NAME.jpg``: which of the classes is it? The answer is the name of the folder.
* ``NAME.jpg`` with ``NAME.txt`` beside it: a description. Taken if there are no folders of classes.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from phi3v.data.convert import ConversionResult
from phi3v.data.faults import quote
from phi3v.data.images import UNREADABLE_SUFFIXES
from phi3v.data.sources.json_records import not_utf8
from phi3v.data.sources.media import Medium, MediumKind
from phi3v.data.sources.records import OwnDataOptions, RawRecord, RawTurn, Row, Rows, convert_rows
from phi3v.data.sources.splits import choose_eval, split_name, unknown_layout
from phi3v.data.video import VIDEO_SUFFIXES
from phi3v.errors import UserError
from phi3v.processing.hd_transform import FORMATS

EVAL_SHARE = 0.1

# What systems leave in folders without being asked.
_SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")


@dataclass(frozen=True, slots=True)
class _File:
    """An image or clip.

    Attributes:
        path: relative to the source, with ``/``.
        split: that its folder says.
        label: its class; None if it is described by a text.
    """

    path: str
    split: str | None
    label: str | None


def convert(source: str, options: OwnDataOptions) -> ConversionResult:
    """Write ``SPLIT.jsonl``, a record a file, and images and frames under the files' own paths.

    Splits are those of the folders. Where there are none, `EVAL_SHARE` of each class (or of the described files) goes
    to eval: those whose path has the lowest hash, so that adding files hardly moves others.

    Args:
        source: ``image-folder`` or ``video-folder``.
        options: ``source`` is the folder; in ``question``, ``{classes}`` stands for the names of the classes.

    Raises:
        UserError: the folder is in none of the known forms, ``out`` holds other data, or files are bad and are not to
            be skipped.
    """
    kind: MediumKind = "image" if source == "image-folder" else "video"
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    suffixes = suffixes | UNREADABLE_SUFFIXES if kind == "image" else set(VIDEO_SUFFIXES)
    folder = options.required_source("photos/")
    if not folder.is_dir():
        raise UserError("is a file", where=str(folder), hint="name the folder that holds the folders of the classes")
    paths = _visible_files(folder)
    ours = [path for path in paths if PurePosixPath(path).suffix.lower() in suffixes]
    files = _classify(folder, ours, kind)
    labels = sorted({file.label for file in files if file.label is not None})
    question = _question(kind, labels, options.question)
    splits = _splits(files, options)

    def make_record(row: Row, _: Counter[str]) -> RawRecord:
        file: _File = row["file"]
        answer = _caption(folder / file.path) if file.label is None else file.label
        return RawRecord(file.path, (RawTurn(question, answer, (Medium(kind, file.path),)),))

    def rows(of_split: list[_File]) -> Rows:
        return lambda: ((str(folder / file.path), {"file": file}) for file in of_split)

    notes = []
    if files[0].split is None and options.eval_share is None and "eval" not in splits:
        notes.append("there is one file a class at most, so none was held out for evaluation")
    used = {*ours, *(str(PurePosixPath(file.path).with_suffix(".txt")) for file in files if file.label is None)}
    if left := [path for path in paths if path not in used]:
        endings = ", ".join(sorted({PurePosixPath(path).suffix or "none" for path in left}))
        notes.append(f"{len(left):,} files are no {kind}s and were left out (endings: {endings})")
    by_split = {split: rows(of_split) for split, of_split in splits.items()}
    return convert_rows(source, options, by_split, make_record, image_root=folder, notes=notes)


def _visible_files(folder: Path) -> list[str]:
    """The files below ``folder`` that are neither hidden nor a system's, relative and with ``/``, sorted."""
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _SYSTEM_FOLDERS]
        inner = Path(parent).relative_to(folder)
        visible = [name for name in names if not name.startswith(".") and name.lower() not in _SYSTEM_FILES]
        paths += [(inner / name).as_posix() for name in visible]
    return sorted(paths)


def _classify(folder: Path, paths: Sequence[str], kind: MediumKind) -> list[_File]:
    """Split and class of each file.

    Raises:
        UserError: the folders are in none of the known forms.
    """
    if not paths:
        known = [f"CLASS/NAME, {kind}s in a folder for each class", f"{kind}s with a .txt beside each"]
        raise unknown_layout(folder, known)
    tops = {parts[0]: split_name(parts[0]) for path in paths if len(parts := PurePosixPath(path).parts) > 1}
    has_splits = any(tops.values())
    loose = [path for path in paths if len(PurePosixPath(path).parts) == 1]
    if has_splits and (loose or not all(tops.values())):
        other = next((top for top, split in tops.items() if split is None), None) or loose[0]
        of_split = next(top for top, name in tops.items() if name)
        what = f"{quote(of_split)} is a split, and {quote(other)} is beside it"
        hint = "all folders at the top are splits (train, val, eval, test), or none is"
        raise UserError(what, where=str(folder), hint=hint)
    files = []
    for path in paths:
        parts = PurePosixPath(path).parts
        inner = parts[1:] if has_splits else parts
        # A name of macOS may be in the decomposed form (NFD), which no text that a model reads is written in.
        label = unicodedata.normalize("NFC", inner[0]) if len(inner) > 1 else None
        files.append(_File(path, tops[parts[0]] if has_splits else None, label))
    labels = {file.label for file in files}
    if None in labels and len(labels) > 1:
        first = next(file.path for file in files if file.label is None)
        what = f"{quote(first)} is in no folder of a class, and others are"
        hint = "move it into one; or, for descriptions in .txt files, all of them out of such folders"
        raise UserError(what, where=str(folder), hint=hint)
    if len(labels) == 1 and None not in labels:
        hint = f"--source is the folder that holds a folder for each class, or {kind}s with .txt files beside them"
        raise UserError(f"there is one class only, {quote(str(*labels))}", where=str(folder), hint=hint)
    return files


def _question(kind: MediumKind, labels: Sequence[str], question: str | None) -> str:
    if question is None:
        question = f"Classify the {kind} into one of the following classes: {{classes}}."
        if not labels:
            question = f"Describe the {kind}."
    return question.replace("{classes}", ", ".join(labels))


def _splits(files: Sequence[_File], options: OwnDataOptions) -> dict[str, list[_File]]:
    """The files of each split, in their order."""
    splits: dict[str, list[_File]] = {}
    if files[0].split is None:
        share = EVAL_SHARE if options.eval_share is None else options.eval_share
        by_label: dict[str | None, list[str]] = {}
        for file in files:
            by_label.setdefault(file.label, []).append(file.path)
        held_out = set[str]().union(*(choose_eval(of_label, share) for of_label in by_label.values()))
        if options.eval_share and not held_out:  # one file a class, and some were asked for
            held_out = choose_eval([file.path for file in files], share)
            if not held_out:
                what = "there is one file only, so none can be held out"
                raise UserError(what, where="--eval-share", hint="leave it out, or give it more data")
        splits["train"] = [file for file in files if file.path not in held_out]
        if held_out:
            splits["eval"] = [file for file in files if file.path in held_out]
        return splits
    if options.eval_share is not None:
        raise UserError("the folders are splits already", where="--eval-share", hint="leave it out")
    for file in files:
        assert file.split is not None
        splits.setdefault(file.split, []).append(file)
    return splits


def _caption(file: Path) -> str:
    """The description beside a file.

    Raises:
        UserError: there is none, or it is not UTF-8.
    """
    text = file.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        hint = f"write it into {text.name}; or move the file into a folder named after its class"
        raise UserError("has no description", where=str(file), hint=hint) from None
    except UnicodeDecodeError as error:
        raise not_utf8(text, error) from None
