"""The index of shards: their names and hashes, the records as an Arrow table, and where each image is.

``index.json`` names the shards and the other files of the index, all with their SHA-256. Records stand shard by shard.
``images.arrow`` has a row for each image of each shard, sorted by a hash of its name, so that it is searched where it
lies, mapped into memory. Nothing in an index is run, and no name in it leaves its folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from phi3v.data.cache import cache_folder, cannot_write, content_hash
from phi3v.data.faults import quote
from phi3v.data.image_paths import image_path_fault
from phi3v.data.jsonl import replacing, require_file
from phi3v.data.progress import LateProgress
from phi3v.data.schema import SCHEMA_VERSION
from phi3v.data.shards.remote import FetchError, Location, has_parents
from phi3v.errors import UserError
from phi3v.paths import file_hash, url_of

INDEX, RECORDS, IMAGES = "index.json", "records.arrow", "images.arrow"
FORMAT = "phi3v shards"
# Of the index, and of what its records mean.
VERSION = [1, SCHEMA_VERSION]
AGAIN = "copy it again, or make it again with `phi3v data shard`"

Ints = npt.NDArray[np.int64]
Kind = Literal["tar", "parquet"]

_IMAGE_SCHEMA = pa.schema(
    [
        ("key", pa.uint64()),  # of the name: `name_keys`
        ("name", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("turned", pa.bool_()),  # its EXIF orientation exchanges width and height, which stand here as stored
        ("sha256", pa.binary(32)),
    ]
)


@dataclass(frozen=True)
class Shard:
    """One file of records and images.

    Attributes:
        file: its name beside the index, or a path or URL of its own.
        bytes, sha256: of that file.
        records: how many it has.
        kind: ``parquet``: offsets count in its images, one after the other (`parquet.write_images_of`).
        images: of parquet, the columns that hold them.
    """

    file: str
    bytes: int
    sha256: str
    records: int
    kind: Kind = "tar"
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageRow:
    """One image of one shard; see ``_IMAGE_SCHEMA``."""

    name: str
    shard: int
    offset: int
    size: int
    width: int
    height: int
    turned: bool
    sha256: bytes


@dataclass(frozen=True)
class ShardIndex:
    """An index that was opened.

    Attributes:
        location: where the shards are.
        folder: where the index's own files lie, on this machine.
        cache: where what is derived from this data is kept.
        sha256: of ``index.json``, and so of everything.
        shards: in the order of their records.
        token_counts: files with the lengths of the records by one tokenizer.
    """

    location: Location
    folder: Path
    cache: Path
    sha256: str
    shards: tuple[Shard, ...]
    token_counts: tuple[str, ...] = ()

    @property
    def num_records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @cached_property
    def starts(self) -> list[int]:
        """The first record of each shard, and the number of all."""
        return list(accumulate((shard.records for shard in self.shards), initial=0))

    def shard_of(self, record: int) -> int:
        """The shard of a record, from 0 in the order of all."""
        return bisect_right(self.starts, record) - 1

    def place(self, shard: int) -> str:
        """Path or URL of a shard."""
        return self.location.place(self.shards[shard].file)

    def require_shards(self) -> None:
        """Check that the shards that lie on this machine are there, as long as they were.

        Raises:
            UserError: one is not.
        """
        for number, shard in enumerate(self.shards):
            place = self.place(number)
            if url_of(place) is not None:
                continue
            try:
                size = Path(place).stat().st_size
            except OSError as error:
                raise UserError(f"cannot be read: {error.strerror}", where=place, hint=AGAIN) from None
            if size != shard.bytes:
                what = f"has {size:,} bytes, and {INDEX} says {shard.bytes:,}"
                raise UserError(what, where=place, hint=AGAIN)

    @cached_property
    def images(self) -> ImageTable:
        return ImageTable.open(self.folder / IMAGES)


class ImageTable:
    """The rows of ``images.arrow``, mapped."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.keys: npt.NDArray[np.uint64] = self.column("key")
        self.names = table.column("name").combine_chunks()

    @classmethod
    def open(cls, file: Path) -> ImageTable:
        """Map the file.

        Raises:
            UserError: it is damaged.
        """
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
                if not reader.schema.equals(_IMAGE_SCHEMA):
                    raise pa.ArrowInvalid("it has other columns")
                table = reader.read_all()
            table.validate(full=True)
        except (OSError, pa.ArrowException) as error:
            what = f"is damaged: {str(error).splitlines()[0]}"
            raise UserError(what, where=str(file), hint=AGAIN) from None
        return cls(table)

    def __len__(self) -> int:
        return len(self.keys)

    def column(self, name: str) -> Any:
        """A column of numbers as an array."""
        return self.table.column(name).combine_chunks().to_numpy(zero_copy_only=False)

    @cached_property
    def places(self) -> dict[str, Any]:
        """The columns of numbers."""
        return {name: self.column(name) for name in ("shard", "offset", "size", "width", "height", "turned")}

    def sha256(self, row: int) -> bytes:
        """The hash of an image's bytes."""
        digest: bytes = self.table.column("sha256")[row].as_py()
        return digest

    def rows(self) -> Iterator[ImageRow]:
        """All rows."""
        names = _IMAGE_SCHEMA.names[1:]
        return (ImageRow(**row) for row in self.table.select(names).to_pylist())

    def first(self, names: Sequence[str]) -> Ints:
        """(names,) the first row of each name; -1 where there is none."""
        if not len(self) or not names:
            return np.full(len(names), -1, dtype=np.int64)
        keys = name_keys(names)
        rows = np.minimum(np.searchsorted(self.keys, keys), len(self) - 1)
        same = np.asarray(pc.equal(self.names.take(pa.array(rows)), pa.array(names, pa.string())))
        found: Ints = np.where(same, rows, -1)
        for at in np.flatnonzero(~same & (self.keys[rows] == keys)).tolist():  # another name has this one's hash
            row = int(rows[at])
            while row < len(self) and self.keys[row] == keys[at]:
                if self.names[row].as_py() == names[at]:
                    found[at] = row
                    break
                row += 1
        return found

    def copies(self, name: str) -> list[int]:
        """All rows of an image, of every shard that has it."""
        row = int(self.first([name])[0])
        rows = []
        while 0 <= row < len(self.keys) and self.names[row].as_py() == name:
            rows.append(row)
            row += 1
        return rows


