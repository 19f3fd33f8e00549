"""An index of tar and parquet files that are there already, which stay as and where they are.

A sample of a tar is the members that have all but their endings in common (WebDataset): images, and ``.json`` or
``.txt`` beside them; a row of parquet holds its images' bytes. What is in it is read as the converters read it: our own
records, chats (`sources/chats.py`), questions with answers, or with ``question`` given, texts alone
(`sources/csv_table.py`). Nothing of a tar is unpacked, and no member's name is used as a path.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from phi3v.data.image_paths import image_path_fault
from phi3v.data.images import UNREADABLE_SUFFIXES, decode_image, read_header
from phi3v.data.jsonl import replacing
from phi3v.data.progress import LateProgress
from phi3v.data.record_rows import map_records, writing_records
from phi3v.data.schema import Record, read_line
from phi3v.data.shards.index import (
    IMAGES,
    INDEX,
    RECORDS,
    ImageRow,
    ImageTable,
    Kind,
    Shard,
    require_own_names,
    write_images,
    write_index,
)
from phi3v.data.shards.parquet import image_columns, images_of, rows_of
from phi3v.data.shards.remote import FetchError, Location, filesystem
from phi3v.data.shards.write import PARTS, ShardOptions, count_tokens, open_folder, read_part
from phi3v.data.sources.chats import record_of_chat
from phi3v.data.sources.csv_table import record_of_row
from phi3v.data.sources.media import Medium
from phi3v.data.sources.records import OwnDataOptions, RawRecord, RawTurn, json_record
from phi3v.errors import UserError
from phi3v.paths import file_hash, url_of
from phi3v.processing.processor import Phi3VProcessor

KINDS = (".tar", ".parquet")
# What Pillow may know as an image, which then is read or refused; never left out.
_IMAGES = UNREADABLE_SUFFIXES | {".img", *Image.registered_extensions()} - {".h5", ".hdf", ".mpg", ".mpeg"}
_CHAT_KEYS = ("conversations", "messages", "chosen", "completion")
_APART = "if these are two data sets, index each by itself and train on a list of both; otherwise correct the samples"
_FORMS = "a chat, a question and an answer, or a text for which --question gives the question"


class Sample:
    """The images and fields of a sample.

    Attributes:
        key: tells it from others of its shard.
        fields: what it says beside its images.
        images: the rows of its images, with their bytes.
        others: members that are neither, which are left out.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.fields: dict[str, Any] = {}
        self.images: list[tuple[ImageRow, bytes]] = []
        self.others: list[str] = []


