"""Converters of datasets into our format, by the name that ``phi3v data convert`` takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phi3v.data.convert import ConversionResult, ConvertOptions

Converter = Callable[["ConvertOptions"], "ConversionResult"]


def _source(module: str) -> Converter:
    """``convert`` of ``sources/MODULE.py``, imported when it is called, so that looking up names stays fast."""

    def convert(options: ConvertOptions) -> ConversionResult:
        return importlib.import_module(f"phi3v.data.sources.{module}").convert(options)

    return convert


SOURCES: dict[str, Converter] = {
    "easy-vqa": _source("easy_vqa"),
    "docvqa": _source("docvqa"),
    "hateful-memes": _source("hateful_memes"),
    "nlvr2": _source("nlvr2"),
    "ucf101": _source("ucf101"),
}
