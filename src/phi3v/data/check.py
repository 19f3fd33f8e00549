"""Every fault of a data file and its images, before anything is trained on them."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from phi3v.config import CACHE_LIMIT, DEFAULT_MAX_PIXELS, SHUFFLE_WINDOW
from phi3v.data.cache import cache_folder, cannot_write, content_hash, recall, remember
from phi3v.data.faults import DataFaultsError, Fault, quote
from phi3v.data.image_store import FolderStore, ImageStore
from phi3v.data.images import ImageLevel, check_image, describe_kinds, image_size
from phi3v.data.lengths import LENGTH_HINT, Context
from phi3v.data.lines import DataLines
from phi3v.data.progress import LateProgress, in_order
from phi3v.data.schema import Line, Record, SpecialText
from phi3v.data.shards.index import is_shards
from phi3v.data.shards.store import ShardStore
from phi3v.data.table import RecordTable, open_table, writing_table
from phi3v.errors import UserError
from phi3v.machine import available_cores
from phi3v.paths import shown

SizeOf = Callable[[str], tuple[int, int]]  # an image's path to its width and height


@dataclass(slots=True)
class TextStats:
    """Lengths of texts, in characters."""

    count: int = 0
    total: int = 0
    longest: int = 0
    longest_line: int = 0
    longest_id: str = ""

    def add(self, text: str, record: Record) -> None:
        """One more text."""
        self.count += 1
        self.total += len(text)
        if len(text) > self.longest:
            self.longest, self.longest_line, self.longest_id = len(text), record.line, record.id

    @property
    def mean(self) -> float:
        """0 if there is none."""
        return self.total / self.count if self.count else 0.0

    def describe(self, by_id: bool) -> str:
        """Mean and maximum in words."""
        longest = f"record {quote(self.longest_id)}" if by_id else f"line {self.longest_line}"
        return f"{self.mean:.0f} characters on average, at most {self.longest:,} ({longest})"


COUNTS = ("records", "turns", "questions", "context", "images", "image_kinds", "pairs", "ties", "good", "bad")
TEXTS = ("user", "assistant", "rejected")


@dataclass(slots=True)
class CheckReport:
    """What a check found.

    The counts are of what was read, which is not the whole file if ``stopped_early``; ``turns``,
    ``questions``, the preferences and the text lengths are of the lines without a fault of their own.

    Attributes:
        path: the data file.
        images_root: where its images were looked up.
        image_level: how closely.
        faults: in line order.
        stopped_early: there are more faults than ``faults``.
        records: lines that are not blank.
        turns: turns of all records.
        questions: turns with a text from the user (a turn may have images only).
        context: turns of weight 0, which are read and not trained on.
        images: distinct image paths.
        image_kinds: how many of them are more than decoded, by kind (`IMAGE_KINDS`; ``header`` cannot tell which are
            transparent).
        pairs: records with rejected answers.
        ties: rejected answers with the same score as the chosen one.
        good: records whose answer is labelled good.
        bad: records whose answer is labelled bad.
        user: lengths of the questions.
        assistant: lengths of the answers.
        rejected: lengths of the rejected answers.
        sha256: of the file, where `ensure_checked` made sure that this is what was checked.
    """

    path: Path
    images_root: str
    image_level: ImageLevel
    faults: list[Fault] = field(default_factory=list)
    stopped_early: bool = False
    records: int = 0
    turns: int = 0
    questions: int = 0
    context: int = 0
    images: int = 0
    image_kinds: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    ties: int = 0
    good: int = 0
    bad: int = 0
    user: TextStats = field(default_factory=TextStats)
    assistant: TextStats = field(default_factory=TextStats)
    rejected: TextStats = field(default_factory=TextStats)
    sha256: str = ""

    @property
    def ok(self) -> bool:
        """No fault was found."""
        return not self.faults

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "ok": self.ok,
            "path": shown(self.path),
            "images_root": self.images_root,
            "image_level": self.image_level,
            "faults": [fault.to_json_dict() for fault in self.faults],
            "stopped_early": self.stopped_early,
            **{name: getattr(self, name) for name in COUNTS},
            **{name: asdict(getattr(self, name)) for name in TEXTS},
        }

    def render(self, console: Console) -> None:
        """Print the faults, or the counts if there is none."""
        # As `Text`, not markup: rich would take the [0] of a field for a style.
        for fault in self.faults:
            what, _, hint = str(fault).partition("\n")
            console.print(Text(what, style="red"), soft_wrap=True)
            console.print(Text(hint), soft_wrap=True)
        if self.faults:
            found = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''} in {shown(self.path)}"
            more = "; stopped there, there are more (--max-errors shows more)" if self.stopped_early else ""
            console.print(Text(found + more, style="bold red"), soft_wrap=True)
            return
        seen = {"decode": "all decoded", "header": "headers read", "off": "not looked at"}[self.image_level]
        context = f", {self.context:,} of weight 0" if self.context else ""
        by_id = is_shards(self.path)
        lines = [
            f"{shown(self.path)}: no fault",
            f"  records    {self.records:,}",
            f"  turns      {self.turns:,} ({self.questions:,} with a question{context})",
            f"  images     {self.images:,} distinct, {seen}",
            f"  questions  {self.user.describe(by_id)}",
            f"  answers    {self.assistant.describe(by_id)}",
        ]
        if self.pairs:
            ties = f", {self.ties:,} with the score of the chosen answer" if self.ties else ""
            lines.append(f"  rejected   {self.rejected.describe(by_id)}{ties}")
            lines.append(f"  pairs      {self.pairs:,} of {self.records:,} records have rejected answers")
        if judged := self.good + self.bad:
            lines.append(f"  labels     {judged:,} of {self.records:,} records: {self.good:,} good, {self.bad:,} bad")
        if self.image_kinds:
            lines.insert(4, f"             of these {describe_kinds(self.image_kinds)}")
        console.print(Text("\n".join(lines)), soft_wrap=True)


def check_file(
    path: Path,
    *,
    max_errors: int | None = 20,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    exif_orientation: bool = True,
    image_level: ImageLevel = "decode",
    special_text: SpecialText = "refuse",
    context: Context | None = None,
    workers: int | None = None,
    images: ImageStore | None = None,
    progress: bool = True,
    cache_limit: float = CACHE_LIMIT,
    shuffle_window: int = SHUFFLE_WINDOW,
    on_record: Callable[[Record], None] | None = None,
) -> CheckReport:
    """Read a data file and each of its images once, and collect the faults.

    Args:
        path: the .jsonl file, or the folder or URL of shards, which are read one after the other.
        max_errors: stop after that many faults; None for all of them.
        max_pixels: largest width x height of an image.
        exif_orientation: whether images will be turned as their EXIF orientation says.
        image_level: ``decode`` reads every pixel, ``header`` format and size, ``off`` no image at all.
        special_text: whether literal special tokens in texts are faults.
        context: of the model; longer records are faults.
        workers: threads that read images (decoding runs outside of Python's lock); default one a core.
        images: default ``images/`` beside the file.
        progress: show a bar if it takes long and standard error is a terminal.
        cache_limit, shuffle_window: as of `open_table`.
        on_record: takes each record whose line has no fault.

    Returns:
        The report; an image that several turns name is checked, and reported, where it is named first.

    Raises:
        UserError: the file cannot be read or holds no record, or ``max_errors`` or ``workers`` is below 1.
    """
    path = Path(path)
    for name, number in (("max_errors", max_errors), ("workers", workers)):
        if number is not None and number < 1:
            raise UserError(f"must be at least 1, not {number}", where=name)
    lines: DataLines | ShardLines = DataLines(path, special_text, progress=progress)
    store = images or FolderStore.beside(path)
    if is_shards(path):
        lines = ShardLines(open_table(path, cache_limit=cache_limit, shuffle_window=shuffle_window), progress=progress)
        store = lines.table.images
    report = CheckReport(path, str(store), image_level)
    faults: list[Fault] = []
    size_of = partial(image_size, store=store, max_pixels=max_pixels, exif_orientation=exif_orientation)
    seen_images: set[str] = set()
    kinds: list[str] = []
    workers = workers or min(8, available_cores())

    def read_images(parsed: Iterable[tuple[int, Line]]) -> Iterator[tuple[int, str, str]]:
        """Line, field and path of each image, where it is named first; on the way all else that is in the lines."""
        for number, line in parsed:
            report.records += 1
            faults.extend(line.faults)
            if line.record is not None:
                _count(report, line.record)
                if on_record is not None:
                    on_record(line.record)
                if context is not None:
                    faults.extend(_length_fault(path, line.record, context, size_of))
            for where, image in line.images:
                if image not in seen_images:
                    seen_images.add(image)
                    yield number, where, image
            if max_errors is not None and len(faults) > max_errors:
                return

    def check_one(item: tuple[int, str, str]) -> tuple[str, str] | None:
        return check_image(item[2], store=store, max_pixels=max_pixels, level=image_level, kinds=kinds)

    with ThreadPoolExecutor(workers) as pool, contextlib.closing(iter(lines)) as parsed:
        named = read_images(parsed)
        if image_level == "off":
            deque(named, maxlen=0)
        else:
            # Few ahead, so that stopping is quick and memory flat.
            for (number, where, _), future in in_order(named, lambda item: pool.submit(check_one, item), 4 * workers):
                if wrong := future.result():
                    faults.append(Fault(path, number, where, *wrong))
    faults.extend(lines.repeated_ids())
    # All faults up to the last line read are known here, so the first of them are the first of the file.
    faults.sort(key=lambda fault: fault.line)
    report.faults = list(map(lines.placed, faults[:max_errors]))
    report.stopped_early = len(faults) > len(report.faults)
    report.images = len(seen_images)
    report.image_kinds = dict(Counter(kinds))
    if not exif_orientation and (turned := report.image_kinds.pop("exif_orientation", 0)):
        report.image_kinds["exif_ignored"] = turned
    return report


def ensure_checked(
    path: Path,
    *,
    max_errors: int = 20,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    exif_orientation: bool = True,
    image_level: ImageLevel = "decode",
    special_text: SpecialText = "refuse",
    images: ImageStore | None = None,
    progress: bool = True,
    cache_limit: float = CACHE_LIMIT,
    shuffle_window: int = SHUFFLE_WINDOW,
) -> CheckReport:
    """`check_file`, once for each content of a data file; what it reads becomes the table of `open_table`.

    A passed check is remembered in the cache. That is of the file, not of its images: delete one later and only loading
    it will tell. Of shards the index alone is looked at, as by `open_table`; the report has three counts.

    Raises:
        DataFaultsError: there are faults.
        UserError: as `check_file`, or the cache cannot be written.
    """
    path = Path(path)
    if is_shards(path):
        table = open_table(path, max_errors=max_errors, progress=progress)
        if isinstance(table.images, ShardStore):
            table.images.index.require_shards()
        of_shards = CheckReport(path, str(table.images), "off", records=len(table), sha256=table.sha256)
        of_shards.turns, of_shards.images = int(table.turn_counts().sum()), len(table.distinct_images()[0])
        return of_shards
    store = images or FolderStore.beside(path)
    sha256 = content_hash(path)
    folder = cache_folder(sha256, special_text)
    place = hashlib.blake2b(store.identity.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    memory = folder / f"check-{image_level}-{max_pixels}-{exif_orientation}-{place}.json"
    report = _recall(memory, path, store, image_level)
    if report is None:
        try:
            with writing_table(path, sha256, folder) as add:
                report = check_file(
                    path,
                    max_errors=max_errors,
                    max_pixels=max_pixels,
                    exif_orientation=exif_orientation,
                    image_level=image_level,
                    special_text=special_text,
                    images=store,
                    progress=progress,
                    cache_limit=cache_limit,
                    shuffle_window=shuffle_window,
                    on_record=add,
                )
                if not report.ok:
                    total = len(report.faults) + report.stopped_early
                    raise DataFaultsError(path, report.faults, total=total, exact=not report.stopped_early)
        except OSError as error:
            raise cannot_write(folder, error) from None
        remember(memory, report.to_json_dict())
    report.sha256 = sha256
    return report


class ShardLines:
    """The records of shards as the lines of a file; that they are sound was seen when their index was opened.

    Its shards are read one after the other.
    """

    def __init__(self, table: RecordTable, *, progress: bool) -> None:
        assert isinstance(table.images, ShardStore)
        self.table = table
        self.index = table.images.index
        self.progress = progress

    def __iter__(self) -> Generator[tuple[int, Line]]:
        self.table.assign_shards([[number] for number in range(len(self.table.shards))])
        with LateProgress(f"reading {self.table.path.name}", len(self.table), enabled=self.progress) as bar:
            for record in self.table:
                named = [
                    (f"conversations[{t}].images[{k}]", name)
                    for t, turn in enumerate(record.turns)
                    for k, name in enumerate(turn.images)
                ]
                yield record.line, Line(record, images=named, id=record.id)
                bar.advance(1)

    def repeated_ids(self) -> list[Fault]:
        """As of `DataLines`; there are none."""
        return []

    def placed(self, fault: Fault) -> Fault:
        """As of `DataLines`: with the shard and the record's id."""
        index, number = self.index, fault.line - 1
        record = quote(self.table[number].id)
        return replace(fault, file=Path(index.place(index.shard_of(number))), record=record)


def _recall(memory: Path, path: Path, store: ImageStore, level: ImageLevel) -> CheckReport | None:
    """The report of a passed check, if there was one."""
    known = recall(memory)
    try:
        texts = {name: TextStats(**known[name]) for name in TEXTS}
        counts: dict[str, Any] = {name: known[name] for name in COUNTS}
        return CheckReport(path, str(store), level, **(counts | texts))
    except (KeyError, TypeError):
        return None


def _length_fault(path: Path, record: Record, context: Context, size_of: SizeOf) -> Iterator[Fault]:
    """The fault of a record that is longer than the model reads; unreadable images have faults of their own."""
    sizes = None
    for variant in (record, *map(record.answered, record.rejected)):
        if not context.may_exceed(variant):
            continue
        if sizes is None:
            sizes = []
            for name in record.images:
                with contextlib.suppress(UserError):
                    sizes.append(size_of(name))
        if len(sizes) == len(record.images) and (tokens := context.count(variant, sizes)) > context.tokens:
            yield Fault(path, record.line, "conversations", context.too_long(tokens), LENGTH_HINT)
            return


def _count(report: CheckReport, record: Record) -> None:
    report.turns += len(record.turns)
    for turn in record.turns:
        report.questions += bool(turn.user.strip())
        report.context += not turn.weight
        report.user.add(turn.user, record)
        report.assistant.add(turn.assistant, record)
        report.ties += sum(score == turn.scores[0] for score in turn.scores[1:])
        for text in turn.rejected:
            report.rejected.add(text, record)
    report.pairs += bool(record.rejected)
    report.good += record.label is True
    report.bad += record.label is False
