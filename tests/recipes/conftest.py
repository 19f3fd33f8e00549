"""The four tasks in small, converted as a person converts them: hub-schema tables, and the benchmarks' stand-ins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_files import DOCVQA_1200, cauldron_row, docvqa_row, write_parquet
from sample_files import clip, image_bytes

from phi3v.cli import main
from tasks import docvqa, hateful_memes, nlvr2, ucf101
from tasks.parts import Sizes

ANSWERS = {"docvqa": ("invoice", "12.50"), "hateful_memes": ("Yes", "No"), "nlvr2": ("True", "False")}


def convert(task: str, source: Path, out: Path, *options: str) -> None:
    """Run ``phi3v data convert``."""
    command = ["data", "convert", task.replace("_", "-"), "--source", str(source), "--out", str(out), *options]
    assert main(command) == 0


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path_factory.getbasetemp() / "phi3v-cache"))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each task, with its data as the hub has it; ``docvqa_small`` is the recipe's small split."""
    folder = tmp_path_factory.mktemp("sources")
    for task, (one, other) in ANSWERS.items():
        for split in ("train", "val"):
            rows = [
                cauldron_row(
                    [image_bytes(10 * number + side) for side in range(2 if task == "nlvr2" else 1)],
                    [("What is it?", one if number % 2 else other)],
                )
                for number in range(2)
            ]
            write_parquet(folder / task / f"{split}.parquet", rows)
    for split in ("train", "test"):
        rows = [docvqa_row(image_bytes(number), "How much?", ["12.50", "12.50 EUR"]) for number in range(2)]
        write_parquet(folder / "docvqa_small" / f"{split}.parquet", rows, DOCVQA_1200)
    for split in ("train", "val"):
        for number, label in enumerate(("Biking", "Diving")):
            clip(folder / "ucf101" / split / label / f"v_{label}_g01_c01.avi", start=10 * number)
    return folder


@pytest.fixture(scope="session")
def workplace(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder whose ``data/`` was made by the commands that the recipes name."""
    folder = tmp_path_factory.mktemp("workplace")
    for task in ("docvqa", "hateful_memes", "nlvr2", "ucf101"):
        few = ("--frames", "2") if task == "ucf101" else ()  # of the usual eight, for time
        convert(task, sources / task, folder / "data" / task, *few)
    return folder


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each task, with a stand-in of its original distribution."""
    folder = tmp_path_factory.mktemp("stand-ins")
    one, two = Sizes(1, 1, 1), Sizes(2, 2, 2)
    # Memes are measured by AUROC, which needs both answers.
    for task, sizes in ((docvqa, one), (hateful_memes, two), (nlvr2, one), (ucf101, two)):
        task.make(folder / task.__name__.rsplit(".", 1)[-1], sizes, seed=0)
    return folder


@pytest.fixture(scope="session")
def stand_in_data(stand_ins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-ins converted, and two records kept of each split; UCF-101 is left to its own script."""
    folder = tmp_path_factory.mktemp("stand-in-data")
    for task in ("docvqa", "hateful_memes", "nlvr2"):
        convert(task, stand_ins / task, folder / task)
        for file in (folder / task).glob("*.jsonl"):
            # Of two answers, where a task has no more.
            by_answer: dict[str, str] = {}
            for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
                by_answer.setdefault(json.loads(line)["conversations"][0]["assistant"], line)
            file.write_text("".join(list(by_answer.values())[:2]), encoding="utf-8")
    return folder
