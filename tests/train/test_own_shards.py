"""An epoch of shards at a URL, alone or beside a file: ranks fetch shards of their own and learn what one process does.

Each rank has two readers, a disk of its own and a server of its own, which tells what that rank asked for.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from file_server import serving
from mixture_data import Told, questions, write
from one_step import StandsStill, assert_same
from ranks import run_ranks
from rich.console import Console
from safetensors.torch import load_file, save_file

from phi3v.config import DataSource, Packing, RunConfig
from phi3v.data.mixture import mix_tables
from phi3v.data.readers import Readers
from phi3v.data.shards.write import ShardOptions, shard_data
from phi3v.data.table import open_table
from phi3v.train.collectives import HostCollectives
from phi3v.train.device import choose_device
from phi3v.train.loop import TrainingLoop
from phi3v.train.observers.faults import StepFaults
from phi3v.train.prepare import prepare

IN_FILE = 13
WINDOW = 4


class Recorded(StepFaults):
    """Keeps the records of every step that this rank computed."""

    def add(self, number: int, rows: Sequence[Sequence[int]], losses: Sequence[torch.Tensor], norm: Any) -> None:
        self.__dict__.setdefault("seen", []).append([index for row in rows for index in row])
        super().add(number, rows, losses, norm)


def epoch(
    model: Path, sources: Sequence[dict[str, Any]], places: Sequence[str], out: Path, packing: Packing, size: int
) -> None:
    """An epoch of the loop; writes its gradients, and what this rank read.

    Args:
        sources: of which the last is in shards.
        places: where each rank has the shards.
        size: records of a step.
    """
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have readers
    rank = int(os.environ.get("RANK", 0))
    os.environ["PHI3V_CACHE"] = str(out / f"disk-{rank}")
    config = RunConfig()
    config.model.path = str(model)
    named = [DataSource(**source) for source in [*sources[:-1], sources[-1] | {"path": places[rank]}]]
    train = named if len(named) > 1 else places[rank]
    config.data = replace(config.data, train=train, packing=packing, pack_tokens=700, shuffle_window=WINDOW)
    config.data.num_workers = 2 if len(places) > 1 else 0
    config.training.batch_size, config.training.micro_batch_size = size, 2 if packing == "none" else 1
    config.training.epochs, config.training.logging_steps, config.training.max_grad_norm = 1, 1, 0.0
    config.training.output_dir, config.distributed.engine = str(out / "run"), "ddp"
    runtime = choose_device("fp32")
    run = prepare(config, Console(quiet=True), runtime, HostCollectives(runtime.world_size))
    run.folder.mkdir(parents=True, exist_ok=True)
    engine = StandsStill(run.model, run.engine.choice, config, runtime)
    run, faults, logged = replace(run, engine=engine), Recorded(run), Told()
    with Readers(run.dataset().__getitem__, run.num_workers) as readers:
        TrainingLoop(run, readers, faults, observers=[logged]).run()
    told = {"logged": logged.lines, "seen": faults.__dict__["seen"], "own": run.plan.own_shards(rank, 0)}
    (out / f"told-{rank}.json").write_text(json.dumps(told))
    if rank == 0:
        steps = enumerate(engine.gradients)
        save_file({f"{step} {name}": g for step, of_step in steps for name, g in of_step.items()}, out / "g")


@pytest.fixture(scope="module")
def shards(easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions about each of eighteen images, six of which the file asks about too."""
    folder = tmp_path_factory.mktemp("own-shards")
    asked = questions(easy_vqa, range(6, 24), 1, "b") + questions(easy_vqa, range(6, 24), 2, "c")
    file = write(easy_vqa, folder / "in" / "b.jsonl", asked)
    shard_data([file], folder / "shards", ShardOptions(shard_size=10_000))
    assert len(open_table(folder / "shards").shards) > WINDOW + 1
    return folder / "shards"


