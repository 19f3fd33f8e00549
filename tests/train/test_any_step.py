"""A run goes on from the checkpoint of every step, bit by bit; on another number of ranks with the same records.

Ranks with two readers each learn a mixture of a file and shards. An epoch has five steps of six records, in several
rows on each rank, and a run ends in the second: the steps to go on from lie within epochs, at the border of two, and at
the end, where nothing is left to do.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from mixture_data import two_sources
from ranks import run_ranks
from resume_helpers import assert_same_run, interrupted_copy, lines

from phi3v.cli import main
from phi3v.data.shards.write import ShardOptions, shard_data
from phi3v.train.observers.faults import StepFaults

SLOW = pytest.mark.slow

SETTINGS: dict[str, object] = {
    "data.num_workers": 2,
    "data.shuffle_window": 2,
    "training.max_steps": 9,
    "training.batch_size": 6,
    "training.micro_batch_size": 1,
    "training.learning_rate": 2e-3,
    "training.warmup_steps": 3,
    "training.logging_steps": 2,
    "checkpoint.save_steps": 1,
    "checkpoint.keep_last": 100,
    "evaluation.before": "false",
    "evaluation.after": "false",
}
PACKED = {"data.pack_tokens": 300}
LORA = {"method.name": "lora", "method.lora.rank": 4, "method.lora.dropout": 0.3}
BEST = {
    "evaluation.eval_steps": 2,
    "evaluation.keep_best": "true",
    "evaluation.early_stopping_patience": 4,
    "evaluation.metrics": "[token_f1]",
    "evaluation.max_questions": 4,
    "evaluation.max_new_tokens": 4,
}

Seen = dict[int, dict[int, list[list[int]]]]  # the records of each row, by step and rank


@pytest.fixture(scope="module")
def sources(easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """18 of the 12 records of a file, and 12 of 20 in shards."""
    folder = tmp_path_factory.mktemp("sources")
    file, other = two_sources(easy_vqa, folder)
    shard_data([other], folder / "shards", ShardOptions(shard_size=5_000))
    assert len(list((folder / "shards").glob("*.tar"))) > 3
    return json.dumps([{"path": str(file), "epochs": 1.5}, {"path": str(folder / "shards"), "max_records": 12}])


def command(model: Path, data: str, out: Path, **others: object) -> list[str]:
    settings = SETTINGS | {"model.path": model, "data.train": data, "training.output_dir": out} | others
    return ["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def _train(commands: Sequence[list[str]], outs: Sequence[Path]) -> int:
    """Runs, one after the other; which records each computes is written beside its folder."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have readers
    rank = os.environ.get("RANK", "0")
    add = StepFaults.add
    for words, out in zip(commands, outs, strict=True):
        with out.with_name(f"{out.name}-rows-{rank}").open("w") as file:

            def noted(self: StepFaults, number: int, rows: Any, *numbers: Any, file: Any = file) -> None:
                file.write(json.dumps([number, rows]) + "\n")
                add(self, number, rows, *numbers)

            with mock.patch.object(StepFaults, "add", noted):
                if (code := main(words)) != 0:
                    return code
    return 0


def seen(out: Path) -> Seen:
    found: Seen = defaultdict(dict)
    for file in out.parent.glob(f"{out.name}-rows-*"):
        for number, rows in map(json.loads, file.read_text().splitlines()):
            found[number][int(file.name.rsplit("-", 1)[1])] = rows
    return found


def records(of: Seen) -> dict[int, list[int]]:
    """The records of each step, on whatever rank; of a mixture one may come twice."""
    return {
        step: sorted(index for rows in ranks.values() for row in rows for index in row) for step, ranks in of.items()
    }


def resumed(whole: Path, steps: Sequence[int], model: Path, data: str, *, ranks: int, **settings: object) -> list[Path]:
    """Copies of a run that went on from the checkpoint of each of some steps, and saved where they ended."""
    name = f"on-{ranks}-from"
    settings |= {"checkpoint.save_steps": 100}
    parts = [interrupted_copy(whole, step, whole.with_name(f"{name}-{step}")) for step in steps]
    words = [[*command(model, data, part, **settings), "--resume"] for part in parts]
    shown = run_ranks(ranks, _train, words, parts, folder=whole.with_name(f"{name}-printed"))
    for step in steps:
        assert f"checkpoint-{step} (the newest valid checkpoint), after step {step}" in shown
    return parts


def started(model: Path, data: str, whole: Path, *, ranks: int, **settings: object) -> None:
    words = command(model, data, whole, **settings)
    run_ranks(ranks, _train, [words], [whole], folder=whole.with_name("printed"))


