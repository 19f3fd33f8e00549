"""Training on shards at a URL: the same as on the file they were made of, on any number of ranks, and gone on with."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_server import FileServer, serving
from ranks import run_ranks
from resume_helpers import assert_same_run, assert_same_weights, interrupted_copy, lines
from run_helpers import read_metrics

from phi3v.cli import main
from phi3v.config import DataSource, RunConfig
from phi3v.data.batches import BatchPlan
from phi3v.data.lengths import RecordLengths
from phi3v.data.mixture import mix_tables
from phi3v.data.order import Mixed, ShardWindows
from phi3v.data.shards.write import ShardOptions, shard_data
from phi3v.data.table import RecordTable, open_table
from phi3v.findings import Finding
from phi3v.train import open_data, prepare

WINDOW = 4


@pytest.fixture(scope="module")
def shards(easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "train"
    shard_data([easy_vqa / "train.jsonl"], folder, ShardOptions(shard_size=10_000))
    assert len(open_table(folder).shards) > WINDOW + 1
    return folder


@pytest.fixture(scope="module")
def in_order(shards: Path, easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of the shards, in their order, as a file beside its images."""
    folder = tmp_path_factory.mktemp("in-order")
    (folder / "images").symlink_to(easy_vqa / "images")
    texts = {json.loads(line)["id"]: line for line in (easy_vqa / "train.jsonl").read_text().splitlines()}
    (folder / "train.jsonl").write_text("".join(texts[record.id] + "\n" for record in open_table(shards)))
    return folder / "train.jsonl"


@pytest.fixture
def server(shards: Path) -> Iterator[FileServer]:
    with serving(shards) as server:
        yield server


