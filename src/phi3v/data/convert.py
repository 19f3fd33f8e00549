"""Converting a dataset: units of work done on all cores, their records written in order.

What a source (``sources/``) has to say is what its units are. A unit is what goes wrong or right as one, a page
with its questions or a clip. Its work adds images through `Conversion.images` and returns the records that name
them::

    with Conversion("pets", options) as conversion:

        def unit(line: int, row: dict[str, str]) -> Unit:
            def work() -> list[dict[str, Any]]:  # runs in a thread
                image = conversion.images.add_file(f"train/{line:06d}", row["photo"], root=folder)
                turn = {"images": [image], "user": "Which animal?", "assistant": row["animal"]}
                return [{"id": f"train-{line:06d}", "source": "pets", "conversations": [turn]}]

            return Unit(f"pets.csv:{line}", work)

        conversion.write_split("train", (unit(line, row) for line, row in rows), total=len(rows))
        return conversion.result()

What this gives every source: the bytes on the disk depend on the dataset alone, not on the number of workers nor
on interruptions; an image appears complete or not at all, and one that is there already is not made again; a JSONL
file appears when it is complete; a bad unit costs nothing of the good ones. Units are streamed and few are in
flight at once, so memory does not grow with the dataset.

Threads, not processes: decoding and encoding of images and clips run outside of Python's lock, and a unit may
then be any function.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich.console import Console
from rich.text import Text

from phi3v.config import DEFAULT_MAX_PIXELS
from phi3v.data.faults import quote
from phi3v.data.image_folder import ImageFolder, OutputError
from phi3v.data.images import describe_kinds
from phi3v.data.jsonl import TEMPORARY_SUFFIX, write_jsonl
from phi3v.data.progress import LateProgress, in_order
from phi3v.data.schema import SpecialText, read_line
from phi3v.errors import UserError
from phi3v.machine import available_cores
from phi3v.paths import cannot_write

OnBad = Literal["stop", "skip"]
JsonRecord = dict[str, Any]
_Outcome = Sequence["JsonRecord | BadUnit"]

_ROOM = "is there room, and the permission to write?"
_LISTED = 20  # bad units that a message names; the others are counted
_HOPELESS = 1000  # bad units after which "stop" does not look at the rest: the whole source is not what it should be


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What the command line says about a conversion.

    Attributes:
        out: the data folder, made if need be.
        source: path or hub id of the dataset; None for its usual place.
        on_bad: what follows if units are bad: ``stop`` is an error after everything good is done, ``skip`` leaves
            them out.
        workers: threads; None for one a core.
        progress: show a bar if it takes long and standard error is a terminal.
        max_pixels: largest width x height of an image.
        num_frames: frames of a clip, where the dataset has clips.

    Raises:
        UserError: ``workers``, ``max_pixels`` or ``num_frames`` is below 1.
    """

    out: Path
    source: str | None = None
    on_bad: OnBad = "stop"
    workers: int | None = None
    progress: bool = True
    max_pixels: int = DEFAULT_MAX_PIXELS
    num_frames: int = 8

    def __post_init__(self) -> None:
        options = (("--workers", self.workers), ("--max-pixels", self.max_pixels), ("--frames", self.num_frames))
        for flag, number in options:
            if number is not None and number < 1:
                raise UserError(f"must be at least 1, not {number}", where=flag)


