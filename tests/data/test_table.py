from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phi3v.data import lines, record_rows
from phi3v.data.cache import cache_folder, cache_root, content_hash
from phi3v.data.check import ensure_checked
from phi3v.data.faults import DataFaultsError
from phi3v.data.image_store import FolderStore
from phi3v.data.images import image_size
from phi3v.data.jsonl import write_jsonl
from phi3v.data.schema import Record, Turn
from phi3v.data.table import RecordTable, open_table
from phi3v.errors import UserError

MakeRecord = Callable[..., dict[str, Any]]


@pytest.fixture
def no_parser(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it: from then on, parsing a line fails the test."""

    def forbid() -> None:
        def fail(*_: object, **__: object) -> None:
            raise AssertionError("a line was parsed")

        monkeypatch.setattr(lines, "read_line", fail)

    return forbid


def conversations(count: int) -> list[dict[str, Any]]:
    """``count`` records as easy-VQA has them: one image, some turns."""
    return [
        {
            "id": f"train-{k:06d}",
            "source": "easy-vqa",
            "conversations": [
                {"images": [f"train/{k}.png"], "user": f"is there shape {k}?", "assistant": "yes"},
                *[{"user": "what color is it?", "assistant": "blue"}] * (k % 4),
            ],
        }
        for k in range(count)
    ]


def test_records_come_back_as_written(write: Any, record: MakeRecord) -> None:
    turns = [
        {"user": "Who? ☂", "assistant": "Zoë", "images": ["a.png", "b.png"], "answers": ["Zoë", "Z"]},
        {"user": "", "assistant": "c", "images": ["c.png"]},
    ]
    path = write(record("first"), "", {"id": "second", "conversations": turns}, '{"id": "x"', name="a.jsonl")
    path.write_text(path.read_text().replace('{"id": "x"\n', ""))
    opened = open_table(path)
    assert len(opened) == 2
    assert opened[0] == Record(
        "first", "easy-vqa", (Turn("what color is the shape?", "blue", ("train/0.png",), ()),), 1
    )
    second = Record(
        "second", None, (Turn("Who? ☂", "Zoë", ("a.png", "b.png"), ("Zoë", "Z")), Turn("", "c", ("c.png",))), 3
    )
    assert opened[1] == opened[-1] == opened[np.int64(1)] == second
    assert list(opened) == [opened[0], second]
    assert opened.questions().tolist() == [[0, 0], [1, 0], [1, 1]]
    assert opened.image_counts().tolist() == [1, 3]
    assert opened.images == FolderStore(path.parent / "images")
    assert opened.path == path
    for index in (2, -3):
        with pytest.raises(IndexError):
            opened[index]


def test_what_a_turn_and_a_record_may_say_more(tmp_path: Path) -> None:
    path = tmp_path / "more.jsonl"
    turns = [
        {"user": "A : B: ", "assistant": "no", "weight": 0, "images": ["a.png", "b.png"], "image_offsets": [2, 7]},
        {"user": "look again", "assistant": "yes"},
    ]
    write_jsonl(path, [{"id": "a", "system": "Be brief.", "conversations": turns}])
    opened = open_table(path)
    first = Turn("A : B: ", "no", ("a.png", "b.png"), image_offsets=(2, 7), weight=0)
    assert opened[0] == Record("a", None, (first, Turn("look again", "yes")), 1, "Be brief.")
    assert list(opened) == [opened[0]]
    assert opened.questions().tolist() == [[0, 1]]  # a turn of weight 0 is neither trained on nor evaluated


def test_preferences_come_back_and_are_counted_without_reading_texts(tmp_path: Path) -> None:
    turn = {"user": "shape?", "assistant": "circle"}
    judged = [turn | {"rejected": ["square", "disc"], "scores": [1, 0.1, 0]}, turn | {"label": False}]
    judged += [turn | {"label": True}, turn, turn | {"rejected": "a cat"}]
    write_jsonl(tmp_path / "a.jsonl", [{"id": str(k), "conversations": [turn, last]} for k, last in enumerate(judged)])
    opened = open_table(tmp_path / "a.jsonl")
    assert opened[0].turns[1] == Turn("shape?", "circle", rejected=("square", "disc"), scores=(1.0, 0.1, 0.0))
    assert opened[4].rejected == ("a cat",)
    assert opened.rejected_counts().tolist() == [2, 0, 0, 0, 1]
    assert opened.labels().tolist() == [-1, 0, 1, -1, -1]


def test_the_second_opening_parses_nothing(tmp_path: Path, no_parser: Callable[[], None]) -> None:
    path = tmp_path / "many.jsonl"
    records = conversations(20_000)
    write_jsonl(path, records)
    first = open_table(path)
    no_parser()
    second = open_table(path)
    assert len(second) == len(first) == 20_000
    for k in (0, 4095, 4096, 12_345, 19_999):
        assert second[k] == first[k]
        assert (second[k].id, second[k].line) == (f"train-{k:06d}", k + 1)
        assert second[k].turns[0].user == f"is there shape {k}?"
    assert [read.id for read in second] == [written["id"] for written in records]
    assert np.bincount(second.questions()[:, 0]).tolist() == [1 + k % 4 for k in range(20_000)]


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_rows, "_BATCH_ROWS", 256)

    def peak(count: int) -> tuple[int, int]:
        """Bytes that Python holds at most while parsing, and while iterating over the mapped table."""
        path = tmp_path / f"{count}.jsonl"
        write_jsonl(path, conversations(count))
        tracemalloc.start()
        opened = open_table(path)
        parsing = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        base = tracemalloc.get_traced_memory()[0]
        assert sum(1 for _ in opened) == count
        iterating = tracemalloc.get_traced_memory()[1] - base
        tracemalloc.stop()
        return parsing, iterating

    peak(1_000)  # imports and caches of the libraries
    small, large = peak(2_000), peak(12_000)
    grown = 10_000 * 16  # the hash and the line of every id, kept while parsing
    slack = 1_000_000  # a batch of rows comes and goes; 10,000 records held would be over 10 MB
    assert large[0] - small[0] < 4 * grown + slack
    assert large[1] - small[1] < slack


def test_an_edited_file_is_parsed_again(write: Any, record: MakeRecord) -> None:
    """Whatever its size and time say: ``touch -d``, ``cp -p`` and ``mv`` of another file set them back."""
    path = write(record("a"))
    status = path.stat()
    assert open_table(path)[0].id == "a"
    write(record("b"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert open_table(path)[0].id == "b"
    assert ensure_checked(path, image_level="off").sha256 == open_table(path).sha256


def test_what_was_checked_is_what_is_opened(write: Any, record: MakeRecord) -> None:
    path = write(record("a"))
    checked = ensure_checked(path, image_level="off")
    write(record("b"))
    assert open_table(path, sha256=checked.sha256)[0].id == "a"
    assert open_table(path)[0].id == "b"


def test_a_checked_file_is_not_parsed_again(
    write: Any, record: MakeRecord, no_parser: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(record("a", images=[]), "", record("b"))
    checked = ensure_checked(path)
    no_parser()
    opened = open_table(path)
    assert [(read.id, read.line) for read in opened] == [("a", 1), ("b", 3)]
    assert checked.records == 2
    with pytest.raises(AssertionError, match="a line was parsed"):
        ensure_checked(path, image_level="header")


def test_a_file_with_faults_leaves_no_table(write: Any, record: MakeRecord) -> None:
    path = write(record("a"), record("b", assistant=""))
    with pytest.raises(DataFaultsError):
        ensure_checked(path, image_level="off")
    assert not list(cache_folder(content_hash(path), "refuse").glob("*records*"))


def test_refuse_and_escape_are_kept_apart(write: Any, record: MakeRecord) -> None:
    path = write(record("a"), record("b", user="what is <|end|>?"))
    assert open_table(path, special_text="escape")[1].turns[0].user == "what is < |end|>?"
    with pytest.raises(DataFaultsError, match=r"data.jsonl:2: conversations\[0\].user: holds text"):
        open_table(path)


@pytest.mark.parametrize("damage", ["truncate", "garbage", "no arrow", "no mark", "bad mark", "wrong count"])
def test_a_damaged_cache_is_built_again(write: Any, record: MakeRecord, damage: str) -> None:
    path = write(*[record(str(k)) for k in range(50)])
    open_table(path)
    arrow = cache_folder(content_hash(path), "refuse") / "records.arrow"
    mark = arrow.with_name("records.json")
    whole = arrow.read_bytes()
    if damage == "truncate":
        arrow.write_bytes(whole[:-100])
    elif damage == "garbage":
        arrow.write_bytes(b"\0\1" * (len(whole) // 2))
    elif damage == "no arrow":
        arrow.unlink()
    elif damage == "no mark":
        mark.unlink()
    elif damage == "bad mark":
        mark.write_text('{"records": 50')
    else:
        mark.write_text(mark.read_text().replace('"records": 50', '"records": 49'))
    assert [read.id for read in open_table(path)] == [str(k) for k in range(50)]
    assert arrow.read_bytes() == whole


def test_an_interrupted_parse_leaves_nothing_that_looks_whole(
    write: Any, record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(record("a"), record("b"))
    real = lines.read_line

    def interrupted(*args: Any, line: int, **options: Any) -> Any:
        if line == 2:
            raise KeyboardInterrupt
        return real(*args, line=line, **options)

    monkeypatch.setattr(lines, "read_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_table(path)
    assert not list(cache_folder(content_hash(path), "refuse").glob("*records*"))
    monkeypatch.setattr(lines, "read_line", real)
    assert len(open_table(path)) == 2


def test_faults_are_listed_in_line_order_and_counted(write: Any, record: MakeRecord) -> None:
    bad = [record(str(k), assistant="") for k in range(5)]
    path = write(record("a"), record("a"), *bad, record("a"))
    with pytest.raises(DataFaultsError) as caught:
        open_table(path, max_errors=3)
    error = caught.value
    assert error.total == 7
    assert error.exact
    assert [(fault.line, fault.field) for fault in error.faults] == [
        (2, "id"),
        (3, "conversations[0].assistant"),
        (4, "conversations[0].assistant"),
    ]
    assert str(error).startswith(f"{path}: 7 faults (the first 3 follow)\n{path}:2: id: 'a' is the id of line 1 too")
    assert f"{path}:3: conversations[0].assistant: is empty" in str(error)


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff\n"])
def test_a_file_without_a_record(write: Any, text: str) -> None:
    with pytest.raises(UserError, match="holds no record"):
        open_table(write(text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_table(tmp_path / "none.jsonl")


def test_a_file_that_changes_while_it_is_read(write: Any, record: MakeRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(record("a"))
    real = lines.read_line

    def append(*args: Any, **options: Any) -> Any:
        with path.open("a") as file:
            file.write("\n")
        return real(*args, **options)

    monkeypatch.setattr(lines, "read_line", append)
    with pytest.raises(UserError, match="changed while it was read"):
        open_table(path)


def test_a_cache_that_cannot_be_written(
    write: Any, record: MakeRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write the cache") as caught:
        open_table(write(record("a")))
    assert "PHI3V_CACHE" in str(caught.value)


def test_the_cache_is_beside_that_of_datasets_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.delenv("PHI3V_CACHE")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    assert cache_root() == tmp_path / "hf" / "phi3v"


def test_images_are_loaded_in_order_and_a_bad_one_names_its_line(write: Any, record: MakeRecord) -> None:
    path = write(record("a", images=["train/0.png"] * 2), record("b", images=["train/0.png", "train/1.png"]))
    opened = open_table(path)
    assert opened.image_sizes(opened[0]) == [(64, 64)] * 2
    assert [image.size for image in opened.load_images(opened[0])] == [(64, 64)] * 2
    with pytest.raises(UserError, match=r"does not exist: 'train/1\.png'") as caught:
        opened.load_images(opened[1])
    assert caught.value.where == f"{path}:2: conversations[0].images[1]"
    with pytest.raises(UserError, match="above the limit of 100"):
        open_table(path, max_pixels=100).load_images(opened[0])


def test_a_table_travels_to_workers_without_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    write_jsonl(path, conversations(5_000))
    opened = open_table(path)
    sent = pickle.dumps(opened)
    assert len(sent) < 20_000
    received: RecordTable = pickle.loads(sent)
    assert received[4_999] == opened[4_999]
    assert received.images == opened.images


def test_two_processes_open_the_same_new_file_at_once(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "many.jsonl"
    write_jsonl(path, conversations(5_000))
    script = (
        "import sys, pathlib, phi3v.data.table as table, phi3v.data.lines as lines\n"
        "read, parsed = lines.read_line, []\n"
        "lines.read_line = lambda *a, **k: parsed.append(1) or read(*a, **k)\n"
        "opened = table.open_table(pathlib.Path(sys.argv[1]))\n"
        "print(len(parsed), len(opened), hash(tuple(opened)) == hash(tuple(table.open_table(opened.path))))\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = sorted(process.communicate(timeout=60)[0].split() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [["0", "5000", "True"], ["5000", "5000", "True"]]


def test_sizes_and_images_are_turned_or_not_alike(root: Path, write: Callable[..., Path], record: MakeRecord) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(root / "a.jpg", exif=exif)
    path = write(record(images=["a.jpg"]))
    for applied, size in ((True, (20, 30)), (False, (30, 20))):
        table = open_table(path, exif_orientation=applied)
        assert table.image_sizes(table[0]) == [size]
        assert [image.size for image in table.load_images(table[0])] == [size]
        assert table.of_image(image_size, "a.jpg") == size
        report = ensure_checked(path, exif_orientation=applied)
        assert report.image_kinds == {"exif_orientation" if applied else "exif_ignored": 1}
        assert ensure_checked(path, exif_orientation=applied).image_kinds == report.image_kinds
