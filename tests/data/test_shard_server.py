"""Shards at a URL: what is fetched, kept and tried again, against a web server on this machine."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from file_server import FileServer, serving
from filelock import FileLock
from PIL import Image

from phi3v.cli import main
from phi3v.data.batches import RowPlan
from phi3v.data.check import check_file, ensure_checked
from phi3v.data.lengths import measure_table
from phi3v.data.mixture import mix_tables
from phi3v.data.progress import LateProgress
from phi3v.data.rows import RowDataset
from phi3v.data.shards import remote
from phi3v.data.shards.cache import ShardCache
from phi3v.data.shards.store import OTHERS, ShardStore
from phi3v.data.shards.write import ShardOptions, shard_data
from phi3v.data.table import RecordTable, open_table
from phi3v.errors import UnavailableError, UserError
from phi3v.processing.processor import Phi3VProcessor
from phi3v.report.preview import preview

SHARDS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six shards, of four records each."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "images").mkdir()
    random = np.random.default_rng(1)
    lines = []
    for page in range(4 * SHARDS):
        pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{page}.png")
        turn = {"images": [f"{page}.png"], "user": "Which?", "assistant": str(page)}
        lines.append({"id": str(page), "conversations": [turn]})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHI3V_CACHE", str(folder / "cache"))
        shard_data([folder / "train.jsonl"], folder / "shards", ShardOptions(shard_size=28_000))
        assert open_table(folder / "shards").shards == (4,) * SHARDS
    return folder / "shards"


@pytest.fixture
def server(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    shutil.copytree(made, tmp_path / "served")
    with serving(tmp_path / "served") as server:
        yield server


def store_of(table: RecordTable) -> ShardStore:
    assert isinstance(table.images, ShardStore)
    return table.images


def test_opening_and_measuring_fetch_the_index_alone_and_once(server: FileServer) -> None:
    assert ensure_checked(Path(server.url)).ok
    table = open_table(Path(server.url))  # as a configuration's path arrives
    assert table.shown == server.url
    assert mix_tables([table, table], ["a", "b"]).shown == f"{server.url}, {server.url}"
    assert measure_table(table, None).sizes.tolist() == [[40, 40]] * len(table)
    assert sorted({name for name, _ in server.requests}) == ["images.arrow", "index.json", "records.arrow"]
    assert server.sent["records.arrow"] == (server.folder / "records.arrow").stat().st_size
    server.forget()
    kept = open_table(server.url).folder / "records.arrow"
    assert [name for name, _ in server.requests] == ["index.json"]
    content = kept.read_bytes()
    kept.write_bytes(bytes(len(content)))  # as after a power cut
    open_table(server.url)
    assert kept.read_bytes() == content


def test_an_own_shard_is_fetched_whole_and_one_image_of_others(server: FileServer, made: Path) -> None:
    table, local = open_table(server.url), open_table(made)
    table.assign_shards([[0, 2], [4]])
    server.forget()
    for index in (0, 1, 2, 3, 4, 8):
        assert np.array_equal(table.load_images(table[index])[0], local.load_images(local[index])[0])
    store_of(table).fetch(4)  # which is fetched ahead, perhaps at this moment
    assert sorted(server.whole()) == ["00000.tar", "00002.tar", "00004.tar"]
    singles = [(name, start) for name, start in server.requests if start is not None]
    assert [name for name, _ in singles] == ["00001.tar"]
    assert server.sent["00001.tar"] < 6000
    again = open_table(server.url)  # another process of this machine
    server.forget()
    again.load_images(again[8])
    assert not server.requests


def test_without_ranks_a_shard_is_fetched_once_much_of_it_was_asked_for(server: FileServer) -> None:
    table = open_table(server.url)
    for record in table:
        table.load_images(record)
    assert server.whole() == [f"{number:05d}.tar" for number in range(SHARDS)]


def test_a_check_streams_shard_after_shard(server: FileServer) -> None:
    assert check_file(Path(server.url)).images == 4 * SHARDS
    assert sorted(server.whole()) == [f"{number:05d}.tar" for number in range(SHARDS)]
    assert not [start for name, start in server.requests if start is not None and name.endswith(".tar")]


def test_a_preview_fetches_what_it_shows(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page: dict[str, Any] = {}
    monkeypatch.setattr("phi3v.report.preview.write_page", lambda *arguments: page.update(arguments[-1]["preview"]))
    told = preview(Path(server.url), tmp_path / "page.html", samples=1)
    assert (told["records"], told["measured"], told["faults"]) == (4 * SHARDS, 4 * SHARDS, 0)
    assert page["file"] == server.url
    (sample,) = page["samples"]
    assert [name for name, _ in server.requests if name.endswith(".tar")] == [sample["place"]]


def test_sizes_of_images_in_a_list_of_sources_are_read_from_their_indexes(server: FileServer, made: Path) -> None:
    table = mix_tables([open_table(server.url), open_table(made)], ["a", "b"])
    assert {size for record in table for size in table.image_sizes(record)} == {(40, 40)}
    assert not [name for name, _ in server.requests if name.endswith(".tar")]
    place = f"{server.url}/00000.tar: record "
    assert table.where(table[0]).startswith(place)
    assert table.where(table[4 * SHARDS]).startswith(f"{made}/00000.tar: record ")


def test_a_check_takes_several_and_says_what_it_fetches(
    server: FileServer, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(made), server.url, "--images", "off", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(each["path"], each["records"]) for each in told["files"]] == [(str(made), 24), (server.url, 24)]
    assert main(["data", "check", str(made), str(tmp_path / "gone.jsonl"), "--images", "off"]) == 2
    assert f"{made}: no fault" in capsys.readouterr().out
    assert main(["data", "check", server.url]) == 0
    shown = capsys.readouterr().out
    assert f"fetching {SHARDS} shards, 0.0 GB, of {server.url}" in shown
    assert f"{server.url}: no fault" in shown
    assert "(record '" in shown
    assert main(["data", "check", "recipe.yaml"]) == 2
    assert "phi3v doctor recipe.yaml" in capsys.readouterr().err
    assert main(["data", "shard", "a.jsonl", "--out", "s3://bucket/train"]) == 2
    assert "shards are written on this machine" in capsys.readouterr().err
    assert not Path("s3:").exists()


def test_a_long_fetch_is_told_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for told in (True, False):
        with LateProgress("fetching", 3, delay=0, told=told) as bar:
            bar.advance(1)
            bar.advance(2)
    assert capsys.readouterr().err == "fetching …\n"


@pytest.mark.parametrize("fault", [404, 500, 503, "short", "slow", "damaged"])
@pytest.mark.parametrize("whole", [True, False])
def test_what_fails_is_tried_again(
    server: FileServer, fault: int | str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "slow":
        monkeypatch.setattr(remote, "SILENCE", 0.3)
    fsspec.filesystem("http").clear_instance_cache()  # which keeps the timeout
    table = open_table(server.url)
    table.assign_shards([[0]] if whole else [])
    server.faults = lambda name, times: fault if name == "00000.tar" and times < 3 else None
    assert table.load_images(table[0])[0].size == (40, 40)
    times = [name for name, _ in server.requests].count("00000.tar")
    assert times == 3 or (fault == "slow" and times > 3)  # as a busy machine may be
    assert not list(ShardCache(1).folder.glob(".*.part"))
    fsspec.filesystem("http").clear_instance_cache()


@pytest.mark.parametrize(
    ("fault", "requests", "message"),
    [
        (500, remote.ATTEMPTS, "HTTP 500"),
        (404, remote.ATTEMPTS, "is not there"),
        (403, 1, "may not be read"),
        ("damaged", remote.ATTEMPTS, "is not the one that the index names"),
        ("short", remote.ATTEMPTS, "cannot be read"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_goes_on_failing_names_shard_and_record(
    server: FileServer, fault: int | str, requests: int, message: str, whole: bool
) -> None:
    table = open_table(server.url)
    table.assign_shards([[2]] if whole else [])
    server.faults = lambda name, _: fault if name == "00002.tar" else None
    with pytest.raises(UserError) as caught:
        table.load_images(table[8])
    assert message in str(caught.value)
    # No record may be left out for a server that does not work.
    assert isinstance(caught.value, UnavailableError) == (fault not in (404, "damaged"))
    assert f"{server.url}/00002.tar" in str(caught.value)
    assert f"{table[8].id!r}: conversations[0].images[0]" in str(caught.value)
    assert len([name for name, _ in server.requests if name == "00002.tar"]) == requests
    assert table.load_images(table[0])


def test_no_record_is_left_out_for_a_server_that_does_not_work(server: FileServer, tiny_model_dir: Path) -> None:
    table = open_table(server.url)
    table.assign_shards([])
    rows = RowDataset(table, Phi3VProcessor.from_pretrained(tiny_model_dir), on_bad="skip")
    plan = RowPlan(((0,), (5,)), ends_step=True)
    server.faults = lambda name, _: 503 if name == "00000.tar" else None
    with pytest.raises(UnavailableError):
        rows[plan]
    server.faults = lambda name, _: 404 if name == "00000.tar" else None
    skipped = rows[plan]["counts"].skipped
    assert [index for index, _ in skipped] == [0]
    assert "00000.tar" in skipped[0][1]


@pytest.mark.parametrize("whole", [True, False])
def test_a_lost_shard_is_asked_for_once(server: FileServer, whole: bool) -> None:
    table = open_table(server.url)
    table.assign_shards([[0], [1]] if whole else [])
    (server.folder / "00000.tar").unlink()
    if whole:
        (server.folder / "00001.tar").write_bytes(b"another")
    for index in (0, 1, 4, 5, 2, 6) if whole else (0, 1, 2):
        with pytest.raises(UserError, match="is not there" if index < 4 else "is not the one") as caught:
            table.load_images(table[index])
        assert not isinstance(caught.value, UnavailableError)
    requests = [name for name, _ in server.requests]
    assert requests.count("00000.tar") == remote.ATTEMPTS
    assert requests.count("00001.tar") == (2 if whole else 0)
    assert table.load_images(table[8])


def test_what_is_fetched_ahead_goes_on_behind_a_lost_shard(server: FileServer) -> None:
    store = store_of(open_table(server.url))
    (server.folder / "00000.tar").unlink()
    store._fetch_all([0, 1])
    assert server.whole() == ["00000.tar"] * remote.ATTEMPTS + ["00001.tar"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_bucket_that_is_gone_ends_the_run(server: FileServer, tiny_model_dir: Path, whole: bool) -> None:
    table = open_table(server.url)
    table.assign_shards([[shard] for shard in range(SHARDS)] if whole else [])
    rows = RowDataset(table, Phi3VProcessor.from_pretrained(tiny_model_dir), on_bad="skip")
    for shard in range(SHARDS - 1):
        (server.folder / f"{shard:05d}.tar").unlink()
    for shard in range(SHARDS - 1):  # some are gone, but between them are others
        plan = RowPlan(((4 * shard,), (4 * SHARDS - 1,)), ends_step=True)
        assert [index for index, _ in rows[plan]["counts"].skipped] == [4 * shard]
    (server.folder / f"{SHARDS - 1:05d}.tar").unlink()
    with pytest.raises(UnavailableError, match="5 shards, one after the other, are gone or changed") as caught:
        rows[RowPlan(((0,),), ends_step=True)]
    assert server.url in str(caught.value)


def test_a_cache_that_cannot_be_read_is_no_fault_of_a_record(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = open_table(server.url)
    store = store_of(table)
    assert store.fetch(1)
    (store.cache.folder / store.index.shards[0].sha256).mkdir()
    with pytest.raises(UnavailableError, match="a shard in the cache cannot be read: Is a directory"):
        table.load_images(table[0])

    def no_more(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "dup", no_more)
    with pytest.raises(UnavailableError, match="Too many open files"):
        table.load_images(table[4])


def test_a_shard_that_another_thread_fetched_again_is_read(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_table(server.url)
    table.assign_shards([[0]])
    store = store_of(table)
    assert store.fetch(0)
    kept = store.cache.folder / store.index.shards[0].sha256
    kept.write_bytes(bytes(kept.stat().st_size))
    pread, others = os.pread, [1]

    def reading(*arguments: int) -> bytes:
        data = pread(*arguments)
        if others:
            other = threading.Thread(target=table.load_images, args=(table[others.pop()],))
            other.start()
            other.join()
        return data

    monkeypatch.setattr(os, "pread", reading)
    assert table.load_images(table[0])[0].size == (40, 40)
    assert server.whole() == ["00000.tar"] * 2


def test_shards_may_be_assigned_while_one_is_read(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_table(server.url)
    table.assign_shards([[0]])
    store = store_of(table)
    monkeypatch.setattr(store, "_let_go", lambda **_: store._positions.fill(OTHERS))
    assert table.load_images(table[0])


def test_a_proxy_of_the_environment_is_asked(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    with pytest.raises(UserError, match="the index is not there"):
        open_table("http://nowhere.invalid/train")
    assert server.requests == [("http://nowhere.invalid/train/index.json", None)]


def test_a_server_that_ignores_ranges_is_no_obstacle(server: FileServer, made: Path) -> None:
    table, local = open_table(server.url), open_table(made)
    table.assign_shards([])
    server.faults = lambda _name, _times: "whole"
    assert np.array_equal(table.load_images(table[6])[0], local.load_images(local[6])[0])


@pytest.mark.parametrize("whole", [True, False])
def test_a_shard_that_was_changed_since_is_an_error(server: FileServer, whole: bool) -> None:
    table = open_table(server.url)
    table.assign_shards([[3]] if whole else [])
    content = (server.folder / "00003.tar").read_bytes()
    (server.folder / "00003.tar").write_bytes(content[::-1])
    with pytest.raises(UserError, match="is not the one that the index names") as caught:
        table.load_images(table[12])
    assert "00003.tar" in str(caught.value)
    assert [name for name, _ in server.requests].count("00003.tar") == 2, "the same twice was not damaged on the way"
    assert not [file for file in ShardCache(1).folder.glob("*") if file.suffix != ".lock"]


def test_an_index_that_was_damaged_on_the_way_is_refused(server: FileServer, tmp_path: Path) -> None:
    content = (server.folder / "images.arrow").read_bytes()
    (server.folder / "images.arrow").write_bytes(content[:-8] + bytes(8))
    with pytest.raises(UserError, match="a file of the index is not the one"):
        open_table(server.url)
    (server.folder / "images.arrow").write_bytes(content)
    assert len(open_table(server.url)) == 4 * SHARDS
    shutil.rmtree(server.folder)
    with pytest.raises(UserError, match="the index is not there"):
        open_table(server.url)


def test_the_cache_keeps_to_its_limit_and_spares_what_is_read(server: FileServer, made: Path) -> None:
    size = (made / "00000.tar").stat().st_size
    table = open_table(server.url, cache_limit=2.5 * size / 1e9, shuffle_window=2)
    table.assign_shards([[number] for number in range(SHARDS)])
    folder = ShardCache(1).folder

    def kept() -> list[int]:
        return [file.stat().st_size for file in folder.iterdir() if len(file.name) == 64]

    for record in table:
        table.load_images(record)
        assert sum(kept()) <= 2.5 * size
    assert kept()
    # Shards that are open here stay: there is no room, so images are asked for one by one.
    other = open_table(server.url, cache_limit=1.5 * size / 1e9)
    other.assign_shards([[number] for number in range(SHARDS)])
    server.forget()
    for record in other:
        other.load_images(record)
    assert [start for _, start in server.requests if start is not None]


def test_a_shard_that_is_done_while_room_is_made_for_another_counts(
    server: FileServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (made / "00000.tar").stat().st_size
    store = store_of(open_table(server.url, cache_limit=1.5 * size / 1e9))
    store.cache.folder.mkdir(parents=True)
    part = store.cache.folder / f".{store.index.shards[1].sha256}.{size}.1.part"
    part.write_bytes(bytes(size))
    lock = FileLock(store.cache.folder / f"{store.index.shards[1].sha256}.lock")
    lock.acquire()

    def ends(found: Callable[[], Any]) -> Callable[[], Any]:
        """The other process's shard is there, and open, after this part of the count."""

        def counted() -> Any:
            counts = found()
            if part.exists():
                part.rename(store.cache.folder / store.index.shards[1].sha256)
                opened.append(store.cache.open(store.index.shards[1].sha256))
                lock.release()
            return counts

        return counted

    opened: list[Any] = []
    monkeypatch.setattr(store.cache, "_kept", ends(store.cache._kept))
    monkeypatch.setattr(store.cache, "_being_fetched", ends(store.cache._being_fetched))
    assert not store.fetch(0)
    assert opened


