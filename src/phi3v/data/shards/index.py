"""The index of shards: their names and hashes, the records as an Arrow table, and where each image is.

``index.json`` names the shards and the other files of the index, all with their SHA-256. Records stand shard by shard.
``images.arrow`` has a row for each image of each shard, sorted by a hash of its name, so that it is searched where it
lies, mapped into memory. Nothing in an index is run, and no name in it leaves its folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
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
from phi3v.data.image_paths import image_path_fault
from phi3v.data.jsonl import replacing, require_file
from phi3v.data.shards.remote import FetchError, Location
from phi3v.errors import UserError
from phi3v.paths import file_hash, url_of

INDEX, RECORDS, IMAGES = "index.json", "records.arrow", "images.arrow"
FORMAT, VERSION = "phi3v shards", 1

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

    @property
    def starts(self) -> list[int]:
        """The first record of each shard, and the number of all."""
        return list(accumulate((shard.records for shard in self.shards), initial=0))

    def place(self, shard: int) -> str:
        """Path or URL of a shard."""
        return self.location.place(self.shards[shard].file)

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
                table = reader.read_all()
            if table.schema.names != _IMAGE_SCHEMA.names:
                raise pa.ArrowInvalid("other columns")
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"is damaged: {error}", where=str(file), hint="make the index again") from None
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


def open_index(path: Path | str) -> ShardIndex:
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
    folder = Path(location.root)
    if location.is_remote:
        folder = cache
        try:
            with FileLock(cache / "lock"):
                for name, of_file in files.items():
                    _fetch(location, name, of_file, cache)
        except OSError as error:
            raise cannot_write(cache, error) from None
    else:
        for name, of_file in files.items():
            _verify(folder / name, of_file)
            if name not in (RECORDS, IMAGES) and not (cache / name).exists():
                with replacing(cache / name) as temporary:  # where what is derived is looked for
                    shutil.copyfile(folder / name, temporary)
    counts = tuple(name for name in files if name not in (RECORDS, IMAGES))
    index = ShardIndex(location, folder, cache, sha256, shards, counts)
    shard = index.images.places["shard"]
    if len(shard) and not 0 <= shard.min() <= shard.max() < len(shards):
        raise UserError("names shards that it does not have", where=str(folder / IMAGES), hint=_AGAIN)
    return index


_AGAIN = "copy it again, or make it again with `phi3v data shard`"


def _parse(raw: bytes, location: Location) -> tuple[tuple[Shard, ...], dict[str, Any]]:
    where = location.place(INDEX)
    try:
        content = json.loads(raw)
        if content["format"] != FORMAT:
            raise ValueError("another format")
        if content["version"] > VERSION:
            hint = "install the version that made it"
            raise UserError("was made by a newer version of phi3v", where=where, hint=hint)
        shards = tuple(Shard(**shard | {"images": tuple(shard["images"])}) for shard in content["shards"])
        files = dict(content["files"])
        sound = all(isinstance(of_file["sha256"], str) for of_file in files.values())
        sound &= all(shard.records >= 0 and shard.kind in ("tar", "parquet") for shard in shards)
        if not sound or not {RECORDS, IMAGES} <= files.keys():
            raise ValueError("no tables")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("is no index of shards", where=where, hint=_AGAIN) from None
    outside = [name for name in files if "/" in name or image_path_fault(name)]
    outside += [shard.file for shard in shards if _leaves(shard.file, location)]
    if outside:
        raise UserError(f"names a file outside of its folder: {outside[0]!r}", where=where, hint=_AGAIN)
    return shards, files


def _leaves(name: str, location: Location) -> bool:
    """Whether a shard's name leads out of the folder of an index from elsewhere; one's own may name any place."""
    if url_of(name) is not None or name.startswith("/"):
        return location.is_remote and not name.startswith(f"{location.root}/")
    return image_path_fault(name) is not None


def _fetch(location: Location, name: str, of_file: dict[str, Any], cache: Path) -> None:
    """Have a file of the index in the cache; what is there is whole."""
    file = cache / name
    if file.is_file():
        with suppress(UserError):  # of a damaged one, which is fetched again
            _verify(file, of_file)
            return
    try:
        with replacing(file) as temporary:
            location.fetch(name, temporary)
            _verify(temporary, of_file, shown=location.place(name))
    except FetchError as error:
        raise UserError(f"the index {error.what}", where=location.root, hint=error.hint) from None


def _verify(file: Path, of_file: dict[str, Any], shown: str | None = None) -> None:
    try:
        sound = file.stat().st_size == of_file["bytes"] and file_hash(file) == of_file["sha256"]
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise UserError(what, where=shown or str(file), hint=_AGAIN) from None
    if not sound:
        what = f"is not the file that {INDEX} names: its SHA-256 is another"
        raise UserError(what, where=shown or str(file), hint=_AGAIN)