@dataclass(frozen=True, slots=True)
class BadUnit:
    """A part of the dataset that cannot be converted; a source may give it in place of a `Unit` or of a record.

    Attributes:
        place: where it is in the source.
        what: what is wrong, so that "``place``: ``what``" reads well.
        hint: what to do about it.
        amount: as of `Unit`.
    """

    place: str
    what: str
    hint: str | None = None
    amount: int = 1

    def __str__(self) -> str:
        return f"{self.place}: {self.what}" + (f" ({self.hint})" if self.hint else "")

    @classmethod
    def of(cls, place: str, error: UserError) -> BadUnit:
        """The part at ``place`` that an error is about; where in it, comes first."""
        where = f"{error.where}: " if error.where and error.where != place else ""
        return cls(place, where + error.what, error.hint)

    def to_json_dict(self) -> dict[str, str | None]:
        """Plain values for ``--json``."""
        return {"place": self.place, "what": self.what, "hint": self.hint}


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the dataset that is converted by itself.

    Attributes:
        place: where it is in the source, for messages: ``train.jsonl:12``, ``row 7 of docvqa``, the clip's path.
        work: adds its images and returns its records; a `BadUnit` among them stands for a part that is bad while the
            rest is good. It runs in a thread, at any time and in any order; what it raises as `UserError` makes the
            whole unit bad.
        amount: its share of the split's ``total``.
    """

    place: str
    work: Callable[[], Sequence[JsonRecord | BadUnit]]
    amount: int = 1


class BadUnitsError(UserError):
    """Parts of the dataset are bad; the message lists them.

    Args:
        source: the name of the source.
        bad: all of them, in order.
        units: how many units there are, good and bad.
        stopped_early: there are so many that the rest was not looked at.
    """

    def __init__(self, source: str, bad: list[BadUnit], *, units: int, stopped_early: bool) -> None:
        self.bad = tuple(bad)
        self.units = units
        self.stopped_early = stopped_early
        what = f"{len(bad):,} of {units:,} units cannot be converted"
        if stopped_early:
            what = f"{len(bad):,} of the first {units:,} units cannot be converted, so the rest was not tried"
        if len(bad) > _LISTED:
            what += f" (the first {_LISTED} follow)"
        super().__init__(
            what,
            where=source,
            hint="correct them and run this again (what is done is kept), or leave them out with --on-bad skip",
        )

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.where}: {self.what}", *(f"  {bad}" for bad in self.bad[:_LISTED]), f"  → {self.hint}"]
        )


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """What a finished conversion gave.

    Attributes:
        source: the name of the source.
        files: the .jsonl file of each split.
        records: how many each holds.
        images: image files that the records name: made now, or there from an earlier run.
        images_kept: those among them that an earlier run had made.
        image_kinds: how many of them are more than decoded, by kind (`IMAGE_KINDS`).
        skipped: the bad units that were left out.
        notes: what else a person should know.
    """

    source: str
    files: dict[str, Path]
    records: dict[str, int]
    images: int
    images_kept: int
    image_kinds: dict[str, int] = field(default_factory=dict)
    skipped: tuple[BadUnit, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "source": self.source,
            "files": {split: str(path) for split, path in self.files.items()},
            "records": self.records,
            "images": self.images,
            "images_kept": self.images_kept,
            "image_kinds": self.image_kinds,
            "skipped": len(self.skipped),
            "skipped_units": [bad.to_json_dict() for bad in self.skipped],
            "notes": list(self.notes),
        }

    def render(self, console: Console) -> None:
        """Print what was written and what was left out."""
        # As `Text`, not markup: rich would take a [0] of a message for a style.
        for split, path in self.files.items():
            records = self.records[split]
            line = f"{split}: {records:,} record{'s' if records != 1 else ''} in {path}"
            console.print(Text(line), soft_wrap=True)
        kept = f", {self.images_kept:,} of them from an earlier run" if self.images_kept else ""
        console.print(Text(f"images: {self.images:,}{kept}"), soft_wrap=True)
        if self.image_kinds:
            console.print(Text(f"  of these {describe_kinds(self.image_kinds)}"), soft_wrap=True)
        for note in self.notes:
            console.print(Text(f"note: {note}"), soft_wrap=True)
        if self.skipped:
            console.print(Text(f"skipped: {len(self.skipped):,}", style="bold yellow"), soft_wrap=True)
            for bad in self.skipped[:_LISTED]:
                console.print(Text(f"  {bad}", style="yellow"), soft_wrap=True)
            if len(self.skipped) > _LISTED:
                more = f"  and {len(self.skipped) - _LISTED:,} more (--json lists all)"
                console.print(Text(more, style="yellow"), soft_wrap=True)


@dataclass(slots=True)
class _Split:
    """A split while it is written."""

    records: int = 0
    bad: list[BadUnit] = field(default_factory=list)


class _SplitHasBadUnitsError(Exception):
    """Keeps the file of a split with bad units from appearing."""


class Conversion:
    """One run of a source: writes its splits, keeps account of images and bad units.

    A context manager: while it is open, no other conversion may write into the folder.

    Args:
        source: the name of the source.
        options: see `ConvertOptions`.
        special_text: ``refuse`` makes records with literal special tokens bad; ``escape`` leaves that to the setting
            of those who read them.

    Attributes:
        images: where units put their images: the ``images/`` of the data folder.
        options: as given.

    Raises:
        UserError: on entering, if ``out`` cannot be written or another conversion is at work in it.
    """

    def __init__(self, source: str, options: ConvertOptions, special_text: SpecialText = "escape") -> None:
        self.options = options
        self._special_text = special_text
        self.images = ImageFolder(options.out / "images", options.max_pixels)
        self._source = source
        self._files: dict[str, Path] = {}
        self._records: dict[str, int] = {}
        self._bad: list[BadUnit] = []
        self._notes: list[str] = []
        self._units = 0
        self._stopped_early = False
        self._lock = FileLock(options.out / ".converting", timeout=0)

    def __enter__(self) -> Conversion:
        out = self.options.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            # Nobody else is at work here, so these are what a killed run left behind.
            for leftover in out.rglob(f".*{TEMPORARY_SUFFIX}"):
                leftover.unlink(missing_ok=True)
        except Timeout:
            raise UserError(
                "another conversion is writing into this folder", where=str(out), hint="wait for it, or stop it"
            ) from None
        except OSError as error:
            raise cannot_write(error, str(out), _ROOM) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self.options.out / ".converting").unlink(missing_ok=True)
        self._lock.release()

    def note(self, text: str) -> None:
        """Something that a person should know about the result."""
        self._notes.append(text)

    def write_split(
        self, split: str, units: Iterable[Unit | BadUnit], *, total: int, file_name: str | None = None
    ) -> None:
        """Convert the units of a split and write its .jsonl file, if all are good or bad ones are to be skipped.

        Args:
            split: its name.
            units: in the order of the records. Taken one by one, in the calling thread, as workers become free.
            total: the sum of their amounts, for the progress bar.
            file_name: default ``SPLIT.jsonl``.

        Raises:
            BadUnitsError: so many units are bad that looking at more is no use.
            UserError: ``out`` cannot be written, or holds other data under these names.
        """
        if self._stopped_early:
            return
        path = self.options.out / (file_name or f"{split}.jsonl")
        state = _Split()
        try:
            with LateProgress(f"converting {split}", total, enabled=self.options.progress) as bar:
                write_jsonl(path, self._convert(units, state, bar))
        except _SplitHasBadUnitsError:
            return
        except OSError as error:
            raise cannot_write(error, str(path), _ROOM) from None
        finally:
            self._bad += state.bad
        self._files[split] = path
        self._records[split] = state.records

    def result(self) -> ConversionResult:
        """What was written.

        Raises:
            BadUnitsError: units were bad and ``on_bad`` is ``stop``.
            UserError: there is not one good unit in a split.
        """
        if self._bad and self.options.on_bad == "stop":
            raise BadUnitsError(self._source, self._bad, units=self._units, stopped_early=self._stopped_early)
        return ConversionResult(
            self._source,
            self._files,
            self._records,
            images=self.images.total,
            images_kept=self.images.kept,
            image_kinds=self.images.kinds,
            skipped=tuple(self._bad),
            notes=tuple(self._notes),
        )

    def _convert(self, units: Iterable[Unit | BadUnit], state: _Split, bar: LateProgress) -> Iterator[JsonRecord]:
        """The records of all units in order; raises at the end if they must not be written."""
        stop = self.options.on_bad == "stop"
        ids: set[int] = set()
        workers = self.options.workers or available_cores()
        with (
            ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool,
            # Enough ahead that a slow unit at the front does not leave the other workers idle.
            closing(in_order(units, lambda unit: pool.submit(self._do, unit), 4 * workers)) as worked_on,
        ):
            for unit, future in worked_on:
                self._units += 1
                bar.advance(unit.amount)
                outcome = [_repeated(part, unit.place, ids) or part for part in future.result()]
                state.bad += [part for part in outcome if isinstance(part, BadUnit)]
                if stop and len(self._bad) + len(state.bad) >= _HOPELESS:
                    self._stopped_early = True
                    break
                if not (stop and state.bad):
                    records = [part for part in outcome if not isinstance(part, BadUnit)]
                    state.records += len(records)
                    yield from records
        if stop and state.bad:
            raise _SplitHasBadUnitsError
        if not state.records:
            first = f": {state.bad[0]}" if state.bad else ""
            raise UserError(f"gives no record at all{first}", where=self._source, hint="is this the right source?")

    def _do(self, unit: Unit | BadUnit) -> _Outcome:
        if isinstance(unit, BadUnit):
            return [unit]
        try:
            return [part if isinstance(part, BadUnit) else self._checked(part, unit.place) for part in unit.work()]
        except OutputError:
            raise
        except UserError as error:
            return [BadUnit.of(unit.place, error)]
        except OSError as error:  # of the source: what cannot be written is an `OutputError`
            hint = "check its permissions and the disk"
            return [BadUnit(unit.place, f"cannot be read: {error.strerror or error}", hint)]

    def _checked(self, record: JsonRecord, place: str) -> JsonRecord | BadUnit:
        """The record if the reader that training uses takes it."""
        # Line 2, because line 1 may begin with a byte order mark.
        line = read_line(json.dumps(record), file=Path(place), line=2, special_text=self._special_text)
        if fault := next(iter(line.faults), None):
            return BadUnit(place, f"{fault.field}: {fault.what}", fault.hint)
        return record


def _repeated(part: JsonRecord | BadUnit, place: str, ids: set[int]) -> BadUnit | None:
    """What is wrong with a record whose id an earlier one has, by the hash of it (8 bytes); else its id is kept."""
    if isinstance(part, BadUnit):
        return None
    digest = hashlib.blake2b(part["id"].encode(), digest_size=8).digest()
    if (key := int.from_bytes(digest, "big")) in ids:
        return BadUnit(place, f"the id {quote(part['id'])} is that of an earlier record", "give each an id of its own")
    ids.add(key)
    return None
