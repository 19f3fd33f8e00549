"""Converters of datasets into our format, by the name that ``phi3v data convert`` takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from phi3v.errors import UserError

if TYPE_CHECKING:
    from phi3v.data.convert import ConversionResult, ConvertOptions

Converter = Callable[["ConvertOptions"], "ConversionResult"]


def _source(module: str, *names: str) -> Converter:
    """``convert`` of ``sources/MODULE.py``, imported when it is called, so that looking up names stays fast.

    Args:
        names: which of its sources, where the file has two.
    """

    def convert(options: ConvertOptions) -> ConversionResult:
        return importlib.import_module(f"phi3v.data.sources.{module}").convert(*names, options)

    return convert


SOURCES: dict[str, Converter] = {
    "easy-vqa": _source("easy_vqa"),
    "docvqa": _source("docvqa"),
    "hateful-memes": _source("hateful_memes"),
    "nlvr2": _source("nlvr2"),
    "ucf101": _source("ucf101"),
    "llava": _source("chats", "llava"),
    "messages": _source("chats", "messages"),
    "image-folder": _source("folders", "image-folder"),
    "video-folder": _source("folders", "video-folder"),
    "csv": _source("csv_table"),
}

OWN_DATA = ("llava", "messages", "image-folder", "video-folder", "csv")

# The options that not every source takes, by their field in `OwnDataOptions` -> (option, the sources that take it).
SOURCE_OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "num_frames": ("--frames", ("ucf101", "llava", "messages", "video-folder")),
    "special_text": ("--special-text", OWN_DATA),
    "eval_share": ("--eval-share", OWN_DATA),
    "image_root": ("--image-root", ("llava", "messages", "csv")),
    "question": ("--question", ("image-folder", "video-folder", "csv")),
    "image_columns": ("--image-column", ("csv",)),
    "question_column": ("--question-column", ("csv",)),
    "answer_column": ("--answer-column", ("csv",)),
    "rejected_columns": ("--rejected-column", ("csv",)),
    "label_column": ("--label-column", ("csv",)),
    "split_column": ("--split-column", ("csv",)),
    "id_column": ("--id-column", ("csv",)),
}


def require_taken(source: str, fields: Iterable[str]) -> None:
    """Raise `UserError` if ``source`` does not take one of these options of `SOURCE_OPTIONS`."""
    for field in fields:
        option, sources = SOURCE_OPTIONS[field]
        if source not in sources:
            what = f"{source} does not take this option"
            raise UserError(what, where=option, hint=f"the sources that do: {', '.join(sources)}")
