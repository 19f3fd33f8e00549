"""Text that the tokenizer would read as a special token.

A user's text must never become one by accident: a literal ``<|end|>`` in a question would end the turn.
"""

from __future__ import annotations

import re

# The added tokens of Phi-3's tokenizer and the image tags of its processor.
SPECIAL_TEXT = re.compile(r"<\|(?:endoftext|assistant|system|end|user|image|image_\d+|placeholder\d+)\|>|</?s>|<unk>")


def find_special_text(text: str) -> list[str]:
    """The literal special tokens in ``text``, in order."""
    return SPECIAL_TEXT.findall(text)


def escape_special_text(text: str) -> str:
    """``text`` with a space after the ``<`` of every literal special token, so that it stays text: ``< |end|>``."""
    return SPECIAL_TEXT.sub(lambda match: "< " + match.group()[1:], text)


def shift_by_escapes(text: str, offset: int) -> int:
    """The position of ``offset`` of ``text`` after `escape_special_text`."""
    return offset + sum(match.start() < offset for match in SPECIAL_TEXT.finditer(text))
