"""Data files for the tests of mixtures, made of a little of easy-vqa; and a run on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from one_step import KeepGradients
from rich.console import Console

from phi3v.config import DataSource, ObjectiveName, Packing, RunConfig
from phi3v.train.collectives import HostCollectives
from phi3v.train.device import choose_device
from phi3v.train.prepare import PreparedRun, prepare
from phi3v.train.state import Observer, TrainState

# 18 of the first source's 12 records, 12 of the second's 20: an epoch has five steps of six records.
AMOUNTS: tuple[dict[str, Any], dict[str, Any]] = ({"epochs": 1.5}, {"max_records": 12})


def questions(easy_vqa: Path, records: range, turn: int, name: str) -> list[dict[str, Any]]:
    """Single questions: that of one turn of each of some records, about its image."""
    made = []
    lines = (easy_vqa / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for index in records:
        turns = json.loads(lines[index])["conversations"]
        asked = {**turns[turn], "images": turns[0]["images"]}
        made.append({"id": f"{name}-{index}", "conversations": [asked]})
    return made


def write(easy_vqa: Path, file: Path, records: list[dict[str, Any]]) -> Path:
    """A data file whose ``images/`` are those of easy-vqa, in a folder of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not (file.parent / "images").exists():
        (file.parent / "images").symlink_to(easy_vqa / "images")
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def two_sources(easy_vqa: Path, folder: Path) -> tuple[Path, Path]:
    """Twelve questions about twelve images, and twenty about ten of which six are among those, in another folder."""
    one = write(easy_vqa, folder / "one" / "a.jsonl", questions(easy_vqa, range(12), 0, "a"))
    more = questions(easy_vqa, range(6, 16), 1, "b") + questions(easy_vqa, range(6, 16), 2, "c")
    return one, write(easy_vqa, folder / "two" / "b.jsonl", more)


def mixed_run(
    model: Path,
    files: Sequence[Path],
    out: Path,
    *,
    packing: Packing,
    objective: ObjectiveName,
    workers: int = 0,
    micro: int = 1,
) -> PreparedRun:
    config = RunConfig()
    config.model.path, config.objective.name = str(model), objective
    sources = [DataSource(str(file), **amount) for file, amount in zip(files, AMOUNTS, strict=True)]
    config.data = replace(config.data, train=sources, packing=packing, pack_tokens=700, num_workers=workers)
    training = config.training
    training.batch_size, training.max_steps, training.max_grad_norm = 6, 1, 0.0
    training.micro_batch_size = micro
    training.output_dir = str(out / "run")
    config.distributed.engine = "ddp"
    runtime = choose_device("fp32")
    run = prepare(config, Console(quiet=True), runtime, HostCollectives(runtime.world_size))
    return replace(run, engine=KeepGradients(run.model, run.engine.choice, config, runtime))


class Told(Observer):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, state: TrainState, values: dict[str, float]) -> None:
        self.lines.append(values)


def write_pairs(files: Sequence[Path]) -> None:
    """Give the records one or two rejected answers."""
    for file in files:
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for place, record in enumerate(records):
            record["conversations"][-1]["rejected"] = ["a circle", "none"][: 1 + place % 2]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