def name_keys(names: Sequence[str]) -> npt.NDArray[np.uint64]:
    """A number for each name, by which images are searched."""
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def require_own_names(rows: Sequence[ImageRow], files: Sequence[str], hint: str) -> None:
    """Check that no name stands for two images.

    Args:
        files: those of the shards.

    Raises:
        UserError: one does.
    """
    first: dict[str, ImageRow] = {}
    for row in rows:
        other = first.setdefault(row.name, row)
        if other.sha256 != row.sha256:
            what = f"the name {row.name!r} stands for two images, this one and one in {files[other.shard]}"
            raise UserError(what, where=files[row.shard], hint=hint)


def write_images(file: Path, rows: Sequence[ImageRow]) -> None:
    """Write ``images.arrow``."""
    keys = name_keys([row.name for row in rows])
    order = sorted(range(len(rows)), key=lambda at: (int(keys[at]), rows[at].name, rows[at].shard))
    columns: dict[str, Any] = {name: [getattr(rows[at], name) for at in order] for name in _IMAGE_SCHEMA.names[1:]}
    columns["key"] = keys[order] if order else []
    arrays = [pa.array(columns[field.name], field.type) for field in _IMAGE_SCHEMA]
    with (
        replacing(file) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, _IMAGE_SCHEMA) as writer,
    ):
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=_IMAGE_SCHEMA))


