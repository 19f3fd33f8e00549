"""Raw records, as a source reads them, and the writer that turns them into records of the data format.

A source reads a `RawRecord` from each question, chat or file. `RecordWriter` adds its images and clips to the data
folder and gives the record that names them. `convert_rows` is the whole conversion of a user's own data: splits, ids,
and the place of every error.
"""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phi3v.data.convert import BadUnit, Conversion, ConversionResult, ConvertOptions, JsonRecord, Unit
from phi3v.data.schema import SpecialText
from phi3v.data.sources.media import Medium, require_path
from phi3v.data.sources.splits import eval_limit, hash_share
from phi3v.errors import UserError
from phi3v.processing.special_text import escape_special_text, shift_by_escapes

REPEATED = "an id was that of an earlier record; -2, -3 … was added to it"


@dataclass(frozen=True, slots=True)
class OwnDataOptions(ConvertOptions):
    """`ConvertOptions` and the options of single sources; which takes which is in ``SOURCE_OPTIONS``.

    Attributes:
        image_root: the folder that image and video paths are relative to; default that of the data file.
        special_text: whether literal special tokens in texts make a record bad, or are escaped.
        eval_share: share of the data that goes to ``eval.jsonl`` if it has no splits; None for the source's default.
        question: the question of every record.
        image_columns: columns of image paths.
        question_column: column of questions.
        answer_column: column of answers.
        rejected_columns: columns of worse answers.
        label_column: column that says whether the answer is good.
        split_column: column of split names.
        id_column: column of record ids.

    Raises:
        UserError: ``eval_share`` is not in 0 to 1 (without 1), or ``question`` is blank.
    """

    image_root: Path | None = None
    special_text: SpecialText = "refuse"
    eval_share: float | None = None
    question: str | None = None
    image_columns: tuple[str, ...] = ()
    question_column: str | None = None
    answer_column: str | None = None
    rejected_columns: tuple[str, ...] = ()
    label_column: str | None = None
    split_column: str | None = None
    id_column: str | None = None

    def __post_init__(self) -> None:
        # Named in full: in a dataclass with slots, `super()` is of the class before it got them.
        ConvertOptions.__post_init__(self)
        if self.eval_share is not None and not 0 <= self.eval_share < 1:
            hint = "0.1 keeps a tenth for evaluation, 0 nothing"
            raise UserError(f"must be at least 0 and below 1, not {self.eval_share:g}", where="--eval-share", hint=hint)
        if self.question is not None and not self.question.strip():
            raise UserError("is empty", where="--question", hint="write the question that every record asks")
        if self.image_root is not None and not self.image_root.is_dir():
            raise UserError(f"no such folder: {self.image_root}", where="--image-root", hint="check the path")

    def required_source(self, example: str) -> Path:
        """The file or folder of the data.

        Args:
            example: what it may look like, for the message.

        Raises:
            UserError: it was not named, or there is none.
        """
        if self.source is None:
            raise UserError("is missing", where="--source", hint=f"name your data, e.g. --source {example}")
        path = Path(self.source).expanduser()
        if not path.exists():
            hint = "it is a path on this machine; data on the hub must be downloaded first"
            raise UserError("no such file or folder", where=f"--source {self.source}", hint=hint)
        return path


