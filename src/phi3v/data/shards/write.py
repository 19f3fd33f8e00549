"""Shards made of JSONL files and their images.

Each is a tar as the ``webdataset`` library reads it: ``000000012.json`` is a record, ``000000012.0.jpg`` its first
image. Records about one page stand side by side in one shard, which has the page's image once, at the first of them.
Pages are shuffled beforehand, as those that come close together in a file are often alike.

What is in which shard follows from the data and the options, so that a command that was interrupted goes on with the
shards that are missing. ``index.json`` is written last.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout

from phi3v.config import DEFAULT_MAX_PIXELS
from phi3v.data.check import ensure_checked
from phi3v.data.image_store import faults_of
from phi3v.data.images import read_header
from phi3v.data.jsonl import replacing
from phi3v.data.lengths import measure_table, tokens_file
from phi3v.data.progress import LateProgress, in_order
from phi3v.data.record_rows import object_of, row_of, writing_records
from phi3v.data.schema import Record, SpecialText
from phi3v.data.shards.index import (
    IMAGES,
    INDEX,
    RECORDS,
    ImageRow,
    ImageTable,
    Shard,
    require_own_names,
    write_images,
    write_index,
)
from phi3v.data.table import RecordTable, open_table
from phi3v.errors import UserError
from phi3v.machine import available_cores
from phi3v.paths import cannot_write
from phi3v.processing.processor import Phi3VProcessor

PARTS = ".parts"  # what is known of the shards that are finished, until all are
_BLOCK = 512
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp"}
_ROOM = "choose a folder with room that you may write to"


@dataclass(frozen=True)
class ShardOptions:
    """How data is cut into shards.

    Attributes:
        shard_size: bytes of a shard, about.
        seed: of the order of the pages.
        special_text, max_pixels: as of `open_table`.
        workers: shards that are written at the same time; default one a core, at most 4.
        question: of samples that are there already and have an answer alone (`existing.py`).
    """

    shard_size: int = 500_000_000
    seed: int = 0
    special_text: SpecialText = "refuse"
    max_pixels: int = DEFAULT_MAX_PIXELS
    workers: int | None = None
    question: str | None = None


class Source:
    """A JSONL file that is cut: its records and, by place, the images of each."""

    def __init__(self, table: RecordTable) -> None:
        self.table = table
        self.names, places = table.distinct_images()
        stamps = table.images.stamps(self.names)
        self.sizes = stamps[:, 0]
        self.digest = hashlib.sha256(stamps.tobytes()).hexdigest()  # other images would be cut otherwise
        ends = np.cumsum(table.image_counts())
        self.images = np.split(places, ends[:-1]) if len(ends) else []

    def page(self, index: int) -> int:
        """Equal for records that begin with the same image."""
        return int(self.images[index][0]) if len(self.images[index]) else -1 - index


Address = tuple[int, int]  # a source and a record of it


def shard_data(
    files: Sequence[Path],
    out: Path,
    options: ShardOptions,
    *,
    processor: Phi3VProcessor | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Cut JSONL files into shards, with an index beside them.

    Args:
        files: the JSONL files; all their ids must differ.
        out: the folder of the shards; one with other content is refused.
        processor: also count all tokens, as its tokenizer does.

    Returns:
        Counts, as plain values.

    Raises:
        UserError: a file has faults, or the folder cannot be taken.
    """
    reading: dict[str, Any] = {"special_text": options.special_text, "max_pixels": options.max_pixels}
    checked = [ensure_checked(file, **reading, progress=progress).sha256 for file in files]
    sources = [
        Source(open_table(file, **reading, sha256=sha256, progress=progress))
        for file, sha256 in zip(files, checked, strict=True)
    ]
    _require_own_ids(sources)
    settings = {"files": checked, "images": [source.digest for source in sources], **asdict(options)}
    settings.pop("workers")
    with open_folder(out, settings):
        plan = _cut(sources, options)
        names = _image_names(sources)
        shards = _write_shards(sources, plan, names, out, options.workers, progress)
        made_of = [f"{file.name} {sha256}" for file, sha256 in zip(files, checked, strict=True)]
        _finish(sources, plan, names, shards, out, made_of, processor, progress)
    index_bytes = sum((out / name).stat().st_size for name in (INDEX, RECORDS, IMAGES))
    return {
        "out": str(out),
        "shards": len(shards),
        "records": sum(shard.records for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "index_bytes": index_bytes,
    }


@contextmanager
def open_folder(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """The folder is this command's: empty, or with what the same command has begun."""
    marker = out / PARTS / "settings.json"
    if (out / INDEX).exists() and not marker.exists():
        raise UserError("has shards already", where=str(out), hint="remove it, or name another folder")
    try:
        if not marker.exists() and out.exists() and any(entry.name != PARTS for entry in out.iterdir()):
            raise UserError("is not empty", where=str(out), hint="name a new folder")
        marker.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out / PARTS / "lock", timeout=0):
            if marker.exists() and json.loads(marker.read_text()) != json.loads(json.dumps(settings)):
                hint = "remove it, name another folder, or run the command as before"
                raise UserError("was begun with other data or options", where=str(out), hint=hint)
            with replacing(marker) as temporary:
                temporary.write_text(json.dumps(settings))
            for left in out.glob(".*.tmp"):
                left.unlink()
            yield
        shutil.rmtree(out / PARTS)
    except Timeout:
        what = "another command is writing into this folder"
        raise UserError(what, where=str(out), hint="wait for it, or stop it") from None
    except OSError as error:
        raise cannot_write(error, str(out), _ROOM) from None


def _require_own_ids(sources: Sequence[Source]) -> None:
    seen: dict[str, Path] = {}
    for source in sources if len(sources) > 1 else ():
        for name in source.table.dataset.data.column("id").to_pylist():
            if (other := seen.setdefault(name, source.table.path)) is not source.table.path:
                raise UserError(
                    f"the id {name!r} is in {other} too",
                    where=source.table.shown,
                    hint="give each record an id of its own, or cut the files into folders of their own",
                )


def _cut(sources: Sequence[Source], options: ShardOptions) -> list[list[Address]]:
    """The records of each shard. A page that is larger than a shard has one to itself."""
    pages: dict[tuple[int, int], list[Address]] = {}
    texts: list[list[int]] = []
    for number, source in enumerate(sources):
        texts.append([len(_json_of(record, {})) for record in source.table])
        for index in range(len(source.table)):
            pages.setdefault((number, source.page(index)), []).append((number, index))
    groups = list(pages.values())
    shards: list[list[Address]] = []
    used = options.shard_size
    held: set[tuple[int, int]] = set()
    for place in np.random.default_rng(options.seed).permutation(len(groups)).tolist():
        group = groups[place]
        images = {(number, int(image)) for number, index in group for image in sources[number].images[index]}
        own = sum(_in_tar(texts[number][index]) for number, index in group)
        more = own + sum(_in_tar(int(sources[number].sizes[image])) for number, image in images - held)
        if used + more > options.shard_size:
            shards.append([])
            used, held = 0, set()
            more = own + sum(_in_tar(int(sources[number].sizes[image])) for number, image in images)
        shards[-1] += group
        used += more
        held |= images
    return shards


def _in_tar(size: int) -> int:
    return _BLOCK + -(-size // _BLOCK) * _BLOCK


def _image_names(sources: Sequence[Source]) -> list[dict[str, str]]:
    """For each source the names that its images get, where they have to be others: two files' ``a.png`` may differ."""
    renamed: list[dict[str, str]] = [{} for _ in sources]
    if len(sources) == 1:
        return renamed
    first: dict[str, int] = {}
    taken = {name for source in sources for name in source.names}
    for number, source in enumerate(sources):
        store = source.table.images
        for name in source.names:
            other = first.setdefault(name, number)
            earlier = sources[other].table.images
            if store != earlier and store.sha256(name) != earlier.sha256(name):
                new = f"{number}/{name}"
                while new in taken:
                    new = f"{number}/{new}"
                taken.add(new)
                renamed[number][name] = new
    return renamed


def _write_shards(
    sources: Sequence[Source],
    plan: Sequence[Sequence[Address]],
    names: Sequence[dict[str, str]],
    out: Path,
    workers: int | None,
    progress: bool,
) -> list[Shard]:
    digits = max(5, len(str(len(plan) - 1)))
    starts = np.cumsum([0, *map(len, plan)]).tolist()
    workers = workers or min(4, available_cores())

    def write(number: int) -> Shard:
        file = out / f"{number:0{digits}d}.tar"
        part = out / PARTS / file.name
        known = read_part(part)
        if known is not None and file.is_file() and file.stat().st_size == known.bytes:
            return known
        records = [(sources[place], names[place], index) for place, index in plan[number]]
        shard, rows = _write_tar(records, starts[number], number, file)
        write_images(part.with_suffix(".arrow"), rows)
        with replacing(part.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(asdict(shard)))
        return shard

    shards = []
    with (
        ThreadPoolExecutor(workers) as pool,
        LateProgress(f"writing {len(plan):,} shards", starts[-1], enabled=progress) as bar,
    ):
        for _, future in in_order(range(len(plan)), lambda number: pool.submit(write, number), workers):
            shards.append(future.result())
            bar.advance(shards[-1].records)
    return shards


def read_part(part: Path) -> Shard | None:
    """A shard that an earlier command finished."""
    try:
        known = json.loads(part.with_suffix(".json").read_text())
        return Shard(**known | {"images": tuple(known["images"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_tar(
    records: Sequence[tuple[Source, dict[str, str], int]], first: int, number: int, file: Path
) -> tuple[Shard, list[ImageRow]]:
    rows: list[ImageRow] = []
    members: dict[str, str] = {}
    with replacing(file) as temporary:
        with temporary.open("wb") as raw:
            target = _Hashing(raw)
            with tarfile.open(fileobj=target, mode="w|", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
                for place, (source, names, index) in enumerate(records):
                    key = f"{first + place:09d}"
                    record = source.table[index]
                    for at, name in enumerate(record.images):
                        new = names.get(name, name)
                        if new in members:
                            continue
                        store = source.table.images
                        with faults_of(store.where(name)), store.open(name) as opened:
                            data = opened.read()
                        header = read_header(data, name, max_pixels=source.table.max_pixels)
                        members[new] = f"{key}.{at}.{_SUFFIXES.get(header.format, 'img')}"
                        offset = _add(tar, members[new], data)
                        sha256 = hashlib.sha256(data).digest()
                        size = (header.width, header.height, header.turned)
                        rows.append(ImageRow(new, number, offset, len(data), *size, sha256))
                    record = renamed(record, names, record.line)
                    _add(tar, f"{key}.json", _json_of(record, {name: members[name] for name in record.images}))
        shard = Shard(file.name, temporary.stat().st_size, target.hash.hexdigest(), len(records))
    return shard, rows


class _Hashing:
    """A file that is written once, and its hash."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member and return where its bytes begin."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    start = tar.offset
    tar.addfile(info, io.BytesIO(data))
    return start + _BLOCK


def _json_of(record: Record, members: dict[str, str]) -> bytes:
    """A record as a line of a data file, and the members that its images are."""
    content = object_of(row_of(record)) | ({"members": members} if members else {})
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")


def renamed(record: Record, names: dict[str, str], line: int) -> Record:
    """A record in another place of another file."""
    turns = tuple(
        replace(turn, images=tuple(names.get(name, name) for name in turn.images)) if names else turn
        for turn in record.turns
    )
    return replace(record, turns=turns, line=line)


def _finish(
    sources: Sequence[Source],
    plan: Sequence[Sequence[Address]],
    names: Sequence[dict[str, str]],
    shards: Sequence[Shard],
    out: Path,
    made_of: Sequence[str],
    processor: Phi3VProcessor | None,
    progress: bool,
) -> None:
    """Write the index."""
    addresses = enumerate((address for shard in plan for address in shard), start=1)
    records = (renamed(sources[place].table[index], names[place], line) for line, (place, index) in addresses)
    parts = [ImageTable.open((out / PARTS / shard.file).with_suffix(".arrow")) for shard in shards]
    rows = [row for part in parts for row in part.rows()]
    write_tables(out, records, rows, shards, made_of, processor, progress=progress)


def write_tables(
    out: Path,
    records: Iterable[Record],
    rows: Sequence[ImageRow],
    shards: Sequence[Shard],
    made_of: Sequence[str],
    processor: Phi3VProcessor | None = None,
    *,
    progress: bool = False,
) -> None:
    """Write the index of shards.

    Args:
        records: of all shards, in their order.
        rows: the images of all shards.
        made_of: what the shards were made of, for people.
        processor: also count all tokens, as its tokenizer does.

    Raises:
        UserError: a name stands for two images.
    """
    with replacing(out / RECORDS) as temporary, writing_records(temporary) as add:
        for record in records:
            add(record)
    require_own_names(rows, [shard.file for shard in shards], "it was changed meanwhile: name a new folder")
    write_images(out / IMAGES, rows)
    write_index(out, shards, made_of)
    if processor is not None:
        write_index(out, shards, made_of, [count_tokens(out, processor, progress)])


def count_tokens(out: Path, processor: Phi3VProcessor, progress: bool) -> str:
    """Count the tokens of all records into a file beside the index, and return its name."""
    name, table = tokens_file(processor), open_table(out)
    measure_table(table, processor, progress=progress)
    shutil.copyfile(table.folder / name, out / name)
    return name