def write_index(folder: Path, shards: Sequence[Shard], made_of: Sequence[str], extra: Sequence[str] = ()) -> None:
    """Write ``index.json``, which makes the folder complete; the index's other files are there.

    Args:
        made_of: what the shards were made of, for people.
        extra: files of the index beside the two tables.
    """
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_hash(folder / name)}
        for name in (RECORDS, IMAGES, *extra)
    }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "records": sum(shard.records for shard in shards),
        "made_of": list(made_of),
        "files": files,
        "shards": [asdict(shard) for shard in shards],
    }
    with replacing(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def is_shards(path: Path | str) -> bool:
    """Whether a data path is that of shards: a URL, or a folder with an index."""
    return url_of(path) is not None or (Path(path) / INDEX).is_file()


def describe_fetching(path: Path | str) -> str | None:
    """What reading all of shards fetches, in words; none where they lie on this machine."""
    index = open_index(path)
    remote = [shard for at, shard in enumerate(index.shards) if url_of(index.place(at)) is not None]
    size = sum(shard.bytes for shard in remote)
    return f"fetching {len(remote):,} shards, {size / 1e9:,.1f} GB, of {url_of(path) or path}" if remote else None


def require_data(path: Path | str) -> None:
    """Raise `UserError` unless ``path`` is a data file that can be read, or that of shards."""
    if not is_shards(path):
        require_file(Path(path))


def data_hash(path: Path | str) -> str:
    """What tells the content of a data file, or of shards, from others; of these, the SHA-256 of the index.

    Raises:
        UserError: it cannot be read.
    """
    return open_index(path).sha256 if is_shards(path) else content_hash(Path(path))


def open_index(path: Path | str, *, progress: bool = True) -> ShardIndex:
    """Open the index of a folder or URL of shards; of a URL, it is fetched once and kept in the cache.

    Raises:
        UserError: there is none, it cannot be fetched, or it is not what it should be.
    """
    location = Location.of(path)
    try:
        raw = location.read(INDEX)
    except FetchError as error:
        made = "; shards are made by `phi3v data shard`" if "is not there" in error.what else ""
        raise UserError(f"the index {error.what}", where=location.root, hint=f"{error.hint}{made}") from None
    sha256 = hashlib.sha256(raw).hexdigest()
    shards, files = _parse(raw, location)
    cache = cache_folder(sha256, "refuse")
    folder = cache if location.is_remote else Path(location.root)
    try:
        if location.is_remote:
            _fetch_missing(location, files, cache, progress)
        for name, of_file in files.items():
            if not location.is_remote:
                _verify(folder / name, of_file)
                if name not in (RECORDS, IMAGES) and not (cache / name).exists():
                    with replacing(cache / name) as temporary:  # where what is derived is looked for
                        shutil.copyfile(folder / name, temporary)
    except OSError as error:
        raise cannot_write(cache, error) from None
    counts = tuple(name for name in files if name not in (RECORDS, IMAGES))
    return ShardIndex(location, folder, cache, sha256, shards, counts)


def _parse(raw: bytes, location: Location) -> tuple[tuple[Shard, ...], dict[str, Any]]:
    where = location.place(INDEX)
    try:
        content = json.loads(raw)
        if content["format"] != FORMAT:
            raise ValueError("another format")
        if content["version"] != VERSION:
            hint = "make it again with `phi3v data shard`, or install the version that made it"
            raise UserError("was made by another version of phi3v", where=where, hint=hint)
        shards = tuple(Shard(**shard | {"images": tuple(shard["images"])}) for shard in content["shards"])
        files = dict(content["files"])
        named = [*files.values(), *map(asdict, shards)]
        sound = all(_SHA256.fullmatch(file["sha256"]) and _is_count(file["bytes"]) for file in named)
        sound &= all(_is_count(shard.records) and shard.kind in ("tar", "parquet") for shard in shards)
        sound &= all(isinstance(name, str) for shard in shards for name in (shard.file, *shard.images))
        sound &= {RECORDS, IMAGES} <= files.keys()
        if not sound or not all(name in (RECORDS, IMAGES) or _COUNTS.fullmatch(name) for name in files):
            raise ValueError("other files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError("is no index of shards", where=where, hint=AGAIN) from None
    outside = [shard.file for shard in shards if _leaves(shard.file, location)]
    if outside:
        raise UserError(f"names a file outside of its folder: {quote(outside[0])}", where=where, hint=AGAIN)
    return shards, files


# The first names files of the cache, as do the second; so neither may be a path, or a file of ours.
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COUNTS = re.compile(r"tokens-[0-9a-f]+\.npz")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _leaves(name: str, location: Location) -> bool:
    """Whether a shard's name leads out of the folder of an index from elsewhere; one's own may name any place."""
    if has_parents(name) or "\0" in name:
        return True
    if url_of(name) is not None or name.startswith("/"):
        return location.is_remote and not name.startswith(f"{location.root}/")
    return image_path_fault(name) is not None


def _fetch_missing(location: Location, files: dict[str, Any], cache: Path, progress: bool) -> None:
    """Have the files of the index in the cache; those that are there are whole."""
    if all(_is_sound(cache / name, of_file) for name, of_file in files.items()):
        return  # a cache that others filled may be one to read only
    size = sum(of_file["bytes"] for of_file in files.values())
    about = f"fetching the index of {location.root} ({size / 1e6:,.1f} MB)"
    with FileLock(cache / "lock", mode=0o666), LateProgress(about, size, enabled=progress, told=True) as bar:
        for name, of_file in files.items():
            if _is_sound(cache / name, of_file):
                bar.advance(of_file["bytes"])
                continue
            try:
                with replacing(cache / name) as temporary:
                    expected = {"size": of_file["bytes"], "sha256": of_file["sha256"]}
                    location.fetch(name, temporary, **expected, progress=bar.advance)
            except FetchError as error:
                raise UserError(f"a file of the index {error.what}", where=location.root, hint=error.hint) from None


def _is_sound(file: Path, of_file: dict[str, Any]) -> bool:
    try:
        _verify(file, of_file)
    except UserError:
        return False
    return True


def _verify(file: Path, of_file: dict[str, Any]) -> None:
    try:
        sound = file.stat().st_size == of_file["bytes"] and file_hash(file) == of_file["sha256"]
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(file), hint=AGAIN) from None
    if not sound:
        raise UserError(f"is not the file that {INDEX} names: its SHA-256 is another", where=str(file), hint=AGAIN)
