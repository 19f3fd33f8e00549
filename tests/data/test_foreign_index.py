"""An index that somebody else made: all that may be wrong in it is an error before training, and said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from index_edits import Rows, edit_index, edit_table, with_column, write_batch
from PIL import Image

from phi3v.cli import main
from phi3v.data.check import ensure_checked
from phi3v.data.record_rows import SCHEMA, TURN
from phi3v.data.shards import verify
from phi3v.data.shards.index import IMAGES, RECORDS, open_index
from phi3v.data.shards.write import ShardOptions, shard_data
from phi3v.data.table import open_table
from phi3v.errors import UserError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some shards: records of every kind."""
    folder = tmp_path_factory.mktemp("original")
    (folder / "images").mkdir()
    for page in range(6):
        pixels = np.random.default_rng(page).integers(0, 255, (30, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{page}.png")
    turns: list[list[dict[str, Any]]] = [
        [{"images": ["0.png"], "user": "", "assistant": "a"}],
        [{"images": ["1.png", "2.png"], "user": "a <table> b", "assistant": "é", "image_offsets": [1, 9]}],
        [{"user": "?", "assistant": "b", "weight": 0}, {"user": "!", "assistant": "c", "label": True}],
        [{"images": ["3.png"], "user": "x", "assistant": "d", "answers": ["d", "D"]}],
        [{"images": ["4.png"], "user": "x", "assistant": "e", "rejected": ["f"], "scores": [1, 0.5]}],
        [{"images": ["5.png"], "user": "x", "assistant": "g"}],
    ]
    lines = [{"id": f"r{number}", "conversations": each} for number, each in enumerate(turns)]
    lines[3]["system"] = "Be short."
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHI3V_CACHE", str(folder / "cache"))
        shard_data([folder / "a.jsonl"], folder / "shards", ShardOptions(shard_size=14_000))
        assert len(open_table(folder / "shards").shards) > 1
    return folder / "shards"


@pytest.fixture
def shards(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "shards")
    return tmp_path / "shards"


def test_sound_records_are_told_by_their_columns(original: Path) -> None:
    """Of all records but those with rejected answers, which are read one by one."""
    index = open_index(original)
    records = open_table(original).dataset.data.table
    for size in (1, 2, 6):
        plain: list[bool] = []
        for batch in records.to_batches(size):
            plain += verify._plain(batch, len(plain), index).tolist()
        assert plain == [record.id != "r4" for record in open_table(original)]


def turn(place: int = -1, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row["turns"][place].update(values)


def record(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update(values)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("r0", turn(user="a <|end|> b"), "conversations[0].user: holds text that the tokenizer reads"),
        ("r0", turn(assistant="</s>"), "conversations[0].assistant: holds text"),
        ("r0", turn(assistant="<unk>"), "conversations[0].assistant: holds text"),
        ("r0", turn(user=None), "conversations[0].user: must be a string"),
        ("r0", turn(assistant=None), "conversations[0].assistant: must be a string"),
        ("r0", turn(assistant=" \n\u2003"), "conversations[0].assistant: is empty"),
        ("r0", turn(assistant="\x1c"), "conversations[0].assistant: is empty"),
        ("r2", turn(user=" "), "conversations[1].user: is empty and the turn has no images"),
        ("r0", record(turns=None), "conversations: must be a list, not null"),
        ("r0", record(turns=[]), "conversations: has no turn"),
        ("r2", lambda row: row["turns"].append(None), "conversations[2]: must be an object, not null"),
        ("r3", turn(images=None), "is not as the rest of the record says"),
        ("r0", turn(images=["../0.png"]), "leaves the data root"),
        ("r0", turn(images=["nothing.png"]), "names an image that no shard has: 'nothing.png'"),
        ("r0", turn(images=[None]), "conversations[0].images[0]: must be a string"),
        ("r0", turn(images=[]), "conversations[0].user: is empty"),
        ("r3", turn(images=[]), "num_images: is not as the rest"),
        ("r3", turn(answers=None), "turns: is not as the rest"),
        ("r3", turn(answers=["a", None]), "conversations[0].answers[1]: must be a string"),
        ("r3", turn(answers=[" "]), "conversations[0].answers[0]: is empty"),
        ("r3", turn(answers=["<|user|>"]), "conversations[0].answers[0]: holds text"),
        ("r0", turn(weight=None), "turns: is not as the rest"),
        ("r0", turn(weight=2), "conversations[0].weight: must be 0 or 1"),
        ("r0", turn(weight=0), "has only turns of weight 0"),
        ("r2", turn(0, label=False), "conversations[0].label: stands in a turn that is not the last"),
        ("r2", turn(0, weight=1), "questions: is not as the rest"),
        ("r2", turn(weight=0), "conversations"),
        ("r1", turn(image_offsets=[-1, 2]), "must be a list of whole numbers"),
        ("r1", turn(image_offsets=[None, 2]), "must be a list of whole numbers"),
        ("r1", turn(image_offsets=[1, None]), "must be a list of whole numbers"),
        ("r1", turn(image_offsets=[3, 2]), "must not decrease"),
        ("r1", turn(image_offsets=[3]), "must have one offset for each image"),
        ("r1", turn(image_offsets=[3, 12]), "is beyond the end of the question"),
        ("r4", turn(rejected=["e "]), "is the same text as assistant"),
        ("r4", turn(rejected=None), "conversations[0].scores: is of no use"),
        ("r4", turn(scores=[0.0, float("nan")]), "r4"),
        ("r4", turn(scores=[0.0, 1.0]), "says that rejected is better"),
        ("r5", turn(scores=[1.0]), "conversations[0].scores: is of no use"),
        ("r5", turn(scores=None), "turns: is not as the rest"),
        ("r0", record(id=None), "record number 1: id: must be a string"),
        ("r0", record(id=" "), "id: is empty"),
        ("r0", record(id="r1"), "is that of another record too"),
        ("r3", record(system=" "), "system: is empty"),
        ("r3", record(system="<|end|>"), "system: holds text"),
        ("r0", record(line=7), "line: is not as the rest"),
        ("r0", record(line=None), "line: is not as the rest"),
        ("r2", record(questions=[0]), "questions: is not as the rest"),
        ("r2", record(questions=[]), "questions: is not as the rest"),
        ("r2", record(questions=None), "questions: is not as the rest"),
        ("r0", record(num_images=-5), "num_images: is not as the rest"),
        ("r0", record(num_images=None), "num_images: is not as the rest"),
        ("r0", record(num_rejected=10**9), "num_rejected: is not as the rest"),
        ("r2", record(label=None), "label: is not as the rest"),
        ("r0", record(label=True), "label: is not as the rest"),
    ],
)
def test_a_record_that_is_wrong_is_named_with_its_shard(shards: Path, name: str, change: Any, words: str) -> None:
    def edit(rows: Rows) -> None:
        rows.sort(key=lambda row: row["id"] != name)
        for line, row in enumerate(rows, start=1):
            row["line"] = line
        change(rows[0])

    edit_table(shards, RECORDS, edit)
    with pytest.raises(UserError) as caught:
        open_table(shards)
    assert words in str(caught.value)
    assert "00000.tar: record" in str(caught.value) or "another record too" in words
    assert "Arrow" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": None}, "has no name"),
        ({"sha256": None}, "has no sha256"),
        ({"name": "../a.png"}, "leaves the data root"),
        ({"name": "0.jpg"}, "has another key than that of its name"),
        ({"offset": -1}, "leads beyond its shard"),
        ({"offset": 2**62}, "leads beyond its shard"),
        ({"offset": 0}, "shares bytes with another image"),
        ({"size": 0}, "has an impossible number of bytes"),
        ({"size": 2**40}, "has an impossible number of bytes"),
        ({"size": 2**31 - 1}, "leads beyond its shard"),
        ({"width": 0}, "has an impossible width or height"),
        ({"height": -3}, "has an impossible width or height"),
        ({"shard": 99}, "names a shard that there is not"),
        ({"shard": -1}, "names a shard that there is not"),
    ],
)
def test_a_row_of_an_image_that_is_wrong_is_named(shards: Path, changes: dict[str, Any], words: str) -> None:
    def edit(rows: Rows) -> None:
        if changes == {"offset": 0}:  # which is the first of two in a shard
            place = max(range(len(rows)), key=lambda at: (rows[at]["shard"] == rows[0]["shard"], rows[at]["offset"]))
            rows[place]["offset"] = rows[0]["offset"] + 1 if place else rows[1]["offset"] + 1
            shard = rows[place]["shard"]
            first = min((row for row in rows if row["shard"] == shard), key=lambda row: row["offset"])
            rows[place]["offset"] = first["offset"] + 1
        else:
            rows[0].update(changes)

    edit_table(shards, IMAGES, edit)
    with pytest.raises(UserError) as caught:
        open_table(shards)
    assert words in str(caught.value)
    assert "images.arrow" in str(caught.value)


