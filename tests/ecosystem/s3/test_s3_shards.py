"""Shards in a bucket, read with s3fs from a server that speaks S3 (moto)."""

from __future__ import annotations

from pathlib import Path

import boto3
import numpy as np
import pytest
from bucket import BUCKET

from phi3v.data.lengths import measure_table
from phi3v.data.shards.existing import index_existing
from phi3v.data.shards.write import ShardOptions
from phi3v.data.table import RecordTable, open_table
from phi3v.errors import UserError


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
