"""A run that was interrupted comes, bit by bit, to what it would have come to.

Runs end after step 9. Padded batches have 8 steps an epoch, of three micro-batches each; packed rows have 5.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from resume_helpers import assert_same_run, interrupted_copy, lines
from run_helpers import Train

from phi3v.cli import main
from phi3v.config import ObjectiveConfig, RunConfig
from phi3v.errors import UserError
from phi3v.train.checkpoints.resume import CHANGEABLE, EXTENDABLE, MOVABLE, allowed_changes, flat

PADDED = ("training.batch_size", 3, "training.micro_batch_size", 1)
PACKED = ("training.micro_batch_size", 1, "training.batch_size", 5, "data.pack_tokens", 700)
LORA = ("method.name", "lora", "method.lora.rank", 4, "method.lora.dropout", 0.3)
FROZEN = ("method.name", "frozen-vision")
COMMON = (
    *("evaluation.before", "false", "evaluation.after", "false", "checkpoint.save_steps", 4),
    *("checkpoint.keep_last", 20, "training.warmup_steps", 3, "training.logging_steps", 3, "training.max_steps", 9),
)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        pytest.param((*PADDED, *LORA), (4, 8), id="lora"),
        pytest.param((*PACKED, "data.packing", "shared-image"), (4,), id="full-shared"),
        pytest.param(PADDED, (4, 8), id="full", marks=pytest.mark.slow),
        pytest.param((*PADDED, "training.schedule", "cosine"), (8, 9), id="full-cosine", marks=pytest.mark.slow),
        pytest.param(
            (*PADDED, *LORA, "method.lora.also_train", "[projector]"), (4,), id="also", marks=pytest.mark.slow
        ),
        pytest.param((*PADDED, "method.name", "qlora", *LORA[2:]), (4, 8), id="qlora", marks=pytest.mark.slow),
        pytest.param((*PADDED, "training.optimizer", "adamw_8bit"), (4,), id="8bit", marks=pytest.mark.slow),
        pytest.param(
            (*PADDED, "training.optimizer", "adamw_bf16", "training.precision", "bf16", *LORA, "training.max_steps", 6),
            (4,),
            id="bf16-moments",
            marks=pytest.mark.slow,
        ),
        pytest.param((*PADDED, *FROZEN, "training.feature_cache", "memory"), (4,), id="cache", marks=pytest.mark.slow),
        pytest.param((*PADDED, "data.num_workers", 2), (4, 8), id="workers", marks=pytest.mark.slow),
        pytest.param((*PADDED, "checkpoint.asynchronous", "false"), (8,), id="in-turn", marks=pytest.mark.slow),
        pytest.param((*PACKED, *LORA, "data.packing", "shared-image"), (8,), id="shared", marks=pytest.mark.slow),
        pytest.param((*PACKED, *LORA, "data.packing", "samples"), (4, 8), id="samples", marks=pytest.mark.slow),
        pytest.param((*PACKED, "data.packing", "samples", "data.num_workers", 2), (8,), id="w", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_run(
    train: Train, tmp_path: Path, settings: tuple[Any, ...], steps: tuple[int, ...]
) -> None:
    code, whole = train(*COMMON, *settings, out="whole")
    assert code == 0
    last = max(int(path.name.split("-")[1]) for path in whole.glob("checkpoint-*"))
    for step in steps:
        part = interrupted_copy(whole, step, tmp_path / f"from-{step}")
        code, _ = train(*COMMON, *settings, out=part.name, resume="auto")
        assert code == 0
        assert_same_run(whole, part, last)


def command(model: Path, data: Path, out: Path, *settings: object) -> list[str]:
    defaults: tuple[object, ...] = (
        *("model.path", model, "data.train", data / "train.jsonl", "data.num_workers", 0, "training.output_dir", out),
        *("training.learning_rate", 2e-3, "distributed.engine", "ddp", *COMMON, *settings),
    )
    pairs = dict(zip(defaults[::2], defaults[1::2], strict=True))
    return ["train", *(part for name, value in pairs.items() for part in (f"--{name}", str(value)))]


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        # In the second epoch, whose order the library does not find again below a loader that skips.
        pytest.param((*LORA, "training.batch_size", 6, "training.micro_batch_size", 1, "training.max_steps", 7), 6),
        pytest.param(("training.batch_size", 4, "training.micro_batch_size", 1), 4, marks=pytest.mark.slow),
        pytest.param((*PACKED, *LORA, "data.packing", "shared-image"), 8, marks=pytest.mark.slow),
        pytest.param((*PACKED, "data.packing", "samples"), 4, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_resume_and_so_does_one(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, settings: tuple[Any, ...], step: int
) -> None:
    """Only rank 0 has the checkpoint: the other works in another folder. One rank then goes on where two were."""
    settings = (*settings, "checkpoint.save_steps", step)
    whole = tmp_path / "rank-0" / "whole"
    for rank in range(2):
        (tmp_path / f"rank-{rank}").mkdir()
    run_ranks(
        2, _in_own_folder, command(small_model_dir, easy_vqa, Path("whole"), *settings), tmp_path, folder=tmp_path
    )
    assert list((tmp_path / "rank-1").iterdir()) == []
    last = max(int(path.name.split("-")[1]) for path in whole.glob("checkpoint-*"))
    interrupted_copy(whole, step, tmp_path / "rank-0" / "part")
    again = [*command(small_model_dir, easy_vqa, Path("part"), *settings), "--resume"]
    shown = run_ranks(2, _in_own_folder, again, tmp_path, folder=tmp_path / "again")
    assert f"checkpoint-{step} (the newest valid checkpoint), after step {step}" in shown
    assert_same_run(whole, tmp_path / "rank-0" / "part", last)
    interrupted_copy(whole, step, tmp_path / "alone")
    alone = [*command(small_model_dir, easy_vqa, tmp_path / "alone", *settings), "--resume"]
    shown = run_ranks(1, main, alone, folder=tmp_path / "printed")
    assert "saved on 2 ranks, going on on 1" in shown
    assert ("dropout draws other numbers" in shown) == ("lora" in settings)
    two, one = lines(whole), lines(tmp_path / "alone")
    for a, b in zip(two, one, strict=True):
        assert {key: a[key] for key in ("step", "samples", "questions")} == {
            key: b[key] for key in ("step", "samples", "questions")
        }
        if "lora" not in settings:
            # Float32 sums in another order, carried through a few optimizer steps.
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def _in_own_folder(arguments: list[str], root: Path) -> int:
    os.chdir(root / f"rank-{os.environ['RANK']}")
    return main(arguments)


# With fewer than `pytest -m slow` runs.
SHORT = (
    *COMMON,
    *LORA,
    *("training.batch_size", 1, "training.micro_batch_size", 1, "training.max_steps", 4, "training.seed", 3),
    *("checkpoint.save_steps", 1, "checkpoint.keep_last", 3),
)


@pytest.fixture
def short(train: Train) -> Path:
    """A finished run of four steps with the checkpoints of the last three."""
    code, folder = train(*SHORT)
    assert code == 0
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 3, 4)]
    return folder


def test_what_is_resumed_and_why(train: Train, short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run is left alone; a damaged checkpoint is passed over; a half-written one is removed."""
    before = {path: path.stat().st_mtime_ns for path in short.rglob("*")}
    assert train(*SHORT, resume="auto")[0] == 0
    assert "is finished, so there is nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in short.rglob("*")} == before

    final = (short / "final" / "adapter_model.safetensors").read_bytes()
    (short / "final" / "manifest.json").unlink()  # killed while it was written
    weights = short / "checkpoint-4" / "optimizer" / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (short / "checkpoint-3" / "state.json").unlink()
    (short / ".checkpoint-5.new" / "model").mkdir(parents=True)
    assert train(*SHORT)[0] == 2
    assert "add --resume to go on with it" in capsys.readouterr().err
    assert train(*SHORT, resume="auto")[0] == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "removed a half-written checkpoint of step 5" in shown
    assert "checkpoint-4: optimizer/optimizer.pt is not what was written (its SHA-256 differs)" in shown
    assert "checkpoint-3: state.json is missing" in shown
    assert "checkpoint-2 (the newest valid checkpoint), after step 2" in shown
    assert [line["step"] for line in lines(short)] == [1, 3]
    assert (short / "final" / "adapter_model.safetensors").read_bytes() == final
    assert not list(short.glob(".checkpoint-*"))
    assert len(json.loads((short / "environment.json").read_text())["resumed"]) == 1

    # By name; and further than it was to go.
    code, _ = train(*SHORT, "training.max_steps", 5, "training.logging_steps", 1, resume=str(short / "checkpoint-2"))
    assert code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-2 (as asked for), after step 2" in shown
    assert "training.max_steps: 4 → 5" in shown
    assert [line["step"] for line in lines(short)] == [1, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("training.learning_rate", 1e-3), "training.learning_rate was 0.002 when it was saved and is 0.001 now"),
        (("training.max_steps", 3), "training.max_steps was 4 and is 3 now; on resume it may only grow"),
        (("method.lora.rank", 8), "method.lora.rank was 4"),
        (("data.train", "other"), "is not the file that the run began with"),
    ],
)
def test_what_may_not_change(
    train: Train,
    tmp_path: Path,
    easy_vqa: Path,
    short: Path,
    changes: tuple[Any, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (short / "final" / "manifest.json").unlink()
    if changes[1] == "other":
        records = (easy_vqa / "train.jsonl").read_text().splitlines()
        (easy_vqa / "other.jsonl").write_text("\n".join(records[::-1]) + "\n")
        changes = (changes[0], easy_vqa / "other.jsonl")
    assert train(*SHORT, *changes, resume="auto")[0] == 2
    assert words in capsys.readouterr().err
    assert (short / "checkpoint-4").is_dir()


def test_only_what_is_named_may_change() -> None:
    """Not what merely begins like a key that may: eval_steps_questions like eval_steps."""
    config = RunConfig()
    for key in flat(asdict(config)):
        tree = asdict(config)
        *groups, leaf = key.split(".")
        branch = tree
        for group in groups:
            branch = branch[group]
        branch[leaf] = "another"
        state = {"config": tree, "data": {}, "step": 0}
        if key in EXTENDABLE:
            continue
        # An older version's checkpoint does not say what the model at its path held.
        if (key in (*CHANGEABLE, *MOVABLE) and key != "model.path") or groups == ["checkpoint"]:
            allowed_changes(state, config, "here")
        else:
            with pytest.raises(UserError, match=re.escape(f"{key} was another")):
                allowed_changes(state, config, "here")


def test_a_checkpoint_of_a_version_without_objectives_is_of_sft() -> None:
    tree = asdict(RunConfig())
    del tree["objective"]
    state = {"config": tree, "data": {}, "step": 0}
    assert allowed_changes(state, RunConfig(), "here") == []
    with pytest.raises(UserError, match=r"objective\.name was sft when it was saved and is dpo now"):
        allowed_changes(state, RunConfig(objective=ObjectiveConfig(name="dpo")), "here")


def test_nothing_to_go_on_from(train: Train, tmp_path: Path, short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SHORT, out="new", resume="auto")[0] == 0
    assert "so the run starts anew" in capsys.readouterr().out
    for wrong, words in (
        (tmp_path / "nowhere", "is no checkpoint"),
        (tmp_path / "new" / "checkpoint-4", "is not a checkpoint of"),
    ):
        assert train(*SHORT, resume=str(wrong))[0] == 2
        assert words in capsys.readouterr().err
    (short / "checkpoint-3" / "random.safetensors").unlink()
    assert train(*SHORT, resume=str(short / "checkpoint-3"))[0] == 2
    assert "is damaged: random.safetensors is missing" in capsys.readouterr().err


def test_measurements_go_on(train: Train, tmp_path: Path) -> None:
    """Best weights, patience and scores; what was measured before training stays."""
    settings = (
        *(*COMMON, *LORA, "training.batch_size", 1, "training.micro_batch_size", 1, "training.max_steps", 6),
        *("checkpoint.save_steps", 1, "evaluation.eval_steps", 2, "evaluation.keep_best", "true"),
        *("evaluation.before", "true", "evaluation.after", "true", "evaluation.metrics", "[token_f1]"),
        *("evaluation.early_stopping_patience", 3, "training.learning_rate", 3e-2),
    )
    code, whole = train(*settings, out="whole")
    assert code == 0
    part = interrupted_copy(whole, 3, tmp_path / "part")
    for name in ("eval_before.json", "predictions_before.jsonl"):
        (part / name).write_bytes((whole / name).read_bytes())
    written = (part / "eval_before.json").stat().st_mtime_ns
    assert train(*settings, out="part", resume="auto")[0] == 0
    assert_same_run(whole, part, last=6)
    assert (part / "eval_before.json").stat().st_mtime_ns == written
    assert (part / "best" / "adapter_model.safetensors").read_bytes() == (
        whole / "best" / "adapter_model.safetensors"
    ).read_bytes()
    for name in ("eval_after.json", "predictions_after.jsonl"):
        assert (part / name).is_file()
