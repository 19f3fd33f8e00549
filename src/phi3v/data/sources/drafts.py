"""Records of one's own data before their pictures are copied, and what makes them records of ours.

A source reads its rows one by one and makes a `Draft` of each; the rest is the same for all of them: splits, ids,
pictures, clips, special text, and places for what is wrong.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from phi3v.data.convert import BadUnit, Conversion, ConversionResult, JsonRecord, Unit
from phi3v.data.faults import quote
from phi3v.data.images import decode_image, find_file, image_size, near_name
from phi3v.data.schema import SpecialText, image_path_fault, json_kind, read_line
from phi3v.data.sources.own_data import OwnDataOptions
from phi3v.data.sources.splits import eval_limit, hash_share
from phi3v.errors import UserError
from phi3v.processing.special_text import escape_special_text, shift_by_escapes

MediumKind = Literal["image", "video"]

REPEATED = "an id was that of an earlier record; -2, -3 … was added to it"


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture or a clip of a record.

    Attributes:
        kind: which of the two.
        path: the file as the record names it; None if ``data`` is the picture itself.
        data: an encoded picture.
    """

    kind: MediumKind
    path: str | None = None
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class DraftTurn:
    """A turn, before its pictures are copied.

    Attributes:
        places: where in ``user`` each medium stands; None: all before it.
        weight: 0 for a turn that is context.
    """

    user: str
    assistant: str
    media: tuple[Medium, ...]
    places: tuple[int, ...] | None = None
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Draft:
    """A record, before its pictures are copied.

    Attributes:
        id: as the source names it; None for one that is made of its number.
        turns: at least one.
        system: the system message.
    """

    id: str | None
    turns: tuple[DraftTurn, ...]
    system: str | None = None


Row = Mapping[str, Any]
Rows = Callable[[], Iterable[tuple[str, Row | UserError]]]  # (place, row or why it cannot be read), again and again
MakeDraft = Callable[[Row, Counter[str]], Draft]  # counts in its second argument what was decided on the way


def convert_rows(
    source: str,
    options: OwnDataOptions,
    rows: Mapping[str, Rows],
    make_draft: MakeDraft,
    *,
    image_root: Path,
    split_of: Callable[[Row], str] | None = None,
    notes: Iterable[str] = (),
) -> ConversionResult:
    """Convert rows of text that name pictures; the whole conversion of a source.

    The rows are read once to count the records of each split and once more for each split, so that nothing but
    what is being worked on is in memory, and a file that is broken somewhere is found before the work starts.

    Args:
        source: its name.
        options: if ``eval_share`` is above 0 and all rows are of the split train, so many records, chosen by a hash
            of what they show, become the split eval; those about the same pictures go together, and neither split is
            empty.
        rows: those of each split.
        make_draft: the draft of a row; raises `UserError` if the row is bad.
        image_root: the folder that media are relative to.
        split_of: the split of a row, if the row says it; raises `UserError` if that is bad.
        notes: what a person should know beforehand.

    Raises:
        UserError: as `Conversion`; or the rows cannot be read.
    """
    if options.eval_share and (split_of or set(rows) != {"train"}):
        raise UserError("the data has splits already", where="--eval-share", hint="leave it out")

    def share(row: Row | UserError) -> float | None:
        """The `hash_share` of a row, where it matters; None also if the row is bad."""
        if not options.eval_share or isinstance(row, UserError):
            return None
        with contextlib.suppress(UserError):  # met again, and reported, where the row is converted
            return hash_share(_key(make_draft(row, Counter())))
        return None

    lowest, highest, limit = 1.0, 0.0, 0.0
    if options.eval_share:
        for found in (share(row) for read in rows.values() for _, row in read()):
            if found is not None:
                lowest, highest = min(lowest, found), max(highest, found)
        if lowest <= highest:
            limit = eval_limit(lowest, highest, options.eval_share)

    def split(of_file: str, row: Row | UserError) -> str:
        if split_of and not isinstance(row, UserError):
            with contextlib.suppress(UserError):
                return split_of(row)
        return "eval" if (found := share(row)) is not None and found < limit else of_file

    totals: Counter[str] = Counter()
    for of_file, read in rows.items():
        totals.update(split(of_file, row) for _, row in read())
    if not totals:
        raise UserError("holds no record", where=str(options.source), hint="is this the right file?")
    decided: Counter[str] = Counter()
    with Conversion(source, options) as conversion:
        for name, total in totals.items():
            writer = DraftWriter(source, conversion, image_root, options.special_text, split=name, notes=decided)
            units = (
                writer.unit(place, row, make_draft, split_of)
                for of_file, read in rows.items()
                for place, row in read()
                if split(of_file, row) == name
            )
            conversion.write_split(name, units, total=total)
        for note in notes:
            conversion.note(note)
        for what, count in decided.items():
            conversion.note(f"{what} ({count:,}×)")
        return conversion.result()


def _key(draft: Draft) -> str:
    """What a draft is about: its pictures, or its first question if it has none."""
    media = [medium for turn in draft.turns for medium in turn.media]
    if not media:
        return draft.turns[0].user
    return "\n".join(
        hashlib.blake2b(medium.data or b"").hexdigest() if medium.path is None else posixpath.normpath(medium.path)
        for medium in media
    )


