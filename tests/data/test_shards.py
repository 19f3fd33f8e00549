"""Shards made of JSONL: what is in them, their index, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from phi3v.cli import main
from phi3v.data.check import check_file, ensure_checked
from phi3v.data.image_store import FolderStore
from phi3v.data.images import load_image
from phi3v.data.lengths import measure_table, tokens_file
from phi3v.data.order import ShardWindows
from phi3v.data.overlap import find_overlap
from phi3v.data.shards import write
from phi3v.data.shards.index import open_index
from phi3v.data.shards.write import ShardOptions, shard_data
from phi3v.data.table import RecordTable, open_table
from phi3v.errors import UserError
from phi3v.processing.processor import Phi3VProcessor

PAGES = 12  # each with two records


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Records about twelve pages, one of which is turned by its EXIF orientation; one record without and one with three
    images.
    """
    images = tmp_path / "data" / "images" / "größe"
    images.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for page in range(PAGES):
        image = Image.fromarray(random.integers(0, 255, (20 + page, 30, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if page == 3 else 1
        image.save(images / f"{page}.jpg", exif=exif)
        for question in range(2):
            turn = {"images": [f"größe/{page}.jpg"], "user": f"Frage {question}?", "assistant": f"Antwort {page} ü"}
            lines.append({"id": f"seite {page}/{question}", "source": "test", "conversations": [turn]})
    lines[5]["conversations"][0] |= {"rejected": ["nein"], "scores": [1.0, 0.5]}
    lines[6]["system"] = "Sei kurz."
    lines.append({"id": "no image", "conversations": [{"user": "1 + 1?", "assistant": "2", "answers": ["2", "two"]}]})
    names = [f"größe/{page}.jpg" for page in (0, 1, 0)]
    turns = [{"images": names, "user": "Which?", "assistant": "a"}, {"user": "Sure?", "assistant": "yes", "weight": 0}]
    lines.append({"id": "several", "conversations": turns})
    file = tmp_path / "data" / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> Path:
    out = tmp_path / "shards"
    assert main(["data", "shard", str(data), "--out", str(out), "--shard-size", "8KB"]) == 0
    return out


def by_id(table: RecordTable) -> dict[str, Any]:
    return {record.id: replace(record, line=0) for record in table}


def test_the_records_and_images_are_those_of_the_file(data: Path, shards: Path) -> None:
    table, original = open_table(shards), open_table(data)
    assert by_id(table) == by_id(original)
    assert [record.line for record in table] == list(range(1, len(table) + 1))
    assert len(table.shards) > 3
    assert sum(table.shards) == len(table)
    for record in table:
        other = next(each for each in original if each.id == record.id)
        assert table.image_sizes(record) == original.image_sizes(other)
        pairs = zip(table.load_images(record), original.load_images(other), strict=True)
        assert all(np.array_equal(image, of_file) for image, of_file in pairs)
    names = table.distinct_images()[0]
    for applied in (True, False):
        sizes = table.images.sizes(names, exif_orientation=applied)
        images = [load_image(name, store=original.images, exif_orientation=applied) for name in names]
        assert sizes is not None
        assert sizes.tolist() == [list(image.size) for image in images]
    assert [table.images.sha256(name) for name in names] == [original.images.sha256(name) for name in names]
    assert table.images.stamps(names)[:, 0].tolist() == original.images.stamps(names)[:, 0].tolist()
    assert table.images.stamps(["nö"]).tolist() == [[-1, -1]]


def test_records_about_a_page_are_in_one_shard_which_has_it_once(shards: Path) -> None:
    table, index = open_table(shards), open_index(shards)
    shard_of = np.repeat(np.arange(len(table.shards)), table.shards)
    pages: dict[str, set[int]] = {}
    for record, shard in zip(table, shard_of, strict=True):
        for name in record.images[:1]:
            pages.setdefault(name, set()).add(int(shard))
    assert all(len(of_page) == 1 for of_page in pages.values())
    rows = [(row.name, row.shard) for row in index.images.rows()]
    assert len(set(rows)) == len(rows)
    # The record with several images has copies of two pages, unless it shares their shard.
    assert PAGES <= len(rows) <= PAGES + 2


def test_webdataset_reads_them(shards: Path) -> None:
    table = open_table(shards)
    files = sorted(map(str, shards.glob("*.tar")))
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode("pil"))
    assert [sample["json"]["id"] for sample in samples] == [record.id for record in table]
    members = {f"{sample['__key__']}.{key}": sample[key] for sample in samples for key in sample if ".jpg" in f".{key}"}
    for record, sample in zip(table, samples, strict=True):
        assert set(sample["json"].get("members", {})) == set(record.images)
        for name, member in sample["json"].get("members", {}).items():
            own = load_image(name, store=table.images, exif_orientation=False)
            assert np.array_equal(np.asarray(members[member].convert("RGB")), np.asarray(own))


def test_the_same_command_makes_the_same_bytes_and_others_are_refused(
    data: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    shard_data([data], again, ShardOptions(shard_size=8000, workers=1))
    files = sorted(file.name for file in shards.iterdir())
    assert files == sorted(file.name for file in again.iterdir())
    assert all((again / name).read_bytes() == (shards / name).read_bytes() for name in files)
    assert main(["data", "shard", str(data), "--out", str(shards)]) == 2
    assert "has shards already" in capsys.readouterr().err
    assert main(["data", "shard", str(data), "--out", str(data.parent)]) == 2
    assert "is not empty" in capsys.readouterr().err
    for size in ("0MB", "500"):
        assert main(["data", "shard", str(data), "--out", str(tmp_path / "x"), "--shard-size", size]) == 2


def test_an_interrupted_command_goes_on(
    data: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "out", ShardOptions(shard_size=8000, workers=1)
    original, written = write._write_tar, []

    def killed(*arguments: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments[-1].name)
        return original(*arguments)

    monkeypatch.setattr(write, "_write_tar", killed)
    with pytest.raises(KeyboardInterrupt):
        shard_data([data], out, options)
    with pytest.raises(UserError, match=r"no such file|folder, not a file"):
        open_table(out)
    with pytest.raises(UserError, match="begun with other data or options"):
        shard_data([data], out, replace(options, seed=1))
    changed = data.parent / "images" / "größe" / "11.jpg"
    before = changed.stat()
    os.utime(changed, ns=(0, 0))
    with pytest.raises(UserError, match="begun with other data or options"):
        shard_data([data], out, options)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.setattr(write, "_write_tar", lambda *arguments: written.append("new") or original(*arguments))
    shard_data([data], out, options)
    assert written[:2] == ["00000.tar", "00001.tar"]
    assert len(written) == len(open_table(out).shards)
    assert all((out / file.name).read_bytes() == file.read_bytes() for file in shards.iterdir())
    assert {file.name for file in out.iterdir()} == {file.name for file in shards.iterdir()}


def test_several_files_make_one_set_of_shards(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(data.parent, other)
    Image.new("RGB", (9, 9)).save(other / "images" / "größe" / "0.jpg")
    with pytest.raises(UserError, match=r"the id 'seite 0/0' is in .* too"):
        shard_data([data, other / "train.jsonl"], tmp_path / "out", ShardOptions())
    lines = [json.loads(line) for line in (other / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    (other / "train.jsonl").write_text("".join(json.dumps(line | {"id": f"b {line['id']}"}) + "\n" for line in lines))
    shard_data([data, other / "train.jsonl"], tmp_path / "out", ShardOptions(shard_size=8000))
    table = open_table(tmp_path / "out")
    assert len(table) == 2 * len(lines)
    records = by_id(table)
    first, second = (table.image_sizes(records[name]) for name in ("seite 0/0", "b seite 0/0"))
    assert (first, second) == ([(30, 20)], [(9, 9)])  # of the same name
    assert records["seite 1/0"].images == records["b seite 1/0"].images  # the same image


def test_a_name_that_an_image_gets_is_nobody_else_s(data: Path, tmp_path: Path) -> None:
    """The second file's ``p.png`` is another than the first one's, which has a ``1/p.png`` too."""
    for place, names in enumerate((("p.png", "1/p.png"), ("p.png",))):
        images = tmp_path / f"from-{place}" / "images"
        lines = []
        for number, name in enumerate(names):
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10 + number + 5 * place, 9)).save(images / name)
            turn = {"images": [name], "user": "?", "assistant": "y"}
            lines.append(json.dumps({"id": f"{place}-{number}", "conversations": [turn]}) + "\n")
        (images.parent / "a.jsonl").write_text("".join(lines))
    shard_data([tmp_path / f"from-{place}" / "a.jsonl" for place in (0, 1)], tmp_path / "out", ShardOptions())
    table = open_table(tmp_path / "out")
    assert {record.id: table.load_images(record)[0].width for record in table} == {"0-0": 10, "0-1": 11, "1-0": 15}


def test_the_folder_may_move_and_a_table_may_be_sent(shards: Path, tmp_path: Path) -> None:
    table = open_table(shards)
    moved = tmp_path / "elsewhere" / "shards"
    moved.parent.mkdir()
    shards.rename(moved)
    again = open_table(moved)
    assert again.sha256 == table.sha256
    received = pickle.loads(pickle.dumps(again))
    assert received.images == again.images
    assert [image.size for image in received.load_images(received[0])] == again.image_sizes(again[0])


@pytest.mark.parametrize("file", ["index.json", "records.arrow", "images.arrow"])
def test_a_damaged_index_is_refused(shards: Path, file: str) -> None:
    content = bytearray((shards / file).read_bytes())
    content[len(content) // 2] ^= 1
    (shards / file).write_bytes(content)
    if file == "index.json":  # a hash or a name in it may have changed: what it says is not what is there
        (shards / file).write_bytes(bytes(content)[:-40])
    with pytest.raises(UserError, match=r"is no index of shards|its SHA-256 is another"):
        open_table(shards)


def test_a_changed_image_or_a_lost_shard_is_named_with_the_record(shards: Path) -> None:
    table = open_table(shards)
    index = open_index(shards)
    name = table[0].images[0]
    (row,) = (row for row in index.images.rows() if row.name == name and row.shard == 0)
    content = bytearray((shards / "00000.tar").read_bytes())
    content[row.offset + row.size // 2] ^= 1
    (shards / "00000.tar").write_bytes(content)
    with pytest.raises(UserError, match="other bytes than the index says") as caught:
        table.load_images(table[0])
    assert str(caught.value.where).endswith(f"shards/00000.tar: record {table[0].id!r}: conversations[0].images[0]")
    (shards / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"the shard is not there: .*00000.tar"):
        open_table(shards).load_images(table[0])
    with pytest.raises(UserError, match="is not in the index"):
        load_image("nö.jpg", store=table.images)


def test_a_check_reads_every_image_and_one_before_training_none(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = check_file(shards)
    assert (report.ok, report.records, report.images, report.pairs) == (True, 26, PAGES, 1)
    assert not check_file(shards, max_pixels=100).ok
    content = bytearray((shards / "00001.tar").read_bytes())
    content[1000] ^= 255
    (shards / "00001.tar").write_bytes(content)
    assert main(["data", "check", str(shards)]) == 2
    assert "other bytes than the index says" in capsys.readouterr().out
    checked = ensure_checked(shards)
    assert checked.ok
    assert ensure_checked(shards).records == 26
    with pytest.raises(UserError, match="above the limit of 100"):
        measure_table(open_table(shards, max_pixels=100), None)


def test_tokens_are_counted_once_where_the_shards_are_made(
    data: Path, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["data", "shard", str(data), "--out", str(out), "--model.path", str(tiny_model_dir)]) == 0
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    assert (out / tokens_file(processor)).is_file()
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "another machine"))
    monkeypatch.setattr("phi3v.data.lengths._count_all", None)
    measured = measure_table(open_table(out), processor)
    monkeypatch.undo()
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "fresh"))
    order = {record.id: place for place, record in enumerate(open_table(data))}
    expected = measure_table(open_table(data), processor).at(4)
    places = [order[record.id] for record in open_table(out)]
    assert np.array_equal(measured.at(4).tokens, expected.tokens[places])
    assert np.array_equal(measured.at(4).crops, expected.crops[places])


def test_what_is_evaluated_on_is_found_in_shards_that_are_trained_on(data: Path, shards: Path) -> None:
    found = find_overlap(open_table(shards), open_table(data))
    assert found.same == found.questions


def test_odd_data(tmp_path: Path, data: Path) -> None:
    line = data.read_text(encoding="utf-8").splitlines()[0]
    (data.parent / "one.jsonl").write_text(line + "\n", encoding="utf-8")
    shard_data([data.parent / "one.jsonl"], tmp_path / "one", ShardOptions(shard_size=1))
    table = open_table(tmp_path / "one")
    assert table.shards == (1,)
    with pytest.raises(UserError, match="no such file"):
        shard_data([data.parent / "none.jsonl"], tmp_path / "none", ShardOptions())
    with pytest.raises(UserError, match="is a folder"):
        open_table(data.parent)


def test_every_stretch_of_an_epoch_draws_from_all_shards_of_its_window() -> None:
    order = ShardWindows((100, 40, 0, 100, 60, 1), window=3, seed=5)
    assert len(order) == 301
    for epoch in range(3):
        records = order.of_epoch(epoch)
        assert np.array_equal(np.sort(records), np.arange(301))
        assert np.array_equal(records, order.of_epoch(epoch))
        starts = np.cumsum((0, *order.shards))
        shard_of = np.searchsorted(starts, records, side="right") - 1
        done = 0
        for window in order.windows(epoch):
            size = sum(order.shards[shard] for shard in window)
            drawn = shard_of[done : done + size]
            assert set(drawn) == set(window)
            for shard in window:
                places = np.flatnonzero(drawn == shard) / size
                wanted = (np.arange(len(places)) + 0.5) / len(places)
                # Jitter within a shard is below one record's distance; other shards' jitter adds as much again.
                assert np.abs(places - wanted).max() < 3 / len(places)
            done += size
        slots = order.slots(epoch)
        assert all(
            slots[starts[shard]] == place for window in order.windows(epoch) for place, shard in enumerate(window)
        )
    assert not np.array_equal(order.of_epoch(0), order.of_epoch(1))
    assert order.windows(0) != order.windows(1)


def test_a_store_of_a_folder_knows_no_sizes(data: Path) -> None:
    assert FolderStore.beside(data).sizes(["größe/0.jpg"], exif_orientation=True) is None


def test_members_of_a_tar_are_plain_files(shards: Path) -> None:
    for file in shards.glob("*.tar"):
        with tarfile.open(file) as tar:
            members = tar.getmembers()
        assert all(member.isfile() and os.sep not in member.name for member in members)
