"""Where a text of somebody else's data has its images and clips: the tags of LLaVA, Qwen-VL, InternVL and others."""

from __future__ import annotations

import re
from dataclasses import dataclass

from phi3v.data.faults import quote
from phi3v.data.sources.drafts import MediumKind
from phi3v.errors import UserError


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