def test_rows_of_images_are_in_order_and_one_name_is_one_image(shards: Path) -> None:
    edit_table(shards, IMAGES, lambda rows: rows.reverse())
    with pytest.raises(UserError, match="is out of order"):
        open_table(shards)
    edit_table(shards, IMAGES, lambda rows: (rows.reverse(), rows.insert(1, rows[0] | {"sha256": bytes(32)})))
    with pytest.raises(UserError, match="has another hash than another of its name"):
        open_table(shards)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 1}, "was made by another version"),
        ({"version": [1, 99]}, "was made by another version"),
        ({"format": "x"}, "is no index of shards"),
        ({"shards": None}, "is no index of shards"),
        ({"files": {}}, "is no index of shards"),
        ({"sha256": "../../../tmp/x"}, "is no index of shards"),
        ({"bytes": -1}, "is no index of shards"),
        ({"bytes": 1.5}, "is no index of shards"),
        ({"records": True}, "is no index of shards"),
        ({"records": 9}, "and its shards"),
        ({"kind": "zip"}, "is no index of shards"),
        ({"file": "a/../../b.tar"}, "outside of its folder"),
        ({"file": "a%2F..%2f../b.tar"}, "outside of its folder"),
        ({"file": "%252e%252e/b.tar"}, "outside of its folder"),
        ({"file": "s3://bucket/../other/b.tar"}, "outside of its folder"),
        ({"file": "/a\0b.tar"}, "outside of its folder"),
        ({"more": 1}, "is no index of shards"),
    ],
)
def test_an_index_that_is_wrong_is_refused(shards: Path, change: dict[str, Any], words: str) -> None:
    top = {"version", "format", "shards", "files"}
    edit_index(shards, lambda content: (content if set(change) <= top else content["shards"][0]).update(change))
    with pytest.raises(UserError, match=words):
        open_table(shards)


