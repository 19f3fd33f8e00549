"""Shards in a bucket, read with s3fs from a server that speaks S3 (moto)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from phi3v.data.lengths import measure_table
from phi3v.data.shards import remote
from phi3v.data.shards.existing import index_existing
from phi3v.data.shards.write import ShardOptions, shard_data
from phi3v.data.table import RecordTable, open_table
from phi3v.errors import UserError

BUCKET = "pages"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of the server, which has a bucket."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    for name, value in (
        ("AWS_ENDPOINT_URL", url),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("PHI3V_CACHE", str(tmp_path / "cache")),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield url
    server.stop()


@pytest.fixture
def shards(tmp_path: Path, bucket: str) -> Path:
    """A folder of shards, of which the bucket has a copy under ``train/``."""
    (tmp_path / "images").mkdir()
    lines = []
    for page in range(8):
        pixels = np.random.default_rng(page).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{page}.png")
        turn = {"images": [f"{page}.png"], "user": "Which?", "assistant": str(page)}
        lines.append({"id": str(page), "conversations": [turn]})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shard_data([tmp_path / "train.jsonl"], tmp_path / "shards", ShardOptions(shard_size=15_000))
    client = boto3.client("s3")
    for file in (tmp_path / "shards").iterdir():
        client.upload_file(str(file), BUCKET, f"train/{file.name}")
    return tmp_path / "shards"


def assert_same_images(one: RecordTable, other: RecordTable) -> None:
    assert len(one) == len(other) == 8
    for a, b in zip(one, other, strict=True):
        assert a.turns[0].assistant == b.turns[0].assistant
        assert np.array_equal(one.load_images(a)[0], other.load_images(b)[0])


@pytest.mark.parametrize("own", [True, False])
def test_shards_in_a_bucket_are_read_whole_and_image_by_image(shards: Path, own: bool) -> None:
    table = open_table(f"s3://{BUCKET}/train")
    assert len(table.shards) > 2
    assert len(measure_table(table, None)) == 8
    table.assign_shards([list(range(len(table.shards)))] if own else [])
    assert_same_images(table, open_table(shards))


def test_tars_in_a_bucket_get_an_index_here(shards: Path, tmp_path: Path) -> None:
    index_existing([f"s3://{BUCKET}/train"], tmp_path / "index", ShardOptions())
    assert_same_images(open_table(tmp_path / "index"), open_table(shards))


def test_what_is_missing_or_forbidden_is_said(shards: Path) -> None:
    with pytest.raises(UserError, match="the index is not there"):
        open_table(f"s3://{BUCKET}/nothing")
    table = open_table(f"s3://{BUCKET}/train")
    table.assign_shards([])
    boto3.client("s3").delete_object(Bucket=BUCKET, Key="train/00000.tar")
    with pytest.raises(UserError, match=r"the shard is not there: s3://pages/train/00000.tar"):
        table.load_images(table[0])
