"""Clips in a folder for each class, or with a description beside each; see `labelled_folders`.

A clip becomes ``num_frames`` evenly spaced frames, as in UCF-101.
"""

from __future__ import annotations

from phi3v.data.convert import ConversionResult
from phi3v.data.sources.labelled_folders import convert_folders
from phi3v.data.sources.own_data import OwnDataOptions
from phi3v.data.video import VIDEO_SUFFIXES

SOURCE = "video-folder"


def convert(options: OwnDataOptions) -> ConversionResult:
    """`convert_folders` of clips."""
    return convert_folders(SOURCE, "video", VIDEO_SUFFIXES, options)
