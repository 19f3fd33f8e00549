"""What stands in texts of other formats for images, clips and objects.

Images and clips have the tags of LLaVA, Qwen-VL, InternVL and others (`split_tags`). ms-swift keeps objects and their
boxes beside the text, which has ``<ref-object>`` and ``<bbox>`` in their places (`Objects`)::

    {"messages": [{"role": "user", "content": "<image>Where is the <ref-object>?"},
                  {"role": "assistant", "content": "<bbox>"}],
     "images": ["a.png"], "objects": {"ref": ["red disc"], "bbox": [[10, 10, 54, 54]]}}

A box becomes ``[(156,156),(844,844)]``, in thousandths of the image's width and height, as ms-swift writes it for
models that have no form of their own for boxes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from phi3v.data.faults import quote
from phi3v.data.jsonl import json_kind
from phi3v.data.sources.media import MediumKind
from phi3v.errors import UserError

BOX = "a <bbox> was filled in as [(x1,y1),(x2,y2)], in thousandths of the image's width and height"

_PLACEHOLDER = re.compile(r"<(ref-object|bbox)>", re.IGNORECASE)
_FAR = 10**9  # no coordinate: beyond every image
_BY_HAND = "write the coordinates into the text"


@dataclass(frozen=True, slots=True)
class Tag:
    """What stands for an image or a clip in a text.

    Attributes:
        written: as the text has it.
        number: of ``<image2>``; None for a tag that takes the record's next.
        path: of ``<img>a.png</img>``; None if the text does not name the file.
    """

    kind: MediumKind
    written: str
    number: int | None = None
    path: str | None = None


# One image may be a single token, a token repeated as often as the model needs, or either between two others.
_AROUND = r"<fake_token_around_image>|<(?:\|(?:vision|image|img|video)_{0}\||(?:vision|image|img|im|video)_{0})>"
_START = f"(?:{_AROUND.format('(?:start|begin)')}|" + r"<\|?begin_of_(?:image|video)\|?>|<start_of_image>)"
_END = f"(?:{_AROUND.format('end')}|" + r"<\|?end_of_(?:image|video)\|?>|(?-i:\[IMG_END\]))"
_SUFFIX = r"(?:[_-]?(?:soft_token|placeholder|token|pad|here))?[ _:#-]*"
_TOKEN = (
    rf"(?:<\|?(?:image|img|video){_SUFFIX}\d*\s*/?\|?>|<image_soft_token>|<IMG_CONTEXT>|<im_patch>"
    r"|(?-i:\[IMG\]|\[IMG_BREAK\]))"
)
_TAG = re.compile(
    rf"<(?P<element>image|img|video)>(?P<path>[^<>\n]*)</(?P=element)>"
    r"|\[img\](?P<bb>[^\[\]\n]+)\[/img\]"
    rf"|(?P<start>{_START})?(?P<tokens>{_TOKEN}+)(?P<end>{_END}|</img>)?"
    rf"|{_START}{_END}|<start_of_image>|<\|begin_of_image\|>",
    re.IGNORECASE,
)
_ONE_TOKEN = re.compile(_TOKEN, re.IGNORECASE)
# A token of some model's own: whatever it means, it is no text. Without bars it may yet be XML that an answer writes.
_CONTROL = re.compile(r"<\|[^<>|\s]*(?:image|img|vision|video|picture)[^<>|\s]*\|>", re.IGNORECASE)
_CONTROL_OR_XML = re.compile(
    _CONTROL.pattern
    + r"|</?\w*_(?:image|img|vision|video)>|</?(?:image|img|im|vision|video)_\w+>|</(?:image|img)>"
    + r"|(?-i:\[/?IMG[^\]\s]*\])",
    re.IGNORECASE,
)
_LIKE_A_TAG = re.compile(
    r"<[^<>\s=]*(?:image|img|picture|video)[^<>\s=]*>|\[(?:image|picture)[^\[\]\n]{0,8}\]", re.IGNORECASE
)
_MARKUP = re.compile(r"<img\s[^<>]*\bsrc\b|!\[[^\[\]\n]*\]\([^()\s]", re.IGNORECASE)


def split_tags(text: str) -> list[str | Tag]:
    """``text`` in pieces: what is plain, and the tags between."""
    pieces: list[str | Tag] = []
    end = 0
    for match in _TAG.finditer(text):
        pieces += [text[end : match.start()], *_tags(match)]
        end = match.end()
    return [piece for piece in (*pieces, text[end:]) if piece != ""]


def _tags(match: re.Match[str]) -> list[Tag]:
    written = match.group()
    element = match["element"] or ("img" if match["bb"] else "")
    if element:
        path = (match["path"] or match["bb"] or "").strip()
        return [Tag(_kind(element), written, path=path if path not in ("", ".", "./") else None)]
    tokens: list[str] = _ONE_TOKEN.findall(match["tokens"] or "") or [written]
    if match["start"] or match["end"]:  # the tokens between are parts of one image
        return [Tag(_kind(tokens[0]), written)]
    return [Tag(_kind(token), token, number=_number(token)) for token in tokens]


def _kind(token: str) -> MediumKind:
    return "video" if "video" in token.lower() else "image"


def _number(token: str) -> int | None:
    digits = re.sub(r"\D", "", token)
    return int(digits) if digits else None


def refuse_control_tokens(text: str, where: str, *, is_answer: bool) -> None:
    """Raise `UserError` if a text without its tags holds a token by which other models mark images."""
    if found := (_CONTROL if is_answer else _CONTROL_OR_XML).search(text):
        hint = "write <image> where an image stands, and nothing around it"
        raise UserError(f"holds an image token that is not known: {quote(found.group(), 40)}", where=where, hint=hint)


def like_a_tag(text: str) -> str | None:
    """What in a text without its tags may yet be meant as one."""
    found = _LIKE_A_TAG.search(text)
    return found.group() if found else None


def names_an_image(text: str) -> bool:
    """Whether a text has an image in Markdown or HTML."""
    return _MARKUP.search(text) is not None


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
        self._taken = {"ref": 0, "bbox": 0}

    @property
    def boxes(self) -> int:
        return self._taken["bbox"]

    @property
    def used(self) -> bool:
        return any(self._taken.values())

    def fill(self, text: str, where: str) -> str:
        """``text`` with its placeholders filled in, each with the next object's.

        Raises:
            UserError: there is none, or what to write is not certain.
        """
        return _PLACEHOLDER.sub(lambda match: self._next(match[1].lower(), where), text)

    def require_all_used(self) -> None:
        """Raise `UserError` if placeholders took some of the objects and not all."""
        for key, used in self._taken.items():
            if used and used < (given := len(self._list(key))):
                hint = "each <ref-object> and each <bbox> takes the next one"
                raise UserError(f"{given} are given and {used} stand in the text", where=f"objects.{key}", hint=hint)

    def _next(self, name: str, where: str) -> str:
        key = "ref" if name == "ref-object" else "bbox"
        if not isinstance(self._value, Mapping) or key not in self._value:
            what = "the record has no objects" if self._value is None else f"objects has no list {key}"
            hint = f'{_BY_HAND}, or give "objects": {{"ref": ["…"], "bbox": [[x1, y1, x2, y2]]}}'
            raise UserError(f"holds <{name}>, and {what}", where=where, hint=hint)
        items, index = self._list(key), self._taken[key]
        if index >= len(items):
            hint = "each <ref-object> and each <bbox> takes the next one"
            raise UserError(f"holds more <{name}> than objects.{key} has items: {len(items)}", where=where, hint=hint)
        at = f"objects.{key}[{index}]"
        self._taken[key] += 1
        if key == "bbox":
            return self._box(items[index], index, at)
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
