"""What a chat takes at most; each limit is an option of ``phi3v chat``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from phi3v.config import DEFAULT_MAX_PIXELS
from phi3v.errors import UserError


def _limit(default: float, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """What a chat takes at most; ``images`` is the option ``--max-images``.

    Raises:
        UserError: one is below 1.
    """

    images: int = _limit(64, "images of a conversation, the frames of clips included")
    characters: int = _limit(20_000, "characters of a question")
    file_mb: float = _limit(100.0, "megabytes of a file, so of an upload")
    pixels: int = _limit(DEFAULT_MAX_PIXELS, "pixels of an image, or of a clip's frame")
    total_pixels: int = _limit(4 * DEFAULT_MAX_PIXELS, "pixels of a conversation; each is kept, in 3 bytes")
    frames: int = _limit(32, "frames chosen from a clip")
    clip_frames: int = _limit(18_000, "frames that a clip has; all of them are decoded")

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            if getattr(self, entry.name) <= 0:
                raise UserError(f"must be above 0, got {getattr(self, entry.name)}", where=limit_option(entry.name))

    def require_text(self, text: str) -> None:
        """Raise `UserError` if a question is too long."""
        if len(text) > self.characters:
            what = f"the question is too long: {len(text):,} characters, and the limit is {self.characters:,}"
            raise UserError(what, hint=f"ask in fewer, or raise {limit_option('characters')}")

    def require_images(self, count: int) -> None:
        """Raise `UserError` if these are too many for a conversation."""
        if count > self.images:
            what = f"{count} images and frames are too many for a conversation, and the limit is {self.images}"
            raise UserError(what, hint=f"give fewer, or raise {limit_option('images')}")

    def require_pixels(self, count: int) -> None:
        """Raise `UserError` if a conversation's images are too large together."""
        if count > self.total_pixels:
            what = f"the images of the conversation have more than {self.total_pixels:,} pixels together"
            raise UserError(what, hint=f"give fewer or smaller ones, or raise {limit_option('total_pixels')}")


def limit_option(name: str) -> str:
    """The option of ``phi3v chat`` that sets a field of `Limits`."""
    return f"--max-{name.replace('_', '-')}"


LIMITS = Limits()