def test_a_shard_that_died_with_its_process_is_fetched_again(server: FileServer) -> None:
    table = open_table(server.url)
    store = store_of(table)
    key = store.index.shards[0].sha256
    store.cache.folder.mkdir(parents=True)
    left = store.cache.folder / f".{key}.999999999999.1.part"
    left.write_bytes(b"half")
    assert store.fetch(0)
    assert not left.exists()
    assert server.whole() == ["00000.tar"]


def test_what_killed_processes_left_takes_no_room(server: FileServer, made: Path) -> None:
    size = (made / "00000.tar").stat().st_size
    store = store_of(open_table(server.url, cache_limit=1.5 * size / 1e9))
    folder = store.cache.folder
    folder.mkdir(parents=True)
    keys = [shard.sha256 for shard in store.index.shards]
    left = [folder / f".{keys[1]}.{size}.1.part", folder / f".{keys[1]}.{size}.1.part.images"]
    for file in left:
        file.touch()
    with FileLock(folder / f"{keys[1]}.lock"):  # as long as it is being fetched, it counts
        assert not store.fetch(0)
    assert store.fetch(0)
    assert not any(file.exists() for file in left)


def test_a_shard_that_was_damaged_in_the_cache_is_fetched_again(server: FileServer) -> None:
    store = store_of(open_table(server.url))
    assert store.fetch(0)
    kept = store.cache.folder / store.index.shards[0].sha256
    content = kept.read_bytes()
    kept.write_bytes(content[:1000])  # as after a power cut
    table = open_table(server.url)
    assert table.load_images(table[0])[0].size == (40, 40)
    table.assign_shards([[0]])
    assert table.load_images(table[1])[0].size == (40, 40)
    assert kept.read_bytes() == content


