"""Images and clips as records name them: paths, URIs, base64, or the cells of a table."""

from __future__ import annotations

import base64
import contextlib
import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from phi3v.data.faults import near_name, quote
from phi3v.data.image_paths import image_path_fault
from phi3v.data.image_store import FolderStore, find_file
from phi3v.data.images import decode_image, image_size
from phi3v.data.jsonl import json_kind
from phi3v.errors import UserError

MediumKind = Literal["image", "video"]

_URL_SAFE = str.maketrans("-_", "+/")
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True, slots=True)
class Medium:
    """An image or a clip of a record.

    Attributes:
        kind: which of the two.
        path: the file as the source names it; None if ``data`` is its content.
        data: the content of an image or video file.
        root: the folder that ``path`` is relative to; None for that of all records.
        stem: its new path below ``images/`` without the ending; None keeps the file's own name.
        name: what to call ``data`` in a message.
    """

    kind: MediumKind
    path: str | None = None
    data: bytes | None = None
    root: Path | None = None
    stem: str | None = None
    name: str = "the embedded image"


def medium_of(value: object, kind: MediumKind, where: str) -> Medium:
    """The image or clip that a record names: a path, a ``file:`` or ``data:`` URI, base64, or the
    ``{"bytes": …, "path": …}`` of a table.

    Raises:
        UserError: it is none of these, or a URL.
    """
    named = value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and kind == "image":
        return Medium(kind, data=value)
    if not isinstance(value, str) or not value.strip():
        what = "is empty" if isinstance(named, str) else f"must be a path, not {json_kind(named)}"
        raise UserError(what, where=where, hint=f"name the {kind}'s file, relative to the data's folder")
    text = value.strip()
    scheme = text[:20].partition(":")[0].lower()
    head, comma, content = text.partition(",") if ";base64," in text[:100] or scheme == "data" else ("", "", text)
    if head or _is_base64_image(text):
        if kind != "image":
            raise UserError("is a data: URI", where=where, hint="save the clip and name its file")
        if head and (not comma or not head.lower().endswith(";base64")):
            what = f"is a data: URI that is not base64: {quote(text, 40)}"
            raise UserError(what, where=where, hint="write data:image/png;base64,…")
        return Medium(kind, data=_base64(content, where))
    if scheme == "file":
        return Medium(kind, path=_file_of_uri(text))
    if re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
        raise UserError(
            f"is a URL, and nothing is downloaded here: {quote(text)}",
            where=where,
            hint=f"download the {kind} and name its file",
        )
    return Medium(kind, path=value)


def _file_of_uri(uri: str) -> str:
    """The path of a ``file:`` URI; of ``file://a.png``, which names a host, what was meant."""
    path = uri[len("file:") :]
    if path.startswith("//"):
        host, slash, inner = path[2:].partition("/")
        path = slash + inner if host.lower() in ("", "localhost") else host + slash + inner
    return re.sub(r"^/(?=[A-Za-z]:[\\/])", "", unquote(path))  # file:///C:/a.png


def _is_base64_image(text: str) -> bool:
    """Whether a text is no path but the base64 of an image file: by how that begins, and what else is in it."""
    if len(text) < 64:
        return False
    with contextlib.suppress(ValueError):
        start = base64.b64decode(text[:32].translate(_URL_SAFE), validate=True)
        if start.startswith(_SIGNATURES) or start[4:8] == b"ftyp":
            return len(text) > 1024 or re.fullmatch(r"[\w+/\s-]+={0,2}", text, re.ASCII) is not None
    return False


def media_of(row: Mapping[str, Any], kind: MediumKind) -> list[Medium]:
    """Those that a row names under the key ``image`` or ``images`` (``video`` or ``videos``), as one or as a list.

    Raises:
        UserError: as `medium_of`.
    """
    where = kind if row.get(kind) else f"{kind}s"
    value = row.get(where) or []
    if isinstance(value, Mapping) and all(str(name).startswith("<") for name in value):
        value = [value[name] for name in sorted(value)]  # MiniCPM-V's {"<image_00>": "a.png", "<image_01>": "b.png"}
    items = value if isinstance(value, list) else [value]
    return [medium_of(item, kind, f"{where}[{k}]") for k, item in enumerate(items)]


def _base64(content: str, where: str) -> bytes:
    if "%" in content:  # as in a URL
        content = unquote(content)
    plain = re.sub(r"\s+", "", content).translate(_URL_SAFE).rstrip("=")
    try:
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except ValueError as error:
        raise UserError(f"is damaged base64: {error}", where=where, hint="encode the image again") from None
    if not data:
        raise UserError("is base64 of nothing", where=where, hint="encode the image again")
    return data


def medium_size(medium: Medium, root: Path) -> tuple[int, int]:
    """Width and height of an image; raises `UserError` if it cannot be used."""
    if medium.data is not None:
        return decode_image(medium.data, "the embedded image").size
    assert medium.path is not None
    return image_size(_path_below(medium.path, root), store=FolderStore(root))


def require_path(medium: Medium, root: Path) -> str:
    """The path of a medium relative to ``root``.

    Raises:
        UserError: there is no such file, or it lies elsewhere.
    """
    assert medium.path is not None
    path = _path_below(medium.path, root)
    full = root / path
    if full.is_file():
        # `copy_file` looks at the links of images; nobody else would at those of clips.
        if not Path(os.path.realpath(full)).is_relative_to(os.path.realpath(root)):
            what = f"the {medium.kind} leaves the data root through a link: {quote(path)}"
            raise UserError(what, hint=f"copy it below {root}")
        return path
    hint = f"it is looked up in {root}; --image-root names another folder"
    if near := near_name(full.name, full.parent):
        hint = f"did you mean {quote((Path(path).parent / near).as_posix())}?"
    raise UserError(f"there is no such {medium.kind}: {quote(path)}", hint=hint)


def _path_below(named: str, root: Path) -> str:
    """`_local_path` of what a record names; of ``a%20b.png``, unless that is its name, of what it stands for."""
    path = _local_path(named, root)
    if "%" in path and not (root / path).is_file():
        plain = _local_path(unquote(named), root)
        path = plain if (root / plain).is_file() else path
    return path


def _local_path(path: str, root: Path) -> str:
    """``path`` relative to ``root`` in normal form, as the disk spells it: the same file has one name.

    Raises:
        UserError: it lies elsewhere.
    """
    plain = path
    if not re.match(r"[A-Za-z]:|\\\\", plain):
        plain = plain.replace("\\", "/")  # written on Windows
    if os.path.isabs(plain) and not image_path_fault(plain[1:]):  # of a NUL or half a surrogate pair there is no path
        with_root = os.path.relpath(os.path.realpath(plain), os.path.realpath(root))
        plain = plain if with_root.startswith("..") else with_root.replace(os.sep, "/")
    plain = posixpath.normpath(plain)
    if wrong := image_path_fault(plain):
        hint = f"paths are relative to {root} and may not leave it; --image-root names another folder"
        raise UserError(wrong[0], hint=hint)
    return find_file(plain, root).relative_to(root).as_posix()
