"""LLaVA's training files: a JSON array or JSON lines of conversations with ``<image>`` and ``<video>`` tags.

::

    {"id": "7", "image": "coco/7.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A dog."}]}

``image`` and ``video`` are a path, a list of paths, or absent. A clip becomes frames. In LLaVA-Video's files the clip's
tag is ``<image>``, which is understood. See `dialogue.py` for all else.
"""

from __future__ import annotations

from phi3v.data.convert import ConversionResult
from phi3v.data.sources.dialogue import DialogueReader
from phi3v.data.sources.drafts import convert_rows
from phi3v.data.sources.json_records import JSON_SUFFIXES, json_rows
from phi3v.data.sources.own_data import OwnDataOptions
from phi3v.data.sources.splits import split_files

SOURCE = "llava"


def convert(options: OwnDataOptions) -> ConversionResult:
    """Write ``SPLIT.jsonl`` and the pictures under their own names.

    Args:
        options: ``source`` is the file, or a folder of such files.

    Raises:
        UserError: the file cannot be read, ``out`` holds other data, or records are bad and are not to be skipped.
    """
    source = options.required_source("llava.json")
    files = split_files(source, JSON_SUFFIXES)
    root = options.image_root or (source.parent if source.is_file() else source)
    rows = {split: json_rows(of_split) for split, of_split in files.items()}
    return convert_rows(SOURCE, options, rows, DialogueReader("conversations", root), image_root=root)
