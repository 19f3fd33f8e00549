"""Tar and parquet files that are there already: indexed, and read as shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from file_server import serving
from PIL import Image

from phi3v.cli import main
from phi3v.data.shards.existing import index_existing
from phi3v.data.shards.store import ShardStore
from phi3v.data.shards.write import ShardOptions, shard_data
from phi3v.data.table import open_table
from phi3v.errors import UnavailableError, UserError


def image(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (10 + seed, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes | dict[str, Any]]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square"}]
CHAT = [{"role": "user", "content": "Compare <image> and <image>"}, {"role": "assistant", "content": "Alike"}]
SIMPLE = {"question": "Q?", "answer": "ja"}
OWN = {"id": "a", "conversations": [{"user": "?", "assistant": "y"}]}
ALONE = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "y"}]
TEXTS = [("0.png", image(3)), ("0.txt", b"a cat"), ("1.png", image(4)), ("1.txt", b"a dog")]
FAR = "d" * 150
SAMPLES: list[tuple[str, list[tuple[str, Any]], list[Any]]] = [
    ("llava", [("a.jpg", image(1, "JPEG")), ("a.json", {"image": "b", "conversations": LLAVA})], [("A square", 1)]),
    ("chat", [("ü.0.png", image(1)), ("ü.1.png", image(2)), ("ü.json", {"messages": CHAT})], [("Alike", 2)]),
    ("question", [("0.png", image(3)), ("0.json", SIMPLE)], [("ja", 1)]),
    ("text", TEXTS, [("a cat", 1), ("a dog", 1)]),
    ("long names", [(f"{FAR}/k.png", image(5)), (f"{FAR}/k.json", SIMPLE)], [("ja", 1)]),
    ("outside", [("../../k.png", image(5)), ("../../k.json", SIMPLE)], [("ja", 1)]),
    ("no image", [("k.json", {"messages": ALONE})], [("y", 0)]),
    ("other endings", [("0.jfif", image(1, "JPEG")), ("0.npy", b"x"), ("0.json", SIMPLE)], [("ja", 1)]),
    ("the same twice", [("ü.0.png", image(1)), ("ü.1.png", image(1)), ("ü.json", {"messages": CHAT})], [("Alike", 2)]),
]


@pytest.mark.parametrize(("members", "expected"), [each[1:] for each in SAMPLES], ids=[each[0] for each in SAMPLES])
def test_samples_of_a_tar(tmp_path: Path, members: Any, expected: Any) -> None:
    file = write_tar(tmp_path / "a.tar", members)
    content = file.read_bytes()
    index_existing([str(file)], tmp_path / "index", ShardOptions(question="What is it?"))
    table = open_table(tmp_path / "index")
    assert [(record.turns[-1].assistant, len(record.images)) for record in table] == expected
    images = [data for name, data in members if name.endswith(("png", "jpg", "jfif"))]
    loaded = [each for record in table for each in table.load_images(record)]
    opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in images]
    assert all(np.array_equal(one, other) for one, other in zip(loaded, opened, strict=True))
    assert [size for record in table for size in table.image_sizes(record)] == [each.size for each in opened]
    assert file.read_bytes() == content
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent.name == "index") == [
        "images.arrow",
        "index.json",
        "records.arrow",
    ]


def chats(value: Callable[[bytes], Any]) -> list[dict[str, Any]]:
    turns = [{"user": f"Q{k}", "assistant": f"A{k}"} for k in range(2)]
    return [{"images": [value(image(seed)), value(image(seed + 10))], "texts": turns} for seed in range(3)]


@pytest.mark.parametrize("remote", [False, True])
def test_parquet_with_images_in_it(tmp_path: Path, remote: bool) -> None:
    (tmp_path / "in").mkdir()
    rows = chats(lambda data: {"bytes": data, "path": "../a.png"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "a.parquet", row_group_size=2)
    pairs = [{"image": image(7), "question": "Which?", "answer": "b", "image_id": 3}]
    pq.write_table(pa.Table.from_pylist(pairs), tmp_path / "in" / "b.parquet")
    with serving(tmp_path / "in") as server:
        names = [f"{server.url}/{name}" for name in ("a.parquet", "b.parquet")] if remote else [str(tmp_path / "in")]
        index_existing(names, tmp_path / "index", ShardOptions())
        table = open_table(tmp_path / "index")
        assert [record.turns[0].assistant for record in table] == ["A0", "A1"] * 3 + ["b"]
        assert table.shards == (6, 1)
        for place, record in enumerate(table):
            seeds = [place // 2, place // 2 + 10] if place < 6 else [7]
            assert [each.size[1] for each in table.load_images(record)] == [10 + seed for seed in seeds]


def test_a_wrong_hash_of_an_image_in_parquet_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    rows = [{"image": image(7), "question": "Which?", "answer": "b", "image_id": 3}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "a.parquet")
    index_existing([str(tmp_path / "in")], tmp_path / "index", ShardOptions())
    table = open_table(tmp_path / "index")
    assert isinstance(table.images, ShardStore)
    monkeypatch.setattr(table.images.index.images, "sha256", lambda _: bytes(32))
    for _ in range(2):  # fetched, and fetched again; then as it is
        with pytest.raises(UserError, match="other bytes than the index says") as caught:
            table.load_images(table[0])
        assert not isinstance(caught.value, UnavailableError)


def test_a_tar_elsewhere_is_fetched_once_as_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "a.tar", TEXTS)
    with serving(tmp_path / "in") as server:
        index_existing([f"{server.url}/a.tar"], tmp_path / "index", ShardOptions(question="What?"))
        table = open_table(tmp_path / "index")
        table.assign_shards([[0]])
        server.forget()
        assert [image.size[1] for record in table for image in table.load_images(record)] == [13, 14]
        assert server.requests == [("a.tar", None)]


def test_shards_of_ours_need_no_index_to_be_indexed(tmp_path: Path, root: Path, write: Any, record: Any) -> None:
    (root / "train" / "1.png").write_bytes(image(3))
    file = write(record("a"), record("b"), record("c", images=["train/1.png", "train/0.png"], rejected="red"))
    assert main(["data", "shard", str(file), "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "index.json").unlink()
    assert main(["data", "shard", str(tmp_path / "out"), "--index-only", "--out", str(tmp_path / "index")]) == 0
    again, original = (
        {record.id: (record.turns[0].texts, record.images) for record in open_table(path)}
        for path in (tmp_path / "index", file)
    )
    assert again == original
    table = open_table(tmp_path / "index")
    assert [len(table.load_images(record)) for record in table] == [len(record.images) for record in table]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"no image"), ("a.json", {"question": "?", "answer": "y"})], "is not an image that can be read"),
        ([("a.png", image(1)[:-60]), ("a.json", {"question": "?", "answer": "y"})], "is truncated"),
        ([("a.png", image(1)), ("a.json", b"{")], "is no JSON"),
        ([("a.png", image(1)), ("a.json", {"question": "?"})], "no column looks like the answer"),
        ([("a.png", image(1)), ("a.json", {"question": "?", "answer": "<|end|>"})], "special token"),
        ([("a.png", image(1)), ("a.json", OWN)], "has 1 images, and its records name 0 of them"),
        ([("a.picture", image(1)), ("a.json", {"question": "?", "answer": "y"})], "a member that is none"),
    ],
)
def test_a_bad_sample_is_named(tmp_path: Path, members: Any, message: str) -> None:
    file = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message) as caught:
        index_existing([str(file)], tmp_path / "index", ShardOptions())
    assert f"{file}: a" in str(caught.value)
    assert not (tmp_path / "index" / "index.json").exists()


def test_a_name_of_two_images_or_an_id_of_two_records_is_refused(tmp_path: Path) -> None:
    for place in (0, 1):
        folder = tmp_path / str(place)
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "p.png").write_bytes(image(place))
        turn = {"images": ["p.png"], "user": "?", "assistant": "y"}
        (folder / "a.jsonl").write_text(json.dumps({"id": str(place), "conversations": [turn]}) + "\n")
        shard_data([folder / "a.jsonl"], folder / "out", ShardOptions())
    folders = [str(tmp_path / name / "out") for name in "01"]
    with pytest.raises(
        UserError, match=r"'p.png' stands for two images, this one and one in .*0/out/00000.tar"
    ) as caught:
        index_existing(folders, tmp_path / "index", ShardOptions())
    assert caught.value.where == f"{folders[1]}/00000.tar"
    with pytest.raises(UserError, match="the id '0' is there twice"):
        index_existing([folders[0], folders[0]], tmp_path / "twice", ShardOptions())
    again: list[tuple[str, Any]] = [
        ("x.png", image(1)),
        ("x.json", SIMPLE),
        ("y.json", SIMPLE),
        ("x.png", image(2)),
        ("x.json", SIMPLE),
    ]
    with pytest.raises(UserError, match="the id 'a/x' is there twice"):
        index_existing([str(write_tar(tmp_path / "a.tar", again))], tmp_path / "x", ShardOptions())


def test_what_cannot_be_indexed(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    pq.write_table(pa.table({"image": ["a.png"], "answer": ["b"]}), tmp_path / "b.parquet")
    for source, message in (
        (tmp_path / "a.tar", "cannot be read as a tar file"),
        (tmp_path / "b.parquet", "no column with the bytes of images"),
        (tmp_path / "none.tar", "no such file"),
        (tmp_path / "none", "no tar or parquet files there"),
    ):
        with pytest.raises(UserError, match=message):
            index_existing([str(source)], tmp_path / f"index {source.name}", ShardOptions())


def test_an_index_whose_shards_were_lost_or_changed(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", SAMPLES[2][1])
    index_existing([str(file)], tmp_path / "index", ShardOptions())
    table = open_table(tmp_path / "index")
    write_tar(tmp_path / "a.tar", [("0.png", image(4)), ("0.json", {"question": "Q?", "answer": "ja"})])
    with pytest.raises(UserError, match="other bytes than the index says"):
        table.load_images(table[0])
    file.unlink()
    with pytest.raises(UserError, match="is not there"):
        open_table(tmp_path / "index").load_images(table[0])
