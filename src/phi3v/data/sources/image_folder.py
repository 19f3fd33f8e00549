"""Pictures in a folder for each class, or with a description beside each; see `labelled_folders`."""

from __future__ import annotations

from PIL import Image

from phi3v.data.convert import ConversionResult
from phi3v.data.image_formats import FORMATS, UNREADABLE_SUFFIXES
from phi3v.data.sources.labelled_folders import convert_folders
from phi3v.data.sources.own_data import OwnDataOptions

SOURCE = "image-folder"


def convert(options: OwnDataOptions) -> ConversionResult:
    """`convert_folders` of pictures."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    return convert_folders(SOURCE, "image", suffixes | UNREADABLE_SUFFIXES, options)