def arguments(model: Path, data: object, out: Path, **others: object) -> list[str]:
    settings = {
        "model.path": model,
        "data.train": data,
        "data.num_workers": 2,
        "data.shuffle_window": WINDOW,
        "training.output_dir": out,
        "training.epochs": 1,
        "training.batch_size": 4,
        "training.learning_rate": 2e-3,
        "training.logging_steps": 1,
    } | {name.replace("__", "."): value for name, value in others.items()}
    return ["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def _train(words: list[str], cache: Path, shards: tuple[int, ...] = (), kill_at: tuple[int, Path] | None = None) -> int:
    """A rank with readers and a disk of its own; of a file, its records come in the order of shards."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have readers
    os.environ["PHI3V_CACHE"] = f"{cache}-{os.environ.get('RANK', '')}"
    if shards:
        prepare.order_of = lambda config, _: ShardWindows(shards, WINDOW, config.training.seed)
    if kill_at is not None:
        threading.Thread(target=_kill, args=kill_at, daemon=True).start()
    return main(words)


def _kill(step: int, metrics: Path) -> None:
    while not (metrics.is_file() and metrics.read_text().count("\n") >= step):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_two_ranks_read_shards_of_their_own_and_train_as_on_the_file(
    tmp_path: Path, small_model_dir: Path, server: FileServer, shards: Path, in_order: Path
) -> None:
    remote = arguments(small_model_dir, server.url, tmp_path / "remote")
    run_ranks(2, _train, remote, tmp_path / "disk", folder=tmp_path / "printed-1")
    whole, singles = server.whole(), [name for name, start in server.requests if start is not None]
    counts = open_table(shards).shards
    assert sorted(whole) == sorted(f"{number:05d}.tar" for number in range(len(counts)))
    # What the other rank computes to balance a step comes as single images: of some shards, and less than all of it.
    images = sum(len(record.images) for record in open_table(shards))
    assert len(singles) < images / 2
    local = arguments(small_model_dir, in_order, tmp_path / "local")
    run_ranks(2, _train, local, tmp_path / "file", counts, folder=tmp_path / "printed-2")
    assert lines(tmp_path / "remote") == lines(tmp_path / "local")
    assert_same_weights(tmp_path / "remote" / "final", tmp_path / "local" / "final")


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_the_same_records(
    tmp_path: Path, small_model_dir: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"checkpoint__save_steps": 2, "training__epochs": 2, "data__num_workers": 1}
    whole = arguments(small_model_dir, server.url, tmp_path / "whole", **settings)
    run_ranks(1, _train, whole, tmp_path / "disk", folder=tmp_path / "printed-1")
    steps = read_metrics(tmp_path / "whole")[-1]["step"]
    killed = arguments(small_model_dir, server.url, tmp_path / "killed", **settings)
    at = (steps // 2 + 2, tmp_path / "killed" / "metrics.jsonl")
    run_ranks(1, _train, killed, tmp_path / "other", (), at, folder=tmp_path / "printed-2", codes=(-signal.SIGKILL,))
    assert not (tmp_path / "killed" / "final").exists()
    run_ranks(1, _train, [*killed, "--resume", "auto"], tmp_path / "third", folder=tmp_path / "printed-3")
    assert_same_run(tmp_path / "whole", tmp_path / "killed", steps - steps % 2)


def test_ranks_without_shards_of_their_own_are_told(server: FileServer, shards: Path, in_order: Path) -> None:
    config = RunConfig()
    config.data.shuffle_window = 3
    remote, local, file = open_table(server.url), open_table(shards), open_table(in_order)

    def found(*tables: RecordTable, **amount: Any) -> Finding | None:
        table = tables[0] if len(tables) == 1 else mix_tables(tables, ["a", "b"])
        config.data.train = [DataSource("a"), DataSource("b", **amount)]
        return open_data.few_shards(open_data.order_of(config, table), 4)

    alone = found(remote)
    assert alone is not None
    assert alone.what.startswith("of 3 shards at a time, 1 of 4 ranks have none")
    assert open_data.few_shards(open_data.order_of(config, remote), 3) is None
    assert found(local) is None, "what is here is read where it lies"
    assert found(file) is None
    # Half of the records are in no shards, so there is enough for the rank that has none.
    assert found(file, remote) is None
    assert found(local, remote) is None
    much = found(file, remote, epochs=9)
    assert much is not None
    assert much.what.startswith("of 3 shards at a time, which 90% of the records are in, 1 of 4 ranks have none")
    assert found(file, remote, max_records=2) is None, "asked for image by image in any case"


@pytest.mark.slow
def test_four_ranks_train_as_one_does_which_goes_on_for_them(
    tmp_path: Path, small_model_dir: Path, server: FileServer
) -> None:
    settings = {"checkpoint__save_steps": 2, "checkpoint__keep_last": 100, "distributed__engine": "ddp"}
    four, one, part = tmp_path / "four", tmp_path / "one", tmp_path / "part"
    for ranks, out in ((4, four), (1, one)):
        words = arguments(small_model_dir, server.url, out, **settings)
        run_ranks(ranks, _train, words, tmp_path / f"disk-{ranks}", folder=tmp_path / f"printed-{ranks}")
    interrupted_copy(four, 2, part)
    words = [*arguments(small_model_dir, server.url, part, **settings), "--resume", "auto"]
    shown = run_ranks(1, _train, words, tmp_path / "disk", folder=tmp_path / "printed")
    assert "saved on 4 ranks, going on on 1" in shown
    for other in (one, part):
        for a, b in zip(lines(four), lines(other), strict=True):
            # Float32 sums in another order, carried through the optimizer's steps.
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
            assert a["samples"] == b["samples"]


def random_lengths(records: int, seed: int) -> RecordLengths:
    random = np.random.default_rng(seed)
    tokens = random.integers(200, 2000, records)
    crops = random.integers(2, 17, records)
    prefix = tokens // 2
    return RecordLengths(tokens, prefix, tokens // 10, crops, prefix, np.arange(records) // 3)


SHARDS = (60, 61, 62, 63, 58, 59, 57, 60, 30)
ALONE = ShardWindows(SHARDS, 4, 7)
# The second source is a file, of whose records no rank has any at hand; the third comes twice.
BESIDE = Mixed(
    (246, 200, 264), (246, 200, 528), 7, (replace(ALONE, shards=SHARDS[:4]), None, replace(ALONE, shards=SHARDS[4:]))
)


@pytest.mark.parametrize("packing", ["none", "samples", "shared-image"])
@pytest.mark.parametrize("order", [ALONE, BESIDE])
def test_every_record_comes_as_often_as_it_is_to_and_mostly_from_a_rank_s_own_shards(
    packing: Any, order: ShardWindows | Mixed
) -> None:
    lengths = random_lengths(sum(SHARDS) + 200 * (order is BESIDE), 3)
    shard_of = np.repeat(np.arange(len(SHARDS)), SHARDS)
    if order is BESIDE:
        shard_of = np.insert(shard_of, 246, np.full(200, -1))
    steps: dict[int, list[list[int]]] = {}
    for ranks in (1, 2, 4):
        plan = BatchPlan(
            lengths,
            packing,
            batch_size=64,
            micro_batch_size=2,
            pack_tokens=8192,
            shared_image_max=4,
            world_size=ranks,
            order=order,
        )
        own = [{shard for window in plan.own_shards(rank, 1) for shard in window} for rank in range(ranks)]
        assert sorted(shard for shards in own for shard in shards) == list(range(len(SHARDS)))
        seen: Counter[int] = Counter()
        at_home, in_shards = 0, 0
        steps[ranks] = []
        for step in plan.steps(1):
            for rank, rows in enumerate(step):
                records = [index for row in rows for group in row for index in group]
                seen.update(records)
                of_records = shard_of[records]
                in_shards += (of_records >= 0).sum()
                at_home += np.isin(of_records, list(own[rank])).sum()
            steps[ranks].append(sorted(index for rows in step for row in rows for group in row for index in group))
        assert seen == Counter(order.of_epoch(1).tolist())
        # The last window has one shard, so its 30 records are one rank's own.
        assert at_home / in_shards > {1: 0.99, 2: 0.75, 4: 0.65}[ranks]
        work = np.array([[sum(map(plan.work, rows)) for rows in step] for step in plan.steps(1)])
        assert (work.max(axis=1) / work.mean(axis=1)).mean() < 1.05
    assert steps[1] == steps[2] == steps[4]
