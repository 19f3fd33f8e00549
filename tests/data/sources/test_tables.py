from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_files import cauldron_row, save_to_disk, write_parquet
from sample_files import image_bytes

from phi3v.data.sources import tables
from phi3v.data.sources.tables import local_source, open_folder, open_hub
from phi3v.errors import UserError

DEFAULT = ("HuggingFaceM4/the_cauldron", "docvqa")


def rows(start: int, count: int) -> list[dict[str, Any]]:
    return [cauldron_row([image_bytes(k)], [(f"q{k}", f"a{k}")]) for k in range(start, start + count)]


def questions(table: tables.Table) -> list[str]:
    return [row["texts"][0]["user"] for row in table]


def test_files_of_a_split_are_read_one_after_the_other_and_not_decoded(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-00001-of-00002-abc.parquet", rows(5, 5))
    write_parquet(tmp_path / "data" / "train-00000-of-00002-def.parquet", rows(0, 5))
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", rows(10, 2))
    opened = open_folder(tmp_path)
    assert sorted(opened) == ["train", "val"]
    assert questions(opened["train"]) == [f"q{k}" for k in range(10)]
    assert (opened["train"].num_rows, opened["val"].num_rows) == (10, 2)
    assert next(iter(opened["val"]))["images"][0]["bytes"] == image_bytes(10)


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    opened = open_folder(save_to_disk(tmp_path / "saved", {"train": rows(0, 3), "test": rows(3, 2)}))
    assert {split: questions(table) for split, table in opened.items()} == {
        "test": ["q3", "q4"],
        "train": ["q0", "q1", "q2"],
    }
    assert opened["train"].num_rows == 3


def test_the_names_of_splits_are_those_of_other_files(tmp_path: Path) -> None:
    for name in ("training-0", "dev-0", "evaluation-0", "testing-0"):
        write_parquet(tmp_path / f"{name}.parquet", rows(0, 1))
    assert list(open_folder(tmp_path)) == ["train", "val", "eval", "test"]


def test_one_file_is_a_source_too(tmp_path: Path) -> None:
    opened = open_folder(write_parquet(tmp_path / "mine.parquet", rows(0, 3)))
    assert list(opened) == ["train"]
    assert opened["train"].num_rows == 3


@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
def test_the_bytes_of_all_rows_are_never_in_memory_at_once(tmp_path: Path, form: str) -> None:
    """In one row group, or one batch, as some files have them."""
    count, size = 200, 100_000
    noise = np.random.default_rng(0)
    cells = [{"bytes": noise.bytes(size), "path": None} for _ in range(count)]
    table = pa.table({"image": pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
    file = tmp_path / ("train.parquet" if form == "parquet" else "train.arrow")
    if form == "parquet":
        pq.write_table(table, file, row_group_size=count)
    else:
        writer = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with writer(file, table.schema) as sink:
            sink.write_table(table)
    opened = open_folder(tmp_path)["train"]
    assert opened.num_rows == count
    tracemalloc.start()
    seen = sum(len(row["image"]["bytes"]) for row in opened)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == count * size
    assert peak < count * size / 4


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train-0.parquet", rows(0, 3))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"train-0\.parquet: cannot be read"):
        open_folder(tmp_path)


def test_a_table_that_lacks_columns_says_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"picture": ["a"], "texts": ["b"]}).to_parquet(file)
    with pytest.raises(UserError, match="lacks the columns images; it has picture, texts"):
        open_folder(file)["train"].require(("images", "texts"))


def test_paths_come_before_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_source(None) is None
    assert local_source("nielsr/docvqa_1200_examples") is None
    (tmp_path / "nielsr" / "docvqa_1200_examples").mkdir(parents=True)
    assert local_source("nielsr/docvqa_1200_examples") == Path("nielsr/docvqa_1200_examples")
    for name in ("data", "/data/docvqa", "../docvqa", "a/b/c"):
        with pytest.raises(UserError, match="no such file or folder"):
            local_source(name)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        (None, ("HuggingFaceM4/the_cauldron", "docvqa")),
        ("HuggingFaceM4/the_cauldron", ("HuggingFaceM4/the_cauldron", "docvqa")),
        ("nielsr/docvqa_1200_examples", ("nielsr/docvqa_1200_examples", None)),
    ],
)
def test_the_hub_gives_what_the_source_names(
    source: str | None, asked: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load(*arguments: Any) -> datasets.DatasetDict:
        calls.append(arguments)
        table = datasets.Dataset.from_list(rows(0, 3))
        return datasets.DatasetDict({"train": table, "validation": table})

    monkeypatch.setattr(tables.datasets, "load_dataset", load)
    opened = open_hub(source, *DEFAULT)
    assert calls == [asked]
    assert questions(opened["val"]) == ["q0", "q1", "q2"]
    assert next(iter(opened["train"]))["images"][0]["bytes"] == image_bytes(0)


def test_without_the_hub_it_says_what_to_do() -> None:
    """The tests' environment says that there is no hub."""
    with pytest.raises(UserError, match=r"the_cauldron \(docvqa\): cannot be had from the hub") as caught:
        open_hub(None, *DEFAULT)
    assert "--source" in str(caught.value)


def test_a_damaged_arrow_file_is_refused_before_its_memory_is_read(tmp_path: Path) -> None:
    """Its offsets point behind the bytes, at what else is mapped there: garbage, or the end of the process."""
    file = tmp_path / "train.arrow"
    table = pa.table({"a": [b"ab", b"cd", b"ef"]})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    offsets = np.array([0, 2, 4, 6], np.int32).tobytes()
    assert file.read_bytes().count(offsets) == 1
    file.write_bytes(file.read_bytes().replace(offsets, np.array([0, 2, 4, 20], np.int32).tobytes()))
    with pytest.raises(UserError, match="cannot be read"):
        list(open_folder(tmp_path)["train"])