class DraftWriter:
    """Makes the units of a split.

    Args:
        source: key ``source`` of the records.
        conversion: that the units belong to.
        image_root: the folder that media are relative to.
        special_text: whether literal special tokens in texts make a record bad, or are escaped.
        split: in the ids of records without one.
        notes: counts what was decided on the way.
    """

    def __init__(
        self,
        source: str,
        conversion: Conversion,
        image_root: Path,
        special_text: SpecialText,
        *,
        split: str,
        notes: Counter[str],
    ) -> None:
        self._source = source
        self._conversion = conversion
        self._image_root = image_root
        self._special_text = special_text
        self._split = split
        self._notes = notes
        self._number = 0
        self._seen: dict[int, int] = {}  # 8-byte hash of an id -> how often

    def unit(
        self, place: str, row: Row | UserError, make_draft: MakeDraft, split_of: Callable[[Row], str] | None = None
    ) -> Unit | BadUnit:
        """The unit of a row, or what is wrong with it."""
        try:
            if isinstance(row, UserError):
                raise row
            if split_of:
                split_of(row)
            return self.draft_unit(place, make_draft(row, self._notes))
        except UserError as error:
            return BadUnit.of(place, error)

    def draft_unit(self, place: str, draft: Draft) -> Unit:
        """The unit of a draft. Called in the order of the records, from one thread."""
        record_id = self._unique(draft.id or f"{self._split}-{self._number:08d}")
        self._number += 1
        return Unit(place, functools.partial(self._records, place, record_id, draft))

    def _unique(self, wanted: str) -> str:
        name = wanted
        while (key := _short_hash(name)) in self._seen:
            self._seen[_short_hash(wanted)] += 1
            name = f"{wanted}-{self._seen[_short_hash(wanted)]}"
        self._seen[key] = 1
        if name != wanted:
            self._notes[REPEATED] += 1
        return name

    def _records(self, place: str, record_id: str, draft: Draft) -> list[JsonRecord]:
        plain: Callable[[str], str] = escape_special_text if self._special_text == "escape" else str
        turns: list[JsonRecord] = []
        for turn in draft.turns:
            added = [self._add(medium) for medium in turn.media]
            made: JsonRecord = {"images": [name for names in added for name in names]} if added else {}
            if turn.places is not None:
                places = [
                    place if plain is str else shift_by_escapes(turn.user, place)
                    for place, names in zip(turn.places, added, strict=True)
                    for _ in names
                ]
                made["image_offsets"] = places
            made |= {"user": plain(turn.user), "assistant": plain(turn.assistant)}
            turns.append(made if turn.weight else made | {"weight": 0})
        record: JsonRecord = {"id": record_id, "source": self._source}
        if draft.system is not None:
            record["system"] = plain(draft.system)
        record["conversations"] = turns
        # As `phi3v data check` will read it. Line 2, because line 1 may begin with a byte order mark.
        faults = read_line(json.dumps(record), file=Path(place), line=2).faults
        if faults:
            raise UserError(f"{faults[0].field}: {faults[0].what}", hint=faults[0].hint)
        return [record]

    def _add(self, medium: Medium) -> list[str]:
        """The paths of its picture, or of the frames of its clip, below ``images/``."""
        images = self._conversion.images
        if medium.data is not None:
            # Named after what it is, so that a picture that many records hold is written once.
            name = hashlib.blake2b(medium.data, digest_size=12).hexdigest()
            return [images.add(f"embedded/{name}", medium.data, name="the embedded picture")]
        assert medium.path is not None
        path = _path_below(medium.path, self._image_root)
        _require_there(path, self._image_root, medium.kind)
        if medium.kind == "image":
            return [images.copy_file(path, root=self._image_root)]
        # The ending stays in the name: a.mp4 and a.avi may lie side by side.
        return images.add_frames(path, self._image_root / path, self._conversion.options.num_frames)


def medium_of(value: object, kind: MediumKind, where: str) -> Medium:
    """The picture or clip that a record names: a path, a ``file:`` or ``data:`` URI, base64, or the
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


_URL_SAFE = str.maketrans("-_", "+/")
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def media_of(row: Row, kind: MediumKind) -> list[Medium]:
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
        return decode_image(medium.data, "the embedded picture").size
    assert medium.path is not None
    return image_size(_path_below(medium.path, root), root=root)


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


def _require_there(path: str, root: Path, kind: MediumKind) -> None:
    full = root / path
    if full.is_file():
        # `copy_file` looks at the links of pictures; nobody else would at those of clips.
        if not Path(os.path.realpath(full)).is_relative_to(os.path.realpath(root)):
            hint = f"copy it below {root}"
            raise UserError(f"the {kind} leaves the data root through a link: {quote(path)}", hint=hint)
        return
    near = near_name(full.name, full.parent)
    hint = f"it is looked up in {root}; --image-root names another folder"
    if near:
        hint = f"did you mean {quote((Path(path).parent / near).as_posix())}?"
    raise UserError(f"there is no such {kind}: {quote(path)}", hint=hint)


def _short_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