def test_a_full_disk_is_told_at_once(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_table(server.url)
    table.assign_shards([[0]])
    monkeypatch.setattr(remote.Location, "fetch", lambda *_, **__: remote.attempt(_full, "there"))
    monkeypatch.setattr(remote.time, "sleep", None)
    with pytest.raises(UnavailableError, match="no room for a shard") as caught:
        table.load_images(table[0])
    assert "data.cache_limit" in str(caught.value.hint)


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_server_that_sends_without_end_fills_no_disk(server: FileServer) -> None:
    table = open_table(server.url)
    table.assign_shards([[0]])
    with (server.folder / "00000.tar").open("ab") as file:
        file.truncate(2**26)
    with pytest.raises(UserError, match="is not the one that the index names"):
        table.load_images(table[0])


@pytest.mark.parametrize("path", ["bucket/../other", "bucket/%2e%2E/other", "bucket/a%2f..", "bucket/..%5cother"])
def test_a_url_that_leaves_its_folder_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"has \.\. in it"):
        open_table(f"https://127.0.0.1:9/{path}")


def test_a_file_that_another_thread_closes_meanwhile_is_read_to_its_end(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = open_table(made, shuffle_window=2)
    expected = [np.asarray(table.load_images(record)[0]) for record in table]
    pread, others = os.pread, [4, 8, 12, 16]  # of other shards, more than are kept open

    def reading(*arguments: int) -> bytes:
        while others:
            other = threading.Thread(target=table.load_images, args=(table[others.pop()],))
            other.start()
            other.join()
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", reading)
    assert np.array_equal(np.asarray(table.load_images(table[0])[0]), expected[0])


def test_a_process_that_is_forked_while_a_thread_opens_a_shard_reads_on(made: Path) -> None:
    table = open_table(made)
    with store_of(table)._lock:
        process = multiprocessing.get_context("fork").Process(target=table.load_images, args=(table[0],))
        process.start()
        process.join(20)
        process.kill()
    assert process.exitcode == 0


@pytest.mark.parametrize("url", ["https://me:secret@host/shards", "https://host/shards?sv=1&sig=secret"])
def test_a_url_with_credentials_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="has credentials in it") as caught:
        open_table(Path(url))
    assert "secret" not in str(caught.value)