def index_existing(
    sources: Sequence[str],
    out: Path,
    options: ShardOptions,
    *,
    processor: Phi3VProcessor | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the index of shards.

    Args:
        sources: tar or parquet files, folders of these, or their URLs.
        out: the folder of the index.

    Returns:
        Counts, as plain values.

    Raises:
        UserError: a file cannot be read, a sample is bad, or the folder cannot be taken.
    """
    files = [file for source in sources for file in _files(source)]
    settings = {"files": files, **asdict(options)}
    with open_folder(out, settings):
        shards: list[Shard] = []
        done = 0
        with LateProgress(f"indexing {len(files):,} shards", len(files), enabled=progress) as bar:
            for number, file in enumerate(files):
                part = out / PARTS / f"{number:05d}"
                shard = read_part(part) or _index_one(file, number, done, part, options)
                shards.append(shard)
                done += shard.records
                bar.advance(1)
        parts = [out / PARTS / f"{number:05d}" for number in range(len(files))]
        _join(parts, out / RECORDS)
        _require_own_ids(out / RECORDS, shards)
        rows = [row for part in parts for row in ImageTable.open(part.with_suffix(".arrow")).rows()]
        require_own_names(rows, files, _APART)
        write_images(out / IMAGES, rows)
        write_index(out, shards, files)
        if processor is not None:
            write_index(out, shards, files, [count_tokens(out, processor, progress)])
    return {
        "out": str(out),
        "shards": len(shards),
        "records": done,
        "bytes": sum(shard.bytes for shard in shards),
        "index_bytes": sum((out / name).stat().st_size for name in (INDEX, RECORDS, IMAGES)),
    }


def _files(source: str) -> list[str]:
    """The shards that a source names; of a folder all of them, in the order of their names."""
    url = url_of(source)
    hint = "name .tar or .parquet files, or a folder of these; unpack .tar.gz first"
    if source.endswith(KINDS):
        return [url or str(Path(source).absolute())]
    if url is not None:
        files, inner = filesystem(url)
        found = sorted(name for name in files.ls(inner, detail=False) if name.endswith(KINDS))
        names = [f"{url.rstrip('/')}/{name.rpartition('/')[2]}" for name in found]
    else:
        names = sorted(str(file.absolute()) for file in Path(source).glob("*") if file.suffix in KINDS)
    if not names:
        raise UserError("no tar or parquet files there", where=source, hint=hint)
    return names


def _index_one(file: str, number: int, done: int, part: Path, options: ShardOptions) -> Shard:
    kind: Kind = "tar" if file.endswith(".tar") else "parquet"
    rows: list[ImageRow] = []
    count = 0
    with _at_hand(file, part) as local, writing_records(part.with_suffix(".records")) as add:
        columns: tuple[str, ...] = ()
        if kind == "parquet":
            columns = _columns(local, file)
        samples = _tar_samples(local, number, file) if kind == "tar" else _parquet_samples(local, number, columns)
        known: dict[str, str] = {}
        for sample in samples:
            for row, data in sample.images:
                header = _header(data, f"{file}: {row.name[6:]}", options.max_pixels)
                own = {member: name for name, member in sample.fields.get("members", {}).items()}
                named = replace(row, name=own.get(PurePosixPath(row.name).name, row.name), **header)
                known[row.name] = named.name
                rows.append(named)
            named_by_records: set[str] = set()
            for record in _records(sample, known, file, done + count, options):
                named_by_records.update(record.images)
                add(record)
                count += 1
            _require_all_images(sample, known, named_by_records, file)
        shard = Shard(file, local.stat().st_size, file_hash(local), count, kind, columns)
    write_images(part.with_suffix(".arrow"), rows)
    with replacing(part.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(asdict(shard)))
    return shard


def _require_all_images(sample: Sample, known: Mapping[str, str], named: Collection[str], file: str) -> None:
    """Check that nothing that may be an image of a sample stays unseen."""
    contents = {row.sha256 for row, _ in sample.images}  # two of one content have one name
    seen = {row.sha256 for row, _ in sample.images if known[row.name] in named}
    if seen != contents:
        what = f"has {len(contents)} images, and its records name {len(seen)} of them"
        raise UserError(what, where=f"{file}: {sample.key}", hint='name them in "images", or take them out')
    if sample.others and not sample.images:
        what = f"has no image, and a member that is none by its ending: {sample.others[0]}"
        hint = "give images their usual endings, such as .jpg or .png, or take such members out"
        raise UserError(what, where=f"{file}: {sample.key}", hint=hint)


@contextmanager
def _at_hand(file: str, part: Path) -> Iterator[Path]:
    """A shard on this machine: where it lies, or fetched for a while."""
    if url_of(file) is None:
        if not Path(file).is_file():
            raise UserError("no such file", where=file, hint="check the path")
        yield Path(file)
        return
    local = part.with_suffix(".fetched")
    try:
        Location.of(file.rpartition("/")[0]).fetch(file, local)
        yield local
    except FetchError as error:
        raise UserError(f"the shard {error.what}", where=file, hint=error.hint) from None
    finally:
        local.unlink(missing_ok=True)


def _header(data: bytes, name: str, max_pixels: int) -> dict[str, Any]:
    try:
        header = read_header(data, name.rpartition("/")[2], max_pixels=max_pixels)
        decode_image(data, name.rpartition("/")[2], max_pixels=max_pixels)  # training relies on it
    except UserError as error:
        raise UserError(error.what, where=name, hint=error.hint) from None
    return {"width": header.width, "height": header.height, "turned": header.turned}


def _row(name: str, number: int, place: int, offset: int, data: bytes) -> ImageRow:
    """The row of an image before its size is known; a name that is no usable one is replaced."""
    safe = f"{number:05d}/{name}"
    if image_path_fault(safe):
        safe = f"{number:05d}/{place:09d}.img"
    return ImageRow(safe, number, offset, len(data), 0, 0, False, hashlib.sha256(data).digest())


def _tar_samples(local: Path, number: int, file: str) -> Iterator[Sample]:
    sample: Sample | None = None
    place = 0
    try:
        with tarfile.open(local, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = Sample(key)
                opened = tar.extractfile(member)
                data = opened.read() if opened is not None else b""
                suffix = f".{ending.rpartition('.')[2].lower()}"
                if suffix == ".json":
                    sample.fields |= _object(data, f"{file}: {member.name}")
                elif suffix == ".txt":
                    sample.fields.setdefault("answer", data.decode("utf-8", "replace").strip())
                elif suffix in _IMAGES:
                    sample.images.append((_row(member.name, number, place, member.offset_data, data), data))
                    place += 1
                else:
                    sample.others.append(member.name)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"cannot be read as a tar file: {error}", where=file, hint="copy it again") from None
    if sample is not None:
        yield sample


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is no JSON: {error}", where=where, hint="correct the sample") from None
    if not isinstance(content, dict):
        raise UserError("is no JSON object", where=where, hint=_FORMS)
    return content


def _columns(local: Path, file: str) -> tuple[str, ...]:
    try:
        columns = image_columns(pq.read_schema(local))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot be read as parquet: {error}", where=file, hint="copy it again") from None
    if not columns:
        hint = "tables that name image files are for `phi3v data convert csv`"
        raise UserError("has no column with the bytes of images", where=file, hint=hint)
    return columns


def _parquet_samples(local: Path, number: int, columns: Sequence[str]) -> Iterator[Sample]:
    offset = place = 0
    for index, row in enumerate(rows_of(local)):
        sample = Sample(f"{index:09d}")
        for column in columns:
            for data in images_of(row.pop(column)):
                sample.images.append((_row(f"{place:09d}.img", number, place, offset, data), data))
                offset += len(data)
                place += 1
        sample.fields = {name: value for name, value in row.items() if value is not None}
        yield sample


def _records(
    sample: Sample, known: Mapping[str, str], file: str, first: int, options: ShardOptions
) -> Iterator[Record]:
    """The records of a sample.

    Args:
        known: names of images by those of their rows.
        first: records before it.
    """
    where = f"{file}: {sample.key}"
    own = sample.fields.get("conversations")
    if isinstance(own, list) and own and isinstance(own[0], dict) and "assistant" in own[0]:
        lines = [{key: value for key, value in sample.fields.items() if key != "members"}]
    else:
        try:
            raws = _raw_records(sample, options)
        except UserError as error:
            place = f"{where}: {error.where}" if error.where else where
            raise UserError(error.what, where=place, hint=f"{error.hint or ''}; a sample holds {_FORMS}") from None
        names = {Medium("image", data=data): [known[row.name]] for row, data in sample.images}
        lines = []
        for k, raw in enumerate(raws):
            name = f"{PurePosixPath(file).stem}/{raw.id or sample.key}" + (f"-{k}" if len(raws) > 1 else "")
            record = json_record(replace(raw, id=name), names, None, escape=options.special_text == "escape")
            lines.append({key: value for key, value in record.items() if value is not None})
    for k, content in enumerate(lines):
        line = read_line(json.dumps(content), file=Path(where), line=first + k + 1, special_text=options.special_text)
        for fault in line.faults:
            raise UserError(f"{fault.field}: {fault.what}", where=where, hint=fault.hint)
        assert line.record is not None
        yield line.record


def _raw_records(sample: Sample, options: ShardOptions) -> list[RawRecord]:
    media = tuple(Medium("image", data=data) for _, data in sample.images)
    fields = sample.fields
    if isinstance(texts := fields.get("texts"), list):
        pairs = [text for text in texts if isinstance(text, dict)]
        return [RawRecord(None, (RawTurn(str(pair["user"]), str(pair["assistant"]), media),)) for pair in pairs]
    if any(key in fields for key in _CHAT_KEYS):
        plain = {key: value for key, value in fields.items() if key not in ("image", "images")}
        return [record_of_chat(plain | {"images": [medium.data for medium in media]}, Counter(), image_root=Path())]
    settings = OwnDataOptions(Path(), source=sample.key, question=options.question)
    one = {"image": media[0].data} if media else {"image": ""}
    raw = record_of_row({**{key: value for key, value in fields.items() if key != "image"}, **one}, settings)
    return [replace(raw, turns=(replace(raw.turns[0], media=media),))]


def _require_own_ids(records: Path, shards: Sequence[Shard]) -> None:
    """Check that no id is there twice."""
    seen: dict[str, str] = {}
    files = (shard.file for shard in shards for _ in range(shard.records))
    for name, file in zip(map_records(records).column("id").to_pylist(), files, strict=True):
        if name in seen:
            raise UserError(f"the id {name!r} is there twice, the first time in {seen[name]}", where=file, hint=_APART)
        seen[name] = file


def _join(parts: Sequence[Path], file: Path) -> None:
    """Put the records of all shards behind each other."""
    with replacing(file) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        writer = None
        for part in parts:
            with pa.memory_map(str(part.with_suffix(".records"))) as source, pa.ipc.open_stream(source) as reader:
                writer = writer or pa.ipc.new_stream(sink, reader.schema)
                for batch in reader:
                    writer.write_batch(batch)
        if writer is not None:
            writer.close()