def test_no_file_of_an_index_takes_a_name_of_the_cache_s_own(shards: Path) -> None:
    (shards / "verified-1.json").write_text('{"sound": true}')
    edit_index(shards, lambda content: content["files"].update({"verified-1.json": content["files"][RECORDS]}))
    with pytest.raises(UserError, match="is no index of shards"):
        open_table(shards)


def test_shards_that_lie_here_are_there_and_whole_before_training(shards: Path) -> None:
    data = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"00001.tar: has .* bytes, and index.json says"):
        ensure_checked(shards)
    (shards / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"00001.tar: cannot be read: No such file"):
        ensure_checked(shards)
    (shards / "00001.tar").write_bytes(data)
    assert ensure_checked(shards).records == 6


def test_other_types_and_broken_buffers_are_refused(shards: Path) -> None:
    edit_table(shards, RECORDS, lambda _: None, with_column("source", pa.large_string()))
    with pytest.raises(UserError, match=r"records.arrow: is damaged: it has other columns"):
        open_table(shards)
    edit_table(shards, RECORDS, lambda _: None, with_column("source", pa.string()))
    assert len(open_table(shards)) == 6
    with pa.ipc.open_stream((shards / RECORDS).read_bytes()) as reader:
        batch = reader.read_next_batch()
    for data, offsets in ((b"r\xff" * 6, range(0, 13, 2)), (b"r0", [0, 2, -(10**6), 2, 2, 2, 2])):
        buffers = [None, pa.py_buffer(np.array(offsets, dtype=np.int32)), pa.py_buffer(data)]
        ids = pa.Array.from_buffers(pa.string(), 6, buffers)
        write_batch(shards, RECORDS, pa.RecordBatch.from_arrays([ids, *batch.columns[1:]], schema=batch.schema))
        with pytest.raises(UserError, match=r"records.arrow: is damaged"):
            open_table(shards)


def test_records_without_an_id_and_items_behind_a_null_are_told(shards: Path, original: Path) -> None:
    edit_table(shards, RECORDS, lambda rows: [row.update(id=None) for row in rows[:2]])
    with pytest.raises(UserError, match=r"record number 1: id: must be a string.*\n.*\n.*id: must be a string"):
        open_table(shards)
    (batch,) = open_table(original).dataset.data.table.combine_chunks().to_batches()
    turns = batch.column("turns")
    of_turn, count = dict(zip(TURN.names, turns.flatten().flatten(), strict=True)), len(turns.flatten())
    null_first = pa.array([place == 0 for place in range(count)])
    of_turn["answers"] = pa.ListArray.from_arrays(range(count + 1), pa.array(["x"] * count), mask=null_first)
    hiding = pa.StructArray.from_arrays(list(of_turn.values()), fields=list(TURN))
    columns = {name: batch.column(name) for name in SCHEMA.names}
    columns["turns"] = pa.ListArray.from_arrays(turns.offsets, hiding)
    write_batch(shards, RECORDS, pa.RecordBatch.from_arrays(list(columns.values()), schema=SCHEMA))
    with pytest.raises(UserError, match="turns: is not as the rest"):
        open_table(shards)


def test_faults_are_listed_once_for_each_content_and_end_with_2(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_table(shards, RECORDS, lambda rows: [turn(assistant="")(row) for row in rows])
    assert main(["data", "check", str(shards)]) == 2
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("assistant: is empty") == 6
    assert "Traceback" not in shown.err
    with pytest.raises(UserError, match="make the shards again"):
        ensure_checked(shards)
    edit_table(shards, RECORDS, lambda rows: [turn(assistant="yes")(row) for row in rows])
    checked = ensure_checked(shards)
    assert (checked.records, checked.turns, checked.images) == (6, 7, 6)
    monkeypatch.setattr(verify, "_verify_images", None)
    open_table(shards)
