"""Small copies of images, as many as a budget of bytes allows."""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path
from typing import Any

from PIL import Image

from phi3v.data.images import load_image
from phi3v.errors import UserError

QUALITY = 72  # of WebP


def webp(image: Image.Image, side: int) -> str:
    """The image, its longer side at most ``side`` pixels, as WebP in base64."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    with io.BytesIO() as file:
        small.save(file, "WEBP", quality=QUALITY, method=2)
        return base64.b64encode(file.getvalue()).decode("ascii")


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
        self.failed: set[tuple[Path, str]] = set()
        self.out_of_time = False
        self._places: dict[tuple[Path, str], int] = {}

    @property
    def bytes(self) -> int:
        return sum(map(len, self.encoded))

    def add(self, root: Path, names: list[str], **settings: Any) -> bool:
        """Take the images of one question, all or none; false once the budget is used up.

        Args:
            settings: of `load_image`.
        """
        new: dict[tuple[Path, str], str] = {}
        for name in names:
            key = (root, name)
            if key in self._places or key in self.failed or key in new:
                continue
            if time.monotonic() > self.until:
                self.out_of_time = True
                return False
            try:
                new[key] = webp(load_image(name, root=root, **settings), self.side)
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

    def place(self, root: Path, name: str) -> int:
        """Index into ``encoded``, or -1."""
        return self._places.get((root, name), -1)