@dataclass(frozen=True, slots=True)
class RawTurn:
    """A turn before its images are copied.

    Attributes:
        places: where in ``user`` each medium stands; None: all before it.
        weight: 0 for a turn that is context.
        answers: all reference answers, if there are several.
        rejected, scores, label: how good the answer is, as of `Turn`.
    """

    user: str
    assistant: str
    media: tuple[Medium, ...] = ()
    places: tuple[int, ...] | None = None
    weight: int = 1
    answers: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    label: bool | None = None


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A record before its images are copied.

    Attributes:
        id: as the source names it; None for one that is made of its number.
        turns: at least one.
        system: the system message.
    """

    id: str | None
    turns: tuple[RawTurn, ...]
    system: str | None = None


class RecordWriter:
    """Turns raw records into records whose images are in the data folder.

    Args:
        conversion: that the records belong to.
        source: key ``source`` of the records.
        image_root: the folder that media are relative to, unless they name one.
        escape: escape literal special tokens in texts.
    """

    def __init__(self, conversion: Conversion, source: str, image_root: Path = Path(), *, escape: bool = False) -> None:
        self._conversion = conversion
        self._source = source
        self._image_root = image_root
        self._escape = escape

    def unit(self, place: str, read: Callable[[], Iterable[RawRecord | BadUnit]], amount: int = 1) -> Unit:
        """The unit of raw records, which have ids.

        Args:
            place: where they are in the source, for messages.
            read: gives them; runs in the worker, and may raise `UserError`.
            amount: as of `Unit`.
        """

        def work() -> list[JsonRecord | BadUnit]:
            added: dict[Medium, list[str]] = {}  # records that share an image add it once
            return [raw if isinstance(raw, BadUnit) else self._record(raw, added) for raw in read()]

        return Unit(place, work, amount)

    def _record(self, raw: RawRecord, added: dict[Medium, list[str]]) -> JsonRecord:
        for turn in raw.turns:
            added |= {medium: self._add(medium) for medium in turn.media if medium not in added}
        return json_record(raw, added, self._source, escape=self._escape)

    def _add(self, medium: Medium) -> list[str]:
        """The paths of an image, or of the frames of a clip, below ``images/``."""
        images, root = self._conversion.images, medium.root or self._image_root
        if medium.data is not None and medium.kind == "image":
            # Named after its content by default, so that an image that many records hold is written once.
            stem = medium.stem or f"embedded/{hashlib.blake2b(medium.data, digest_size=12).hexdigest()}"
            return [images.add(stem, medium.data, name=medium.name)]
        if medium.data is not None:
            assert medium.stem is not None
            return images.add_frames(medium.stem, medium.data, self._conversion.options.num_frames, name=medium.name)
        if medium.stem is not None:
            assert medium.path is not None
            return [images.add_file(medium.stem, medium.path, root=root)]
        path = require_path(medium, root)
        if medium.kind == "image":
            return [images.copy_file(path, root=root)]
        # The ending stays in the name: a.mp4 and a.avi may lie side by side.
        return images.add_frames(path, root / path, self._conversion.options.num_frames)


def json_record(
    raw: RawRecord, names: Mapping[Medium, list[str]], source: str | None, *, escape: bool = False
) -> JsonRecord:
    """A raw record as a line of the data format.

    Args:
        names: the images of each medium.
        source, escape: as of `RecordWriter`.
    """
    plain: Callable[[str], str] = escape_special_text if escape else str
    turns: list[JsonRecord] = []
    for turn in raw.turns:
        made: JsonRecord = {}
        if turn.media:
            made["images"] = [name for medium in turn.media for name in names[medium]]
        if turn.places is not None:
            made["image_offsets"] = [
                shift_by_escapes(turn.user, place) if escape else place
                for place, medium in zip(turn.places, turn.media, strict=True)
                for _ in names[medium]
            ]
        made |= {"user": plain(turn.user), "assistant": plain(turn.assistant)}
        if turn.weight != 1:
            made["weight"] = turn.weight
        if len(turn.answers) > 1:
            made["answers"] = list(turn.answers)
        if turn.rejected:
            made["rejected"] = [plain(text) for text in turn.rejected]
        if turn.scores:
            made["scores"] = list(turn.scores)
        if turn.label is not None:
            made["label"] = turn.label
        turns.append(made)
    record: JsonRecord = {"id": raw.id, "source": source}
    if raw.system is not None:
        record["system"] = plain(raw.system)
    return record | {"conversations": turns}


Row = Mapping[str, Any]
Rows = Callable[[], Iterable[tuple[str, Row | UserError]]]  # (place, row or why it cannot be read), again and again
MakeRecord = Callable[[Row, Counter[str]], RawRecord]  # counts in its second argument what was decided on the way


def convert_rows(
    source: str,
    options: OwnDataOptions,
    rows: Mapping[str, Rows],
    make_record: MakeRecord,
    *,
    image_root: Path,
    eval_share: float | None = None,
    split_of: Callable[[Row], str] | None = None,
    notes: Iterable[str] = (),
) -> ConversionResult:
    """Convert rows of text that name images: the whole conversion of a source.

    The rows are read once to count the records of each split and once more for each split, so that nothing but
    what is being worked on is in memory, and a file that is broken somewhere is found before the work starts.

    Args:
        source: its name.
        options: of the command line.
        rows: those of each split.
        make_record: the raw record of a row; raises `UserError` if the row is bad.
        image_root: the folder that media are relative to.
        eval_share: if above 0 and all rows are of the split train, so many records, chosen by a hash of what they show,
            become the split eval; those about the same images go together, and neither split is empty.
        split_of: the split of a row, if the row says it; raises `UserError` if that is bad.
        notes: said before those that the conversion adds.

    Raises:
        UserError: as `Conversion`; or the rows cannot be read.
    """
    if eval_share and (split_of or set(rows) != {"train"}):
        raise UserError("the data has splits already", where="--eval-share", hint="leave it out")

    def share(row: Row | UserError) -> float | None:
        """The `hash_share` of a row, where it matters; None also if the row is bad."""
        if not eval_share or isinstance(row, UserError):
            return None
        with contextlib.suppress(UserError):  # met again, and reported, where the row is converted
            return hash_share(_key(make_record(row, Counter())))
        return None

    limit = 0.0
    if eval_share:
        lowest, highest = 1.0, 0.0
        for found in (share(row) for read in rows.values() for _, row in read()):
            if found is not None:
                lowest, highest = min(lowest, found), max(highest, found)
        if lowest <= highest:
            limit = eval_limit(lowest, highest, eval_share)

    def split(of_file: str, row: Row | UserError) -> str:
        if split_of and not isinstance(row, UserError):
            with contextlib.suppress(UserError):
                return split_of(row)
        return "eval" if (found := share(row)) is not None and found < limit else of_file

    totals = Counter(split(of_file, row) for of_file, read in rows.items() for _, row in read())
    if not totals:
        raise UserError("holds no record", where=str(options.source), hint="is this the right file?")
    decided: Counter[str] = Counter()

    def units(writer: RecordWriter, wanted: str) -> Iterator[Unit | BadUnit]:
        number, seen = 0, dict[int, int]()
        for of_file, place, row in ((of_file, *found) for of_file, read in rows.items() for found in read()):
            if split(of_file, row) != wanted:
                continue
            try:
                if isinstance(row, UserError):
                    raise row
                if split_of:
                    split_of(row)
                raw = make_record(row, decided)
            except UserError as error:
                yield BadUnit.of(place, error)
                continue
            named = raw.id or f"{wanted}-{number:08d}"
            number += 1
            raw = replace(raw, id=_unique(named, seen))
            decided[REPEATED] += raw.id != named
            yield writer.unit(place, [raw].copy)

    with Conversion(source, options, options.special_text) as conversion:
        writer = RecordWriter(conversion, source, image_root, escape=options.special_text == "escape")
        for name, total in totals.items():
            conversion.write_split(name, units(writer, name), total=total)
        for note in (*notes, *(f"{what} ({count:,}×)" for what, count in (+decided).items())):
            conversion.note(note)
        return conversion.result()


def _unique(wanted: str, seen: dict[int, int]) -> str:
    """``wanted``, with a number if it is in ``seen``: 8-byte hash of an id to how often it was there."""
    name = wanted
    while (key := _short_hash(name)) in seen:
        seen[_short_hash(wanted)] += 1
        name = f"{wanted}-{seen[_short_hash(wanted)]}"
    seen[key] = 1
    return name


def _short_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _key(raw: RawRecord) -> str:
    """What a record is about: its images, or its first question if it has none."""
    media = [medium for turn in raw.turns for medium in turn.media]
    if not media:
        return raw.turns[0].user
    return "\n".join(
        hashlib.blake2b(medium.data or b"").hexdigest() if medium.path is None else posixpath.normpath(medium.path)
        for medium in media
    )
