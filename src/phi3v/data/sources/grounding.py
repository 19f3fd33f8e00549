"""Objects and their boxes, which ms-swift keeps beside the text: ``<ref-object>`` and ``<bbox>`` are filled in.

::

    {"messages": [{"role": "user", "content": "<image>Where is the <ref-object>?"},
                  {"role": "assistant", "content": "<bbox>"}],
     "images": ["a.png"], "objects": {"ref": ["red disc"], "bbox": [[10, 10, 54, 54]]}}

A box becomes ``[(156,156),(844,844)]``, in thousandths of the image's width and height, as ms-swift writes it for
models that have no form of their own for boxes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from phi3v.data.faults import quote
from phi3v.data.schema import json_kind
from phi3v.errors import UserError

BOX = "a <bbox> was filled in as [(x1,y1),(x2,y2)], in thousandths of the image's width and height"

_PLACEHOLDER = re.compile(r"<(ref-object|bbox)>", re.IGNORECASE)
_FAR = 10**9  # no coordinate: beyond every image
_BY_HAND = "write the coordinates into the text"


class Objects:
    """The ``objects`` of a record.

    Args:
        value: of the key; None if the record has none.
        num_images: of the record.
        size_of: gives width and height of an image by its number, from 0.

    Attributes:
        boxes: how many have been filled in.
        used: whether anything has.
    """

    def __init__(self, value: object, num_images: int, size_of: Callable[[int], tuple[int, int]]) -> None:
        self._value = value
        self._num_images = num_images
        self._size_of = size_of
        self._refs = 0
        self.boxes = 0

    @property
    def used(self) -> bool:
        return bool(self._refs or self.boxes)

    def fill(self, text: str, where: str) -> str:
        """``text`` with its placeholders filled in, each with the next object's.

        Raises:
            UserError: there is none, or what to write is not certain.
        """
        if not _PLACEHOLDER.search(text):
            return text
        return _PLACEHOLDER.sub(lambda match: self._next(match[1].lower(), where), text)

    def require_all_used(self) -> None:
        """Raise `UserError` if placeholders took some of the objects and not all."""
        for key, used in (("ref", self._refs), ("bbox", self.boxes)):
            if used and used < (given := len(self._list(key))):
                hint = "each <ref-object> and each <bbox> takes the next one"
                raise UserError(f"{given} are given and {used} stand in the text", where=f"objects.{key}", hint=hint)

    def _next(self, name: str, where: str) -> str:
        key = "ref" if name == "ref-object" else "bbox"
        if not isinstance(self._value, Mapping) or key not in self._value:
            what = "the record has no objects" if self._value is None else f"objects has no list {key}"
            hint = f'{_BY_HAND}, or give "objects": {{"ref": ["…"], "bbox": [[x1, y1, x2, y2]]}}'
            raise UserError(f"holds <{name}>, and {what}", where=where, hint=hint)
        items, index = self._list(key), self._refs if key == "ref" else self.boxes
        if index >= len(items):
            hint = "each <ref-object> and each <bbox> takes the next one"
            raise UserError(f"holds more <{name}> than objects.{key} has items: {len(items)}", where=where, hint=hint)
        at = f"objects.{key}[{index}]"
        if key == "bbox":
            self.boxes += 1
            return self._box(items[index], index, at)
        self._refs += 1
        if not isinstance(ref := items[index], str):
            raise UserError(f"must be a string, not {json_kind(ref)}", where=at, hint="name the object")
        if not ref.strip() or _PLACEHOLDER.search(ref):
            raise UserError(f"is no name of an object: {quote(ref, 40)}", where=at, hint="name the object")
        return ref

    def _list(self, key: str) -> Sequence[object]:
        value = self._value.get(key) if isinstance(self._value, Mapping) else None
        if value is not None and not isinstance(value, list):
            raise UserError(f"must be a list, not {json_kind(value)}", where=f"objects.{key}", hint="write […]")
        return value or []

    def _box(self, box: object, index: int, where: str) -> str:
        if (
            not isinstance(box, list)
            or len(box) not in (2, 4)
            or not all(type(number) in (int, float) and abs(number) < _FAR for number in box)
        ):
            raise UserError("is no box", where=where, hint="write [x1, y1, x2, y2] or, for a point, [x, y]")
        width, height = self._scale(index, where)
        points = [(round(1000 * x / width), round(1000 * y / height)) for x, y in zip(box[::2], box[1::2], strict=True)]
        if any(not 0 <= number <= 1000 for point in points for number in point):
            raise UserError(f"lies outside of the image, whose size is {width}x{height}: {box}", where=where)
        if len(points) == 2 and (points[0][0] > points[1][0] or points[0][1] > points[1][1]):
            hint = "write [x1, y1, x2, y2], the top left corner first; a box of x, y, width and height is another one"
            raise UserError(f"ends before it begins: {box}", where=where, hint=hint)
        return f"[{','.join(f'({x},{y})' for x, y in points)}]"

    def _scale(self, index: int, where: str) -> tuple[int, int]:
        """What the coordinates are shares of."""
        assert isinstance(self._value, Mapping)
        kind = self._value.get("bbox_type")
        if kind not in (None, "real", "norm1"):
            hint = "known are real, which is pixels, and norm1, which is shares of width and height"
            raise UserError(f"is not known: {quote(str(kind), 40)}", where="objects.bbox_type", hint=hint)
        if kind == "norm1":
            return 1, 1
        images = self._list("image_id")
        image = images[index] if index < len(images) else 0 if self._num_images == 1 else None
        if type(image) is not int or not 0 <= image < self._num_images:
            what = f"is a box in pixels of one of {self._num_images} images, and which one is not said"
            hint = f'name it by its number from 0 in "image_id" of objects, or {_BY_HAND}'
            raise UserError(what, where=where, hint=hint)
        return self._size_of(image)
