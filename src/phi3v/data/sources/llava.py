"""LLaVA's training files: a JSON array or JSON lines of conversations with ``<image>`` and ``<video>`` tags.

::

    {"id": "7", "image": "coco/7.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A dog."}]}

``image`` and ``video`` are a path, a list of paths, or absent. A clip becomes frames. In LLaVA-Video's files the clip's
tag is ``<image>``, which is understood. See `dialogue.py` for all else.
"""

from __future__ import annotations

from phi3v.data.convert import ConversionResult
from phi3v.data.sources.messages import convert_chats
from phi3v.data.sources.own_data import OwnDataOptions

SOURCE = "llava"


def convert(options: OwnDataOptions) -> ConversionResult:
    """As `messages.convert`."""
    return convert_chats(SOURCE, "llava.json", options)
