"""Runs that learn from pairs: what is logged, the reference, resuming, ranks; data that an objective cannot take."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from one_step import assert_same, one_step
from preference_data import write_pairs
from ranks import command, run_ranks
from resume_helpers import assert_same_run, interrupted_copy
from rich.console import Console
from run_helpers import Train, read_metrics
from safetensors.torch import load_file, save_file

from phi3v.config import ObjectiveConfig, ObjectiveName, load_config
from phi3v.data.image_store import FolderStore
from phi3v.data.rows import RowDataset
from phi3v.data.table import open_table
from phi3v.train.checks import Case, refusals
from phi3v.train.collectives import HostCollectives
from phi3v.train.data_facts import DataFacts, doubtful_answers
from phi3v.train.device import choose_device
from phi3v.train.prepare import prepare
from phi3v.train.reference import FILE, _facts, reference_log_probs

SETTINGS = (
    *("objective.name", "dpo", "method.name", "lora", "method.lora.rank", 4, "data.packing", "shared-image"),
    *("training.micro_batch_size", 1, "training.batch_size", 3, "data.pack_tokens", 700, "training.max_steps", 7),
    *("evaluation.before", "false", "evaluation.after", "false", "checkpoint.save_steps", 4, "checkpoint.keep_last", 9),
    *("training.logging_steps", 3, "data.eval", "none"),
)


def test_a_run_prefers_what_was_chosen_and_resumes(
    train: Train, easy_vqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints fall between two lines of the log, so what is summed for the next line is in them."""
    settings = (*SETTINGS, "data.train", write_pairs(easy_vqa, "run-pairs.jsonl"))
    code, whole = train(*settings, out="whole")
    assert code == 0
    shown = capsys.readouterr().out
    assert "objective: dpo, beta 0.1; reference: the model that training begins with" in shown
    assert "7 records, 8 pairs of answers to train on" in shown
    first, *_, last = read_metrics(whole)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the model is its own reference
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["rewards/margins"] > 0.01
    assert last["rewards/accuracies"] > 0.7
    assert last["kl"] > 0
    assert f"margin {last['rewards/margins']:+.3f}  prefers chosen {last['rewards/accuracies']:.0%}" in shown
    part = interrupted_copy(whole, 4, tmp_path / "part")
    code, _ = train(*settings, out=part.name, resume="auto")
    assert code == 0
    assert_same_run(whole, part, 7)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_two_ranks_have_the_gradients_of_one(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, objective: ObjectiveName
) -> None:
    """Ranks with unlike rows; KTO's estimate is of the whole step."""
    data = write_pairs(easy_vqa, "four-pairs.jsonl", 4)
    for ranks, packing in ((1, "none"), (2, "shared-image")):
        out = tmp_path / str(ranks) / "gradients"
        arguments = (small_model_dir, data, out, 1, "sample", packing, objective)
        run_ranks(ranks, one_step, *arguments, folder=out.with_name("printed"))
    expected, got = (load_file(tmp_path / ranks / "gradients") for ranks in "12")
    assert float(expected["total"]) > 0.01
    assert_same(got, expected, "two ranks")


def test_the_reference_is_computed_once_and_gone_on_with(
    small_model_dir: Path, easy_vqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "model.path": small_model_dir,
        "data.train": write_pairs(easy_vqa, "reference-pairs.jsonl"),
        "data.num_workers": 0,
        "data.packing": "samples",
        "data.pack_tokens": 400,
        "objective.name": "dpo",
        "training.output_dir": tmp_path,
    }
    config = load_config(None, [part for name, value in values.items() for part in (f"--{name}", str(value))])
    run = prepare(config, Console(quiet=True), choose_device("fp32"), HostCollectives(1))
    made: list[Any] = []
    make = RowDataset.__getitem__
    monkeypatch.setattr("phi3v.train.reference.CHUNK", 3)
    monkeypatch.setattr(RowDataset, "__getitem__", lambda self, plan: made.append(plan.row) or make(self, plan))
    values_of_all = reference_log_probs(run)
    answers = [
        (index, place) for index, record in enumerate(run.train_table) for place in range(1 + len(record.rejected))
    ]
    assert len(values_of_all) == len(answers) == 15
    assert sorted(index for row in made for group in row for index in group) == list(range(7))

    # By the plain forward pass of each answer.
    dataset = run.dataset()
    for at, (index, place) in list(enumerate(answers))[::4]:
        sample = dataset.samples((index,))[place]
        inputs = dataset.collate([[sample]])
        logits = run.model(
            inputs["input_ids"],
            **{
                name: inputs[name]
                for name in ("pages", "image_sizes", "page_index", "image_positions")
                if name in inputs
            },
        ).logits[0]
        targets = [k for k, label in enumerate(sample.labels) if label != -100]
        plain = sum(float(logits[k - 1].log_softmax(-1)[sample.labels[k]].detach()) for k in targets)
        assert float(values_of_all[at]) == pytest.approx(plain, rel=1e-5)  # float32 sums

    made.clear()
    assert torch.equal(reference_log_probs(run), values_of_all)
    assert not made
    # A run that was killed: what is not known yet is computed, with the rest of its rows' round.
    from safetensors import safe_open

    with safe_open(tmp_path / FILE, framework="pt") as file:
        metadata, kept = file.metadata(), file.get_tensor("log_probs")
    kept[-2:] = torch.nan
    save_file({"log_probs": kept}, tmp_path / FILE, metadata=metadata)
    assert torch.equal(reference_log_probs(run), values_of_all)
    assert 1 <= sum(len(group) for row in made for group in row) <= 3
    # Of other images by the same names, or in another precision, say, nothing is taken over.
    facts, images = _facts(run), tmp_path / "copied"
    shutil.copytree(easy_vqa / "images", images)
    copied = replace(run, train_table=replace(run.train_table, images=FolderStore(images)))
    assert _facts(copied) == facts
    with (images / run.train_table[0].images[0]).open("ab") as image:
        image.write(b"\0")
    assert _facts(copied) != facts
    save_file({"log_probs": kept + 1}, tmp_path / FILE, metadata={"key": metadata["key"].replace("fp32", "bf16")})
    assert torch.equal(reference_log_probs(run), values_of_all)