@pytest.mark.parametrize(
    ("mixed", "packing", "ranks"),
    [
        (True, "shared-image", 2),
        *(
            pytest.param(mixed, packing, ranks, marks=pytest.mark.slow)
            for mixed in (True, False)
            for packing in ("none", "samples", "shared-image")
            for ranks in (2, 4)
            if (mixed, packing, ranks) != (True, "shared-image", 2)
        ),
    ],
)
def test_every_record_once_own_shards_whole_and_the_gradients_of_one_process(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, shards: Path, mixed: bool, packing: Packing, ranks: int
) -> None:
    """Beside a file of 13 records, 54 of 36 that are in shards. The last step has rows for some of the ranks."""
    file = write(easy_vqa, tmp_path / "a.jsonl", questions(easy_vqa, range(IN_FILE), 0, "a"))
    sources: list[dict[str, Any]] = [{"path": str(file)}] * mixed + [{"path": str(shards), "name": "b"}]
    sources[-1] |= {"epochs": 1.5} if mixed else {}
    total = 67 if mixed else 36
    size = 16 if packing == "none" else 22 if mixed else 35
    out = {world: tmp_path / str(world) for world in (1, ranks)}
    run_ranks(1, epoch, small_model_dir, sources, [str(shards)], out[1], packing, size, folder=out[1])
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serving(shards)) for _ in range(ranks)]
        urls = [server.url for server in servers]
        run_ranks(ranks, epoch, small_model_dir, sources, urls, out[ranks], packing, size, folder=out[ranks])
    told = {
        world: [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(world)]
        for world, folder in out.items()
    }

    first = IN_FILE if mixed else 0
    taken = range(-(-total // size))
    steps = [Counter(index for rank in told[ranks] for index in rank["seen"][step]) for step in taken]
    assert steps == list(map(Counter, told[1][0]["seen"]))
    assert all(len(rank["seen"]) == len(steps) for rank in told[ranks])
    drawn = sum(steps, Counter())
    assert all(drawn[index] == 1 for index in range(first))
    assert Counter(drawn[index] for index in range(first, first + 36)) == ({1: 18, 2: 18} if mixed else {1: 36})
    assert len(drawn) == first + 36

    count = len(open_table(shards).shards)
    own = [{shard for window in rank["own"] for shard in window} for rank in told[ranks]]
    assert sorted(shard for of_rank in own for shard in of_rank) == list(range(count)), "each is one rank's"
    for server, of_rank in zip(servers, own, strict=True):
        whole = server.whole()
        names = {f"{shard:05d}.tar" for shard in of_rank}
        assert len(whole) == len(set(whole)), "once"
        assert set(whole) <= names
        assert not {name for name, start in server.requests if start is not None} & names
    # All of it was read; by chance others compute all records of a shard, to balance a step.
    assert {name for server in servers for name, _ in server.requests} >= {f"{n:05d}.tar" for n in range(count)}
    assert sum(len(server.whole()) for server in servers) > count / 2

    for alone, together in zip(told[1][0]["logged"], told[ranks][0]["logged"], strict=True):
        assert together == pytest.approx(alone, rel=1e-5)  # float32 sums in another order
    assert any("source/b/loss" in line for line in told[1][0]["logged"]) == mixed
    assert_same(load_file(out[ranks] / "g"), load_file(out[1] / "g"), f"{packing} on {ranks} ranks")


def test_shards_of_a_mixture_are_numbered_through(
    tmp_path: Path, easy_vqa: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where two sources are the same shards, which are read through the first of them."""
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path))
    with serving(shards) as server:
        file = open_table(write(easy_vqa, tmp_path / "a.jsonl", questions(easy_vqa, range(IN_FILE), 0, "a")))
        remote, again = open_table(server.url), open_table(server.url)
        table = mix_tables([file, remote, again], ["a", "b", "c"])
        table.assign_shards([[1], [len(remote.shards) + 2]])

        def read(source: int, shard: int) -> None:
            table.load_images(table[table.starts[source] + sum(remote.shards[:shard])])

        read(0, 0)
        read(1, 3)
        assert not server.whole()
        read(1, 1)
        read(2, 2)
        assert sorted(server.whole()) == ["00001.tar", "00002.tar"]
        assert {name for name, start in server.requests if start is not None} == {"00003.tar"}
