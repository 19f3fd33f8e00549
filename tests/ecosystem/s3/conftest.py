"""A bucket of shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from bucket import BUCKET, Server
from PIL import Image

from phi3v.data.shards import remote
from phi3v.data.shards.write import ShardOptions, shard_data


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server with a bucket, which the AWS tools of this process and its children ask."""
    server = Server()
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
    yield server
    server.stop()


@pytest.fixture
def shards(tmp_path: Path, server: Server) -> Path:
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
