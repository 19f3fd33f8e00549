"""Whether an index, which anybody may have made, holds what one of ours would; looked at once for each content.

Of the records, those that are plainly sound are told by whole columns. The others are read again as lines of a data
file are (`schema.py`), which alone says what is wrong with one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from phi3v.data.cache import recall, remember
from phi3v.data.faults import DataFaultsError, Fault, quote
from phi3v.data.image_paths import image_path_fault
from phi3v.data.progress import LateProgress
from phi3v.data.record_rows import SCHEMA, TURN, map_records, object_of, row_of
from phi3v.data.schema import read_line
from phi3v.data.shards.index import AGAIN, IMAGES, RECORDS, ShardIndex, name_keys
from phi3v.errors import UserError

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

_MEMORY = "verified-1.json"  # another number whenever more is looked at
_ROWS = 16384  # that are looked at together
_SPACES = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
_MAYBE_SPECIAL = r"<(?:\||/?s>|unk>)"  # in all text that `find_special_text` finds
_LARGEST = 2**31 - 1  # bytes of an image that are read at once


def verify_index(index: ShardIndex, *, max_errors: int = 20, progress: bool = True) -> None:
    """Check the records and the table of images.

    Raises:
        DataFaultsError: records are wrong; lists the first ``max_errors`` faults.
        UserError: the index is wrong, or the cache cannot be written.
    """
    memory = index.cache / _MEMORY
    if recall(memory).get("sound") is True:
        return
    _verify_images(index)
    records = _records(index)
    with LateProgress("checking the records of the index", len(records), enabled=progress) as bar:
        found = _faults(index, records, bar)
        faults = list(islice(found, max_errors + 1))
    if faults:
        more, shown = len(faults) > max_errors, faults[:max_errors]
        raise DataFaultsError(index.location.root, shown, total=len(faults), exact=not more, hint=_CORRECT)
    remember(memory, {"sound": True})


_CORRECT = "correct them and make the shards again: `phi3v data shard`, with --special-text escape to keep such text"


def _records(index: ShardIndex) -> pa.Table:
    file = index.folder / RECORDS
    try:
        table = map_records(file)
        table.validate(full=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        what = f"is damaged: {str(error).splitlines()[0]}"
        raise UserError(what, where=str(file), hint=AGAIN) from None
    if len(table) != index.num_records:
        what = f"has {len(table):,} records, and its shards {index.num_records:,}"
        raise UserError(what, where=str(file), hint=AGAIN)
    return table


def _verify_images(index: ShardIndex) -> None:
    table = index.images.table
    file = index.folder / IMAGES

    def require(sound: Any, what: str) -> None:
        """Names the first row that is not."""
        rows = np.flatnonzero(~np.asarray(sound))
        if len(rows):
            name = quote(str(table.column("name")[int(rows[0])]))
            raise UserError(f"the row of the image {name} {what}", where=str(file), hint=AGAIN)

    for name in table.column_names:
        require(table.column(name).is_valid(), f"has no {name}")
    if not len(table):
        return
    names, keys = index.images.names, index.images.keys
    for name in names.to_pylist():
        if fault := image_path_fault(name):
            raise UserError(f"an image's name {fault[0]}", where=str(file), hint=AGAIN)
    require(name_keys(names.to_pylist()) == keys, "has another key than that of its name")
    same = np.append(False, np.asarray(pc.equal(names[1:], names[:-1])))
    after = np.append(True, np.asarray(pc.greater_equal(names[1:], names[:-1])))
    ordered = np.append(True, keys[1:] >= keys[:-1]) & (after | np.append(True, keys[1:] != keys[:-1]))
    require(ordered, "is out of order")
    digests = table.column("sha256").combine_chunks()
    alike = np.append(True, np.asarray(pc.equal(digests[1:], digests[:-1])))
    require(~same | alike, "has another hash than another of its name")

    place = index.images.places
    shard, offset, size = (place[name].astype(np.int64) for name in ("shard", "offset", "size"))
    require((shard >= 0) & (shard < len(index.shards)), "names a shard that there is not")
    is_tar = np.array([each.kind == "tar" for each in index.shards])[shard]
    room = np.where(is_tar, np.array([each.bytes for each in index.shards], dtype=np.int64)[shard], 2**62)
    require((size >= 1) & (size <= _LARGEST), "has an impossible number of bytes")
    require((offset >= 0) & (offset <= room - size), "leads beyond its shard")
    require((place["width"] >= 1) & (place["height"] >= 1), "has an impossible width or height")
    order = np.lexsort((size, offset, shard))
    a, b = order[:-1], order[1:]
    repeated = (offset[a] == offset[b]) & (size[a] == size[b])
    apart = np.ones(len(table), dtype=bool)
    apart[b] = (shard[a] != shard[b]) | (offset[a] + size[a] <= offset[b]) | repeated
    require(apart, "shares bytes with another image")


def _faults(index: ShardIndex, records: pa.Table, bar: LateProgress) -> Iterator[Fault]:
    first = 0
    for batch in records.to_batches(_ROWS):
        plain = _plain(batch, first, index)
        for chosen in np.split(np.flatnonzero(~plain), range(1000, batch.num_rows, 1000)):
            rows = batch.take(pa.array(chosen)).to_pylist()
            turns = (turn for row in rows for turn in row["turns"] or () if turn)
            names = list({name for turn in turns for name in turn["images"] or () if name is not None})
            known = {name for name, found in zip(names, index.images.first(names), strict=True) if found >= 0}
            for at, row in zip(chosen.tolist(), rows, strict=True):
                shard = index.shard_of(first + at)
                name = f"number {first + at - index.starts[shard] + 1}" if row["id"] is None else quote(row["id"])
                for fault in _faults_of(row, first + at + 1, known):
                    yield replace(fault, file=Path(index.place(shard)), record=name)
        first += batch.num_rows
        bar.advance(batch.num_rows)
    yield from _repeated_ids(index, records.column("id"))


def _as_arrow_gives(value: Any) -> Any:
    """Plain values with lists for tuples."""
    if isinstance(value, dict):
        return {name: _as_arrow_gives(item) for name, item in value.items()}
    return [_as_arrow_gives(item) for item in value] if isinstance(value, (list, tuple)) else value


def _faults_of(row: dict[str, Any], number: int, known: Collection[str]) -> Iterator[Fault]:
    """What is wrong with a record.

    Args:
        known: names of images that there are.
    """
    line = read_line(json.dumps(object_of(row)), file=Path(), line=number)
    yield from line.faults
    if line.record is None:
        return
    expected = _as_arrow_gives(row_of(line.record))
    for name in SCHEMA.names:
        if expected[name] != row[name]:
            yield Fault(Path(), number, name, "is not as the rest of the record says", AGAIN)
    for name in line.record.images:
        if name not in known:
            yield Fault(Path(), number, "conversations", f"names an image that no shard has: {quote(name)}", AGAIN)


def _repeated_ids(index: ShardIndex, ids: pa.ChunkedArray) -> Iterator[Fault]:
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids.drop_null())  # of which each is a fault already
    for name in counts.filter(pc.greater(counts.field("counts"), 1)).field("values"):
        one, other = pc.indices_nonzero(pc.equal(ids, name)).to_pylist()[:2]
        places = [index.place(index.shard_of(at)) for at in (one, other)]
        what = f"is that of another record too, in {places[0]}"
        hint = "give each record an id of its own"
        yield Fault(Path(places[1]), other + 1, "id", what, hint, record=quote(name.as_py()))


def _plain(batch: pa.RecordBatch, first: int, index: ShardIndex) -> Bools:
    """(records,) whether each is certainly sound; of those with rejected answers that is not told.

    Args:
        first: records before these.
    """
    turns = batch.column("turns")
    parents, flat = np.asarray(pc.list_parent_indices(turns)), turns.flatten()
    if turns.null_count or flat.null_count or _hides(turns):
        return np.zeros(batch.num_rows, dtype=bool)
    of_turn = dict(zip(TURN.names, flat.flatten(), strict=True))
    if any(_hides(values) for values in of_turn.values() if pa.types.is_list(values.type)):
        return np.zeros(batch.num_rows, dtype=bool)
    count = np.bincount(parents, minlength=batch.num_rows)
    last = np.append(parents[1:] != parents[:-1], True)[: len(parents)]
    weight, label = _numbers(of_turn["weight"]), _numbers(of_turn["label"])
    images = _lengths(of_turn["images"])

    sound = (weight == 0) | (weight == 1)
    sound &= ~_special(of_turn["user"]) & (~_blank(of_turn["user"]) | (images > 0))
    sound &= _said(of_turn["assistant"])
    sound &= (images >= 0) & _every(of_turn["images"], lambda names: _known(names, index))
    sound &= (_lengths(of_turn["answers"]) >= 0) & _every(of_turn["answers"], _said)
    sound &= (_lengths(of_turn["rejected"]) == 0) & (_lengths(of_turn["scores"]) == 0)
    sound &= (label < 0) | (last & (weight == 1))
    sound &= _offsets(of_turn["image_offsets"], images, of_turn["user"])

    def summed(of_turns: Any) -> Ints:
        return np.bincount(parents, of_turns, batch.num_rows).astype(np.int64)

    column = {name: batch.column(name) for name in SCHEMA.names}
    asked = weight == 1
    plain: Bools = (summed(~sound) == 0) & (summed(asked) > 0)
    plain &= ~_blank(column["id"])
    plain &= ~np.asarray(column["system"].is_valid()) | _said(column["system"])
    plain &= _numbers(column["line"]) == first + 1 + np.arange(batch.num_rows)
    plain &= _numbers(column["num_images"]) == summed(images)
    plain &= _numbers(column["num_rejected"]) == 0
    plain[parents[last]] &= _numbers(column["label"])[parents[last]] == label[last]
    places = np.arange(len(parents)) - (np.cumsum(count) - count)[parents]
    if np.array_equal(_lengths(column["questions"]), summed(asked)):
        numbers = _numbers(column["questions"].flatten())
        plain[parents[asked][numbers != places[asked]]] = False
        return plain
    return np.zeros(batch.num_rows, dtype=bool)


def _hides(lists: pa.Array) -> bool:
    """Whether there are items where a list is null."""
    return len(pc.list_parent_indices(lists)) != len(lists.flatten())


def _special(texts: pa.Array) -> Bools:
    return np.asarray(pc.match_substring_regex(texts, _MAYBE_SPECIAL).fill_null(True))


def _blank(texts: pa.Array) -> Bools:
    return np.asarray(pc.equal(pc.binary_length(pc.utf8_trim(texts, _SPACES)), 0).fill_null(True))


def _said(texts: pa.Array) -> Bools:
    return ~_special(texts) & ~_blank(texts)


def _known(names: pa.Array, index: ShardIndex) -> Bools:
    distinct = names.dictionary_encode()
    found = index.images.first(distinct.dictionary.to_pylist()) >= 0
    at = _numbers(distinct.indices)
    return (at >= 0) & np.append(found, False)[at]


def _numbers(values: pa.Array) -> Ints:
    """As int64, -1 where there is none."""
    return np.asarray(values.cast(pa.int64()).fill_null(-1))


def _lengths(lists: pa.Array) -> Ints:
    return _numbers(pc.list_value_length(lists))


def _every(lists: pa.Array, sound: Callable[[pa.Array], Bools]) -> Bools:
    """(lists,) whether all items of each are sound."""
    every = np.ones(len(lists), dtype=bool)
    every[np.asarray(pc.list_parent_indices(lists))[~sound(lists.flatten())]] = False
    return every


def _offsets(lists: pa.Array, images: Ints, users: pa.Array) -> Bools:
    """(turns,) whether each has as many offsets as images, in order and within the question; or none at all."""
    places, of_turn = _numbers(lists.flatten()), np.asarray(pc.list_parent_indices(lists))
    falls = np.append(False, (of_turn[1:] == of_turn[:-1]) & (places[1:] < places[:-1]))[: len(places)]
    outside = (places < 0) | (places > _numbers(pc.utf8_length(users))[of_turn])
    sound = ~np.asarray(lists.is_valid()) | (_lengths(lists) == images)
    sound[of_turn[falls | outside]] = False
    return sound