def _read_all(url: str, start: int, results: Any) -> None:
    table = open_table(url)
    table.assign_shards([list(range(SHARDS))])
    order = np.roll(np.arange(len(table)), start)
    results.put([len(table.load_images(table[int(index)])) for index in order])


def test_processes_of_a_machine_fetch_a_shard_once(server: FileServer) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    open_table(server.url)
    processes = [context.Process(target=_read_all, args=(server.url, 5 * number, results)) for number in range(3)]
    for process in processes:
        process.start()
    read = [results.get() for _ in processes]
    for process in processes:
        process.join(20)
    assert read == [[1] * 4 * SHARDS] * 3
    assert sorted(server.whole()) == [f"{number:05d}.tar" for number in range(SHARDS)]


def test_a_missing_driver_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme, extra in (("s3", "s3"), ("gs", "gcs"), ("abfs", "abfs")):
        for module in ("s3fs", "gcsfs", "adlfs"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError) as caught:
            open_table(Path(f"{scheme}://bucket/shards"))
        assert f'pip install "phi3v[{extra}]"' in str(caught.value)
        assert f"{scheme}://bucket/shards" in str(caught.value)
    with pytest.raises(UserError, match="no such URL"):
        open_table("nothing://bucket/shards")


def test_shards_on_another_file_system_of_fsspec(made: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(made), "/bucket/shards", recursive=True)
    try:
        table = open_table("memory://bucket/shards")
        assert [len(table.load_images(record)) for record in table] == [1] * len(table)
    finally:
        memory.rm("/bucket", recursive=True)


def test_reading_opens_no_more_files_than_a_window_has(server: FileServer) -> None:
    table = open_table(server.url, shuffle_window=2)
    table.assign_shards([list(range(SHARDS))])
    for record in table:
        table.load_images(record)
    folder = os.path.realpath(ShardCache(1).folder)
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert len({name for name in opened if name.startswith(folder) and len(Path(name).name) == 64}) <= 2
