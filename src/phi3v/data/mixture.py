"""Several data files as one table, in which the same image is one image, whichever file names it.

Records stand one source after the other. An image is named by the number of the first source that has it and by the
name that it has there (``0/page-17.png``), so that two files' ``page-17.png`` are two pages, and one page in two files
is one: the same file, or the same bytes in another folder where that was looked for.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from phi3v.config import Sources
from phi3v.data.cache import cache_root, cannot_write, recall, remember
from phi3v.data.image_store import THREADS, ImageStore
from phi3v.data.lengths import TableLengths, measure_table, page_keys
from phi3v.data.order import earlier_draws
from phi3v.data.schema import Record
from phi3v.data.table import RecordTable, open_table
from phi3v.errors import UserError

if TYPE_CHECKING:
    from phi3v.processing.processor import Phi3VProcessor

T = TypeVar("T")
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MixtureStore(ImageStore):
    """The images of several stores, by the number of a store and the name there: ``0/page-17.png``."""

    stores: tuple[ImageStore, ...]

    def __str__(self) -> str:
        return ", ".join(dict.fromkeys(map(str, self.stores)))

    @property
    def identity(self) -> str:
        return json.dumps([store.identity for store in self.stores])

    def find(self, name: str) -> tuple[ImageStore, str]:
        """The store of an image, and its name there."""
        place, _, own = name.partition("/")
        return self.stores[int(place)], own

    def where(self, name: str) -> str:
        store, own = self.find(name)
        return store.where(own)

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        store, own = self.find(name)
        return store.open(own)

    def stamps(self, names: Sequence[str]) -> Ints:
        stamps = np.full((len(names), 2), -1, dtype=np.int64)
        for place, chosen, own in self._of_stores(names):
            stamps[chosen] = self.stores[place].stamps(own)
        return stamps

    def sizes(self, names: Sequence[str], *, exif_orientation: bool) -> Ints | None:
        sizes = np.zeros((len(names), 2), dtype=np.int64)
        for place, chosen, own in self._of_stores(names):
            known = self.stores[place].sizes(own, exif_orientation=exif_orientation)
            if known is None:
                return None
            sizes[chosen] = known
        return sizes

    def shares(self, names: Sequence[str], parts: int) -> list[list[str]]:
        shares: list[list[str]] = [[] for _ in range(parts)]
        for place, _, own in self._of_stores(names):
            for share, of_store in zip(shares, self.stores[place].shares(own, parts), strict=True):
                share += [f"{place}/{name}" for name in of_store]
        return shares

    def expect(self, names: Sequence[str]) -> None:
        for place, _, own in self._of_stores(names):
            self.stores[place].expect(own)

    def _of_stores(self, names: Sequence[str]) -> Iterator[tuple[int, list[int], list[str]]]:
        """Of each store its number, the places of its images among ``names``, and what these are named there."""
        of_store: dict[str, list[int]] = {}
        for at, name in enumerate(names):
            of_store.setdefault(name.partition("/")[0], []).append(at)
        for place, chosen in of_store.items():
            yield int(place), chosen, [names[at].partition("/")[2] for at in chosen]

    def sha256(self, name: str) -> str:
        store, own = self.find(name)
        return store.sha256(own)


@dataclass(frozen=True, eq=False)
class MixtureTable(RecordTable):
    """The records of several tables; its columns are those of all.

    Attributes:
        homes: for each source, the first one that has its images in the same place.
        same: other names of images, by the names that stand for them here.
    """

    homes: tuple[int, ...] = ()
    same: dict[str, str] = field(default_factory=dict)

    @cached_property
    def starts(self) -> list[int]:
        """The index of the first record of each source, and the number of all."""
        counts = np.cumsum([0, *map(len, self.sources)])
        return [int(count) for count in counts]

    def place(self, index: int) -> tuple[int, int]:
        """The source of a record, and its index there."""
        source = bisect_right(self.starts, index) - 1
        return source, index - self.starts[source]

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.shown}")
        source, own = self.place(int(index) % len(self))
        return self._named(source, self.sources[source][own])

    def records(self, start: int, stop: int) -> list[Record]:
        found: list[Record] = []
        for source, (table, first) in enumerate(zip(self.sources, self.starts, strict=False)):
            own = range(len(table))[max(0, start - first) : max(0, stop - first)]
            if own:
                found += [self._named(source, record) for record in table.records(own.start, own.stop)]
        return found

    def as_written(self, index: int) -> Record:
        source, own = self.place(index)
        return self.sources[source][own]

    def all_as_written(self) -> Iterator[Record]:
        return chain.from_iterable(self.sources)

    def distinct_images(self) -> tuple[list[str], Ints]:
        numbers: dict[str, int] = {}
        places = []
        for source, table in enumerate(self.sources):
            names, used = table.distinct_images()
            own = [numbers.setdefault(self._name(source, name), len(numbers)) for name in names]
            places.append(np.array(own, dtype=np.int64)[used])
        return list(numbers), np.concatenate(places)

    def read_images(self, record: Record, take: Callable[..., T]) -> list[T]:
        return super().read_images(record, _by_own_name(take))

    def assign_shards(self, own: Sequence[Sequence[int]]) -> None:
        """Those of all sources are numbered through, as of `Mixed`."""
        of_stores: dict[int, list[list[int]]] = {}
        first = 0
        for home, table in zip(self.homes, self.sources, strict=True):
            numbers = range(first, first + len(table.shards))
            first = numbers.stop
            of_store = of_stores.setdefault(home, [[] for _ in own])
            for into, window in zip(of_store, own, strict=True):
                into += [shard - numbers.start for shard in window if shard in numbers]
        for home, windows in of_stores.items():
            self.sources[home].assign_shards(list(filter(None, windows)))

    def of_image(self, take: Callable[..., T], name: str) -> T:
        return super().of_image(_by_own_name(take), name)

    def join_lengths(self, measured: Sequence[TableLengths]) -> TableLengths:
        """The lengths of all records.

        Args:
            measured: those of each source.
        """
        arrays = {name: np.concatenate([getattr(each, name) for each in measured]) for name in _JOINED}
        counts = [int(each.pages.max(initial=-1)) + 1 for each in measured]
        pages = np.concatenate(
            [each.pages + start for each, start in zip(measured, np.cumsum([0, *counts]), strict=False)]
        )
        return TableLengths(**arrays, pages=self._same_pages(TableLengths(**arrays, pages=pages)))

    def _same_pages(self, lengths: TableLengths) -> Ints:
        """The pages of all turns, where those that several sources have are one."""
        names, used = self.distinct_images()
        record_of_image = lengths.image_record
        source_of_image = np.searchsorted(self.starts, record_of_image, side="right")
        in_sources = np.unique(used * (len(self.sources) + 1) + source_of_image) // (len(self.sources) + 1)
        sources_of_name = np.bincount(in_sources, minlength=len(names))
        shared = np.unique(record_of_image[sources_of_name[used] > 1])
        pages, first_turn = lengths.pages.copy(), lengths.first_turn
        numbers: dict[bytes, int] = {}
        same: dict[int, int] = {}
        for index in shared.tolist():
            first = first_turn[index]
            for turn, key in enumerate(page_keys(self[index]), first):
                page = int(pages[turn])
                same[page] = numbers.setdefault(key, page)
        known = np.arange(int(pages.max(initial=-1)) + 1)
        known[list(same)] = list(same.values())
        return known[pages]

    def _name(self, source: int, name: str) -> str:
        named = f"{self.homes[source]}/{name}"
        return self.same.get(named, named)

    def _named(self, source: int, record: Record) -> Record:
        turns = tuple(
            replace(turn, images=tuple(self._name(source, name) for name in turn.images)) if turn.images else turn
            for turn in record.turns
        )
        return replace(record, turns=turns)


def measure(table: RecordTable, processor: Phi3VProcessor | None, **settings: Any) -> TableLengths:
    """`measure_table`; of a mixture from what is kept of its sources."""
    if not isinstance(table, MixtureTable):
        return measure_table(table, processor, **settings)
    return table.join_lengths([measure_table(source, processor, **settings) for source in table.sources])


def take_lengths(lengths: TableLengths, records: Ints) -> TableLengths:
    """Those of some records, in that order; one that comes again shares no page with itself, as in `BatchPlan`."""
    turns = _runs(lengths.turns, records)
    times = np.repeat(earlier_draws(records), lengths.turns[records])
    images, answers = _runs(lengths.images, turns), _runs(lengths.alternatives, records)
    of_records = {name: getattr(lengths, name)[records] for name in ("text", "targets", "turns", "alternatives")}
    of_turns = {name: getattr(lengths, name)[turns] for name in ("prompts", "prefixes", "pages", "images")}
    of_turns["pages"] = of_turns["pages"] + times * (int(lengths.pages.max(initial=0)) + 1)
    return TableLengths(**of_records, **of_turns, answers=lengths.answers[answers], sizes=lengths.sizes[images])


def _runs(counts: Ints, chosen: Ints) -> Ints:
    """The places of the items of some owners, who have so many each, one owner after the other."""
    starts, of_chosen = (np.cumsum(counts) - counts)[chosen], counts[chosen]
    first = np.cumsum(of_chosen) - of_chosen
    places: Ints = np.repeat(starts - first, of_chosen) + np.arange(int(of_chosen.sum()))
    return places


_JOINED = ("text", "targets", "turns", "prompts", "prefixes", "images", "answers", "alternatives", "sizes")


def _by_own_name(take: Callable[..., T]) -> Callable[..., T]:
    """``take`` of an image, whose faults tell its name in its own source."""

    def named(name: str, **settings: Any) -> T:
        try:
            return take(name, **settings)
        except UserError as error:
            own = name.partition("/")[2]
            raise error.told(what=error.what.replace(name, own)) from None

    return named


def mix_tables(tables: Sequence[RecordTable], names: Sequence[str], *, compare_images: bool = False) -> MixtureTable:
    """One table of several.

    Args:
        compare_images: whether an image in two folders with the same bytes is one image; files of equal size are read
            for it once, and what was found is kept.

    Raises:
        UserError: the cache cannot be written.
    """
    import datasets  # takes a second

    first = tables[0]
    places = [table.images.identity for table in tables]
    homes = tuple(places.index(place) for place in places)
    digest = hashlib.blake2b(json.dumps([table.folder.name for table in tables] + places).encode(), digest_size=16)
    folder = cache_root() / f"mixture-{digest.hexdigest()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    store = MixtureStore(tuple(table.images for table in tables))
    return MixtureTable(
        datasets.concatenate_datasets([table.dataset for table in tables]),
        Path(", ".join(str(table.path) for table in tables)),
        store,
        first.max_pixels,
        first.exif_orientation,
        " ".join(table.sha256 for table in tables),
        folder,
        sources=tuple(tables),
        names=tuple(names),
        homes=homes,
        same=_same_images(tables, homes, store, folder / "same-images.json") if compare_images else {},
    )


def _same_images(
    tables: Sequence[RecordTable], homes: Sequence[int], store: MixtureStore, memory: Path
) -> dict[str, str]:
    """Images of a home that an earlier one has too, by their names in the mixture, with the earlier ones."""
    if len(set(homes)) == 1:
        return {}
    own = [table.distinct_images()[0] for table in tables]
    names = list(
        dict.fromkeys(f"{home}/{name}" for home, of_table in zip(homes, own, strict=True) for name in of_table)
    )
    stamps = store.stamps(names)
    state = hashlib.blake2b(json.dumps([names, stamps.tolist()]).encode(), digest_size=16).hexdigest()
    known = recall(memory)
    if known.get("of") == state:
        same: dict[str, str] = known["same"]
        return same
    sizes = stamps[:, 0].tolist()
    homes_of_size = Counter(
        size for size, _ in {(size, name.partition("/")[0]) for size, name in zip(sizes, names, strict=True)}
    )
    alike = [name for size, name in zip(sizes, names, strict=True) if size >= 0 and homes_of_size[size] > 1]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(store.digest, alike))
    first: dict[str, str] = {}
    same = {}
    for name, digest in zip(alike, digests, strict=True):
        if digest is None:
            continue
        kept = first.setdefault(digest, name)
        if kept.partition("/")[0] != name.partition("/")[0]:
            same[name] = kept
    remember(memory, {"of": state, "same": same})
    return same


def open_sources(
    data: Sources, hashes: Sequence[str | None] | None = None, *, compare_images: bool = False, **reading: Any
) -> RecordTable:
    """The table of a file, or of several.

    Args:
        hashes: the content that is wanted of each, as of `open_table`.
        compare_images: as of `mix_tables`.
        reading: settings of `open_table`.

    Raises:
        UserError: as `open_table`.
    """
    if isinstance(data, str):
        return open_table(Path(data), sha256=hashes[0] if hashes else None, **reading)
    sources = data or []
    tables = [
        open_table(Path(source.path), sha256=sha256, **reading)
        for source, sha256 in zip(sources, hashes or [None] * len(sources), strict=True)
    ]
    return mix_tables(tables, [source.name for source in sources], compare_images=compare_images)
