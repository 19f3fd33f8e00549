"""What goes over all images before training takes one shard after the other, with a cache that has room for few."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_server import FileServer, serving
from mixture_data import questions, write
from ranks import run_ranks
from rich.console import Console
from run_helpers import load

from phi3v.config import DataSource, MethodConfig, RunConfig
from phi3v.data.mixture import mix_tables
from phi3v.data.shards.write import ShardOptions, shard_data
from phi3v.data.table import open_table
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train import reference
from phi3v.train.collectives import HostCollectives
from phi3v.train.compute.feature_cache import fill_features
from phi3v.train.device import choose_device
from phi3v.train.prepare import prepare


@pytest.fixture(scope="module")
def shards(easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of answers to two questions about each of eighteen images."""
    folder = tmp_path_factory.mktemp("fills")
    asked = questions(easy_vqa, range(6, 24), 1, "b") + questions(easy_vqa, range(6, 24), 2, "c")
    for record in asked:
        record["conversations"][0]["rejected"] = "none"
    shard_data([write(easy_vqa, folder / "b.jsonl", asked)], folder / "shards", ShardOptions(shard_size=10_000))
    return folder / "shards"


def room(shards: Path, count: float) -> float:
    """GB for so many shards."""
    return count * max(file.stat().st_size for file in shards.glob("*.tar")) / 1e9


def asked_for(server: FileServer) -> tuple[list[str], list[str]]:
    """The shards that were asked for whole, and for an image alone."""
    return sorted(server.whole()), [name for name, start in server.requests if start is not None]


def names(shards: Path) -> list[str]:
    return sorted(file.name for file in shards.glob("*.tar"))


@pytest.mark.parametrize("mixed", [False, True])
def test_features_are_computed_shard_by_shard(
    tmp_path: Path,
    small_model_dir: Path,
    easy_vqa: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    mixed: bool,
) -> None:
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path))
    file = open_table(write(easy_vqa, tmp_path / "a.jsonl", questions(easy_vqa, range(8), 0, "a")))
    processor = Phi3VProcessor.from_pretrained(small_model_dir).image_processor
    with serving(shards) as server:
        remote = open_table(server.url, cache_limit=room(shards, 3), shuffle_window=4)
        table = mix_tables([file, remote], ["a", "b"]) if mixed else remote
        images, _ = table.distinct_images()
        parts = table.images.shares(images, 3)
        assert sorted(name for part in parts for name in part) == sorted(images)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 + mixed
        model = load(small_model_dir, MethodConfig("frozen-vision"))
        fill_features("memory", model, table, processor, choose_device("fp32"), Console(quiet=True))
        assert asked_for(server) == (names(shards), [])


def log_probs(model: Path, sources: Sequence[dict[str, Any]], places: Sequence[str], out: Path, limit: float) -> None:
    """Of all answers by the reference; as `test_own_shards.epoch`."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have readers
    rank = int(os.environ.get("RANK", 0))
    os.environ["PHI3V_CACHE"] = str(out / f"disk-{rank}")
    reference.CHUNK = 2
    config = RunConfig()
    config.model.path, config.objective.name = str(model), "dpo"
    named = [DataSource(**source) for source in [*sources[:-1], sources[-1] | {"path": places[rank]}]]
    config.data = replace(config.data, train=named if len(named) > 1 else places[rank], cache_limit=limit)
    config.data.packing, config.data.pack_tokens, config.data.shuffle_window = "shared-image", 700, 4
    config.data.num_workers = 2 if len(places) > 1 else 0
    config.training.batch_size, config.training.max_steps = 8, 1
    config.training.output_dir, config.distributed.engine = str(out / "run"), "ddp"
    runtime = choose_device("fp32")
    run = prepare(config, Console(quiet=True), runtime, HostCollectives(runtime.world_size))
    run.folder.mkdir(parents=True, exist_ok=True)
    np.save(out / f"{rank}.npy", reference.reference_log_probs(run).numpy())


def test_the_reference_is_computed_shard_by_shard(
    tmp_path: Path, small_model_dir: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CHUNK", reference.CHUNK)  # back to what it was
    monkeypatch.setitem(os.environ, "PHI3V_CACHE", "")
    with serving(shards) as server:
        log_probs(small_model_dir, [{"path": ""}], [server.url], tmp_path, room(shards, 3))
        assert asked_for(server) == (names(shards), [])
    assert np.isfinite(np.load(tmp_path / "0.npy")).all()


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
def test_ranks_share_the_shards_of_a_reference(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, shards: Path, mixed: bool
) -> None:
    """The same values, bit for bit; at most one shard more for each rank, where their shares meet."""
    asked = questions(easy_vqa, range(13), 0, "a")
    for record in asked:
        record["conversations"][0]["rejected"] = ["none", "all"]
    file = write(easy_vqa, tmp_path / "a.jsonl", asked)
    sources: list[dict[str, Any]] = [{"path": str(file)}] * mixed + [{"path": "", "name": "b", "max_records": 5}]
    found = {}
    for ranks in (1, 2, 4):
        out = tmp_path / str(ranks)
        with ExitStack() as stack:
            servers = [stack.enter_context(serving(shards)) for _ in range(ranks)]
            places = [server.url for server in servers]
            run_ranks(ranks, log_probs, small_model_dir, sources, places, out, room(shards, 4), folder=out)
        whole = [name for server in servers for name in asked_for(server)[0]]
        assert set(whole) == set(names(shards))
        assert len(whole) <= len(names(shards)) + ranks - 1
        found[ranks] = [np.load(out / f"{rank}.npy") for rank in range(ranks)]
    assert all(np.array_equal(values, found[1][0]) for of_ranks in found.values() for values in of_ranks)
