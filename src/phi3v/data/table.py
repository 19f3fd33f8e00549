"""Reading a data file lazily: parsed once, memory-mapped from then on.

The first opening streams the JSONL into an Arrow file in the cache (`cache.py`), batch by batch. Every
opening maps that file, so that memory grows neither with the file nor with the number of worker processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from PIL import Image

from phi3v.config import CACHE_LIMIT, DEFAULT_MAX_PIXELS, SHUFFLE_WINDOW
from phi3v.data.cache import cache_folder, cannot_write, changed, content_hash, recall, remember
from phi3v.data.faults import DataFaultsError, Fault, quote
from phi3v.data.image_store import FolderStore, ImageStore
from phi3v.data.images import image_size, load_image
from phi3v.data.jsonl import replacing
from phi3v.data.lines import DataLines
from phi3v.data.record_rows import open_records, record_of, writing_records
from phi3v.data.schema import Record, SpecialText
from phi3v.data.shards.index import RECORDS, is_shards, open_index
from phi3v.data.shards.store import ShardStore
from phi3v.data.shards.verify import verify_index
from phi3v.errors import UserError
from phi3v.paths import shown

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class RecordTable:
    """The records of a data file, read from the disk one by one as they are asked for.

    Opened by `open_table`. May be pickled and sent to worker processes: the file is mapped again there.

    Attributes:
        dataset: the mapped Arrow file.
        path: the data file.
        images: where those come from that the records name.
        max_pixels: the limit of `load_images`.
        exif_orientation: whether images are turned as their EXIF orientation says.
        sha256: of the file's content, when it was parsed.
        folder: where what is derived from this content is kept.
        shards: of shards, how many records each has; they stand one shard after the other.
        sources: of a mixture (`mixture.py`), the tables that it is made of; otherwise none.
        names: of these.
    """

    dataset: datasets.Dataset
    path: Path
    images: ImageStore
    max_pixels: int
    exif_orientation: bool
    sha256: str
    folder: Path
    shards: tuple[int, ...] = ()
    sources: tuple[RecordTable, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The file or the URL, for a message; of a mixture all of them."""
        return ", ".join(table.shown for table in self.sources) or shown(self.path)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        """Record ``index``, from 0 in the order of the file; negative ones count from the end.

        Raises:
            IndexError: there is no such record.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.shown}")
        return record_of(self.dataset[int(index)], self.path)

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), 1000):
            yield from self.records(start, start + 1000)

    def records(self, start: int, stop: int) -> list[Record]:
        """The records of a range, read faster than one by one."""
        rows = self.dataset.with_format("arrow")[start : min(stop, len(self))].to_pylist()
        return [record_of(row, self.path) for row in rows]

    def as_written(self, index: int) -> Record:
        """Record ``index`` as its file has it; in a mixture the images of records have other names."""
        return self[index]

    def line_of(self, record: Record) -> str:
        """The line of a record, in words; in a mixture or shards as `where`."""
        return self.where(record) if self.sources or self.shards else f"line {record.line}"

    def all_as_written(self) -> Iterator[Record]:
        """`as_written` of all records, read faster than one by one."""
        return iter(self)

    def sources_of(self, indices: npt.NDArray[np.int64]) -> list[int]:
        """The source of each of some records, where the table is a mixture; otherwise none."""
        starts = np.cumsum(list(map(len, self.sources)))
        sources: list[int] = np.searchsorted(starts, indices, side="right").tolist()
        return sources if self.sources else []

    def where(self, record: Record) -> str:
        """File and line of a record of this table, for a message; of shards the shard and its id."""
        source = next((table for table in self.sources if table.path == record.file), self)
        return where_of(record, source.path, source.images)

    def questions(self) -> npt.NDArray[np.int64]:
        """(questions, 2) record and turn of every turn with a weight, without reading the texts."""
        of_records = self.dataset.data.column("questions").combine_chunks()
        records = np.repeat(np.arange(len(self)), np.asarray(pc.list_value_length(of_records)))
        return np.stack([records, np.asarray(of_records.flatten())], axis=1).astype(np.int64)

    def image_counts(self) -> npt.NDArray[np.int32]:
        """(records,) number of images of each record, without reading the texts."""
        return np.asarray(self.dataset.data.column("num_images")).astype(np.int32)

    def rejected_counts(self) -> npt.NDArray[np.int32]:
        """(records,) number of rejected answers of each record, without reading the texts."""
        return np.asarray(self.dataset.data.column("num_rejected")).astype(np.int32)

    def labels(self) -> npt.NDArray[np.int8]:
        """(records,) 1 where the last answer is labelled good, 0 where bad, -1 where it has no label."""
        return np.asarray(self.dataset.data.column("label").cast(pa.int8()).fill_null(-1)).astype(np.int8)

    def turn_counts(self) -> npt.NDArray[np.int64]:
        """(records,) number of turns of each record, without reading the texts."""
        return np.asarray(pc.list_value_length(self.dataset.data.column("turns"))).astype(np.int64)

    def turn_image_counts(self) -> npt.NDArray[np.int64]:
        """(turns,) number of images of each turn of all records."""
        return np.asarray(pc.list_value_length(self._image_lists())).astype(np.int64)

    def distinct_images(self) -> tuple[list[str], npt.NDArray[np.int64]]:
        """The names of all images, each once, and the place among them of each image of all turns."""
        names = pc.list_flatten(self._image_lists()).combine_chunks().dictionary_encode()
        return names.dictionary.to_pylist(), np.asarray(names.indices).astype(np.int64)

    def _image_lists(self) -> pa.ChunkedArray:
        return pc.struct_field(pc.list_flatten(self.dataset.data.column("turns")), "images")

    def load_images(self, record: Record) -> list[Image.Image]:
        """The images of all turns of a record as RGB, in order.

        Raises:
            UserError: an image cannot be used; names the record and the field.
        """
        return self.read_images(record, load_image)

    def image_sizes(self, record: Record) -> list[tuple[int, int]]:
        """(width, height) of the images of all turns of a record, from their headers alone; raises as `load_images`."""
        return self.read_images(record, image_size)

    def assign_shards(self, own: Sequence[Sequence[int]]) -> None:
        """Of shards, say which this process reads whole; see `ShardStore.assign`."""
        if isinstance(self.images, ShardStore):
            self.images.assign(own)

    def expect(self, records: Sequence[int]) -> None:
        """Say that this process is going to read the images of these records in this order; see `ImageStore.expect`."""
        names, used = self.distinct_images()
        counts = self.image_counts().astype(np.int64)
        with_images = np.array(records, dtype=np.int64)
        with_images = with_images[counts[with_images] > 0]
        first = used[(np.cumsum(counts) - counts)[with_images]]
        self.images.expect([names[place] for place in dict.fromkeys(first.tolist())])

    def read_images(self, record: Record, take: Callable[..., T]) -> list[T]:
        """``take(name, store=…, max_pixels=…, exif_orientation=…)`` of every image of a record, in order.

        Raises:
            UserError: as `load_images`.
        """
        settings = {"max_pixels": self.max_pixels, "exif_orientation": self.exif_orientation}
        return read_images(record, take, where=self.where(record), store=self.images, **settings)

    def of_image(self, take: Callable[..., T], name: str) -> T:
        """``take`` of one image, as in `read_images`."""
        return take(name, store=self.images, max_pixels=self.max_pixels, exif_orientation=self.exif_orientation)


def where_of(record: Record, path: Path, images: ImageStore) -> str:
    """`RecordTable.where` of a record of a file or shards with these images."""
    if isinstance(images, ShardStore):
        return f"{images.index.place(images.index.shard_of(record.line - 1))}: record {quote(record.id)}"
    return f"{path}:{record.line}"


def read_images(record: Record, take: Callable[..., T], *, where: str, store: ImageStore, **settings: Any) -> list[T]:
    """``take(name, store=…, **settings)`` of every image of a record, in order.

    Args:
        where: the record is, for a message.

    Raises:
        UserError: an image cannot be used; names the record and the field.
    """
    taken = []
    for t, turn in enumerate(record.turns):
        for k, name in enumerate(turn.images):
            try:
                taken.append(take(name, store=store, **settings))
            except UserError as error:
                place = f"{where}: conversations[{t}].images[{k}]"
                raise error.told(where=place) from None
    return taken


def open_table(
    path: Path,
    *,
    special_text: SpecialText = "refuse",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    exif_orientation: bool = True,
    max_errors: int = 20,
    images: ImageStore | None = None,
    sha256: str | None = None,
    progress: bool = True,
    cache_limit: float = CACHE_LIMIT,
    shuffle_window: int = SHUFFLE_WINDOW,
) -> RecordTable:
    """Open a data file; the first time it is parsed and every line is validated (images are not read).

    Of shards, in a folder or at a URL, the index alone is read.

    Several processes may open the same file at once: one parses, the others wait for it.

    Args:
        path: the .jsonl file, or the folder or URL of shards.
        special_text: whether literal special tokens in texts are faults or are escaped.
        max_pixels: limit for the images that the table loads.
        exif_orientation: whether it turns them as their EXIF orientation says.
        max_errors: how many faults the error lists.
        images: default ``images/`` beside the file.
        sha256: the content that is wanted, as `ensure_checked` found it; default: what the file has now.
        progress: show a bar if parsing takes long and standard error is a terminal.
        cache_limit: GB that shards from elsewhere may take on this machine's disk.
        shuffle_window: shards that are read at the same time.

    Raises:
        DataFaultsError: lines are wrong; lists the first ``max_errors`` faults and counts them all.
        UserError: the file cannot be read, holds no record or changed meanwhile; or the cache cannot be
            written.
    """
    path = Path(path)
    if is_shards(path):
        reading = {"max_pixels": max_pixels, "exif_orientation": exif_orientation}
        return _open_shards(path, sha256, cache_limit, shuffle_window, max_errors, progress, **reading)
    sha256 = sha256 or content_hash(path)
    folder = cache_folder(sha256, special_text)
    dataset = open_cached(folder)
    if dataset is None:
        try:
            # The lock only saves the others the work; what makes this safe is that files appear complete.
            with FileLock(folder / "lock"):
                dataset = open_cached(folder)
                if dataset is None:
                    _build(path, sha256, folder, special_text, max_errors, progress)
                    dataset = open_cached(folder)
        except OSError as error:
            raise cannot_write(folder, error) from None
        if dataset is None:
            raise RuntimeError(f"the table that was just written cannot be read: {folder}")
    return RecordTable(dataset, path, images or FolderStore.beside(path), max_pixels, exif_orientation, sha256, folder)


def _open_shards(
    path: Path,
    sha256: str | None,
    cache_limit: float,
    window: int,
    max_errors: int,
    progress: bool,
    **reading: Any,
) -> RecordTable:
    index = open_index(path, progress=progress)
    if sha256 is not None and sha256 != index.sha256:
        raise changed(path)
    if not index.num_records:
        raise UserError("holds no record", where=index.location.root, hint="were the shards made of the right files?")
    verify_index(index, max_errors=max_errors, progress=progress)
    dataset = open_records(index.folder / RECORDS)
    store = ShardStore(index, cache_limit=round(cache_limit * 1e9), window=window)
    counts = tuple(shard.records for shard in index.shards)
    return RecordTable(dataset, path, store, **reading, sha256=index.sha256, folder=index.cache, shards=counts)


def images_of(path: Path) -> ImageStore:
    """The images of a data file, or of shards."""
    return open_table(path).images if is_shards(path) else FolderStore.beside(path)


def open_cached(folder: Path) -> datasets.Dataset | None:
    """The table if the cache has it whole, else None: a partial or damaged one is as good as none."""
    arrow = folder / "records.arrow"
    try:
        expected = recall(folder / "records.json")
        if arrow.stat().st_size != expected["bytes"]:
            return None
        dataset = open_records(arrow)
        return dataset if len(dataset) == expected["records"] else None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _build(path: Path, sha256: str, folder: Path, special_text: SpecialText, max_errors: int, progress: bool) -> None:
    """Parse the file into the table.

    Raises:
        DataFaultsError: lines are wrong.
    """
    faults: list[Fault] = []
    total = 0
    lines = DataLines(path, special_text, progress=progress)
    with writing_table(path, sha256, folder) as add:
        for _, line in lines:
            total += len(line.faults)
            faults.extend(line.faults[: max_errors - len(faults)])
            if line.record is not None and not total:
                add(line.record)
        repeated = lines.repeated_ids()
        if total + len(repeated):
            first = sorted([*faults, *repeated], key=lambda fault: fault.line)[:max_errors]
            raise DataFaultsError(path, first, total=total + len(repeated))


@contextlib.contextmanager
def writing_table(path: Path, sha256: str, folder: Path) -> Iterator[Callable[[Record], None]]:
    """Takes all records of a file in order; if the block ends without an error, the table is there.

    Raises:
        UserError: the file's content is no longer the one of ``sha256``.
    """
    records = 0
    with replacing(folder / "records.arrow") as temporary:
        with writing_records(temporary) as write:

            def add(record: Record) -> None:
                nonlocal records
                write(record)
                records += 1

            yield add
        if content_hash(path) != sha256:
            raise changed(path)
        size = temporary.stat().st_size
    # Says that the table is complete.
    remember(folder / "records.json", {"records": records, "bytes": size, "file": str(path.absolute())})