def judged(easy_vqa: Path, name: str, *marks: dict[str, Any]) -> DataFacts:
    lines = [json.loads(line) for line in (easy_vqa / "test.jsonl").read_text().splitlines()[: len(marks)]]
    for line, mark in zip(lines, marks, strict=True):
        line["conversations"][-1] |= mark
    path = easy_vqa / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataFacts.of(open_table(path), None, load_config(None).evaluation)


def test_data_that_an_objective_cannot_take(easy_vqa: Path) -> None:
    pair, good, plain = {"rejected": "neither"}, {"label": True}, dict[str, Any]()
    mixed = judged(easy_vqa, "mixed.jsonl", pair, good, plain, pair)
    one = judged(easy_vqa, "one.jsonl", good)

    def refused(data: DataFacts, *overrides: str) -> str:
        config = load_config(None, list(overrides))
        case = Case(config, choose_device("fp32"), data=data)
        return "\n".join(str(refusal) for refusal in refusals(case))

    for name in ("dpo", "ipo", "orpo", "simpo"):
        said = refused(mixed, "--objective.name", name)
        assert "mixed.jsonl:2" in said
        assert f"{name} learns from pairs of answers, and 2 of 4 records have no rejected one" in said
        assert "objective.name to kto" in said
    said = refused(mixed, "--objective.name", "kto")
    assert "mixed.jsonl:3" in said
    assert "1 of 4 records have neither a label nor a rejected answer" in said
    assert "there is one" in refused(one, "--objective.name", "kto")
    assert "training.loss_weighting" in refused(mixed, "--objective.name", "kto", "--training.loss_weighting", "token")
    assert not refused(mixed)
    taught = refused(judged(easy_vqa, "bad.jsonl", good, {"label": False}))
    assert "bad.jsonl:2" in taught
    assert "its answer is labelled bad, and sft would teach it" in taught
    ignored = doubtful_answers(ObjectiveConfig(), mixed)
    assert ignored is not None
    assert "2 records have rejected answers that it ignores, 1 have a label" in ignored.what
    assert doubtful_answers(ObjectiveConfig(name="kto"), mixed) is None
    one_sided = doubtful_answers(ObjectiveConfig(name="kto"), judged(easy_vqa, "good.jsonl", good, good))
    assert one_sided is not None
    assert "all 2 answers are labelled good" in one_sided.what


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "objective"), [("fsdp2", "kto"), ("zero2", "dpo"), ("zero3", "kto")])
def test_engines_that_divide_come_to_the_same(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, engine: str, objective: str
) -> None:
    """KTO runs the model forward without gradients before each step, which sharded weights must survive."""
    data = write_pairs(easy_vqa, "engine-pairs.jsonl")
    losses = {}
    for name in ("ddp", engine):
        keys = {
            "model.path": small_model_dir,
            "data.train": data,
            "data.num_workers": 0,
            "data.packing": "shared-image",
            "data.pack_tokens": 700,
            "objective.name": objective,
            "distributed.engine": name,
            "training.output_dir": tmp_path / name,
            "training.max_steps": 3,
            "training.batch_size": 4,
            "training.learning_rate": 1e-3,
            "training.logging_steps": 1,
        }
        words = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
        run_ranks(2, command, "train", *words, folder=tmp_path / f"{name}-printed")
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name)]
    assert losses[engine] == pytest.approx(losses["ddp"], rel=1e-4)