def combinations() -> Iterator[Any]:
    """One for every day, in which the steps are few; of all others every step."""
    short = {"training.max_steps": 6}
    yield pytest.param("zero2", "sharded", "shared-image", short, (4, 5, 6), id="zero2-sharded-shared-image-short")
    every = tuple(range(1, 10))
    for engine, form in product(("ddp", "zero2", "fsdp2"), ("whole", "sharded")):
        for packing in ("none", "samples", "shared-image"):
            yield pytest.param(engine, form, packing, {}, every, id=f"{engine}-{form}-{packing}", marks=SLOW)
    for name, others in (("lora", LORA), ("best", BEST), ("tokens", {"training.batch_tokens": 700})):
        engine, form = ("ddp", "whole") if others is LORA else ("fsdp2", "sharded")
        yield pytest.param(engine, form, "shared-image", others, every, id=name, marks=SLOW)


@pytest.mark.parametrize(("engine", "form", "packing", "others", "steps"), list(combinations()))
def test_the_run_from_any_step_is_the_run(
    tmp_path: Path,
    small_model_dir: Path,
    easy_vqa: Path,
    sources: str,
    engine: str,
    form: str,
    packing: str,
    others: dict[str, Any],
    steps: tuple[int, ...],
) -> None:
    settings = {"distributed.engine": engine, "checkpoint.format": form, "data.packing": packing, **PACKED, **others}
    if others is BEST:
        settings["data.eval"] = easy_vqa / "test.jsonl"
    whole, last = tmp_path / "whole", steps[-1]
    started(small_model_dir, sources, whole, ranks=2, **settings)
    assert ("best" in {path.name for path in (whole / f"checkpoint-{last}").iterdir()}) == (others is BEST)
    rows = seen(whole)
    assert len(rows) == last
    if "training.batch_tokens" not in others:
        assert {len(own) for own in records(rows).values()} == {6}
    assert max(len(own) for ranks in rows.values() for own in ranks.values()) > 1, "no gradient was accumulated"
    for step, part in zip(steps, resumed(whole, steps, small_model_dir, sources, ranks=2, **settings), strict=True):
        assert seen(part) == {number: ranks for number, ranks in rows.items() if number > step}
        assert_same_run(whole, part, last)


@SLOW
@pytest.mark.parametrize("packing", ["none", "samples", "shared-image"])
@pytest.mark.parametrize(
    ("engine", "form", "ranks", "others"),
    [
        ("ddp", "whole", 2, (1, 3, 4)),
        ("zero2", "whole", 2, (3, 4)),
        ("zero2", "sharded", 2, (1, 3, 4)),
        ("fsdp2", "sharded", 2, (1, 3, 4)),
        ("fsdp2", "sharded", 4, (2,)),
    ],
)
def test_other_ranks_go_on_with_the_same_records(
    tmp_path: Path,
    small_model_dir: Path,
    sources: str,
    engine: str,
    form: str,
    ranks: int,
    others: tuple[int, ...],
    packing: str,
) -> None:
    """Within an epoch, at the border of two, and where nothing is left.

    Losses within 1e-4: float32 sums in another order, carried through up to seven optimizer steps.
    """
    settings: dict[str, object] = {"checkpoint.format": form, "data.packing": packing, **PACKED}
    settings |= {"distributed.engine": engine, "training.batch_size": 12}  # for 3 and 4 ranks; of 60 records an epoch
    file, shards = (source["path"] for source in json.loads(sources))
    sources = json.dumps([{"path": file, "epochs": 3}, {"path": shards, "epochs": 1.2}])
    whole, steps = tmp_path / "whole", (2, 5, 9)
    started(small_model_dir, sources, whole, ranks=ranks, **settings)
    expected = records(seen(whole))
    assert {step: len(own) for step, own in expected.items()} == dict.fromkeys(range(1, 10), 12)
    for other in others:
        settings["distributed.engine"] = engine if other > 1 else "auto"
        parts = resumed(whole, steps, small_model_dir, sources, ranks=other, **settings)
        for step, part in zip(steps, parts, strict=True):
            found = records(seen(part))
            assert found == {number: own for number, own in expected.items() if number > step}
            assert (part / "final" / "manifest.json").is_file()
            for one, two in zip(lines(whole), lines(part), strict=True):
                assert one.keys() == two.keys()
                for key in one:
                    exact = one["step"] <= step or key in ("step", "samples", "questions") or key.endswith("/samples")
                    tolerance = 0 if exact else 1e-4
                    if not key.endswith("tokens"):  # a group that is cut for more ranks has its prefix twice
                        assert two[key] == pytest.approx(one[key], abs=tolerance), key
