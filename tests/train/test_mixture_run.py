"""Training on several data files: what each step learns, and what is told of each source."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mixture_data import AMOUNTS, Told, mixed_run, two_sources, write_pairs
from ranks import command, run_ranks
from resume_helpers import assert_same_run, interrupted_copy, lines
from run_helpers import Train, read_metrics
from safetensors.torch import load_file, save_file

from phi3v.cli import main
from phi3v.config import ObjectiveName, Packing
from phi3v.data.batches import RowPlan
from phi3v.data.collate import QuestionDataset
from phi3v.data.mixture import mix_tables
from phi3v.data.readers import Readers
from phi3v.data.table import open_table
from phi3v.export.proof import make_probes
from phi3v.processing.processor import Phi3VProcessor
from phi3v.report.gallery import Thumbnails, gallery
from phi3v.report.run_files import read_run
from phi3v.serve.examples import find_examples
from phi3v.train.finetuned import resolve_model
from phi3v.train.loop import TrainingLoop
from phi3v.train.observers.faults import StepFaults
from phi3v.train.reference import reference_log_probs

SHARED = ("data.packing", "shared-image", "data.pack_tokens", 700, "training.micro_batch_size", 1)
COMMON = (
    *("evaluation.before", "false", "evaluation.after", "false", "data.eval", "null", "checkpoint.save_steps", 4),
    *("checkpoint.keep_last", 20, "training.warmup_steps", 3, "training.logging_steps", 2, "training.max_steps", 9),
    *("training.batch_size", 6, *SHARED),
)


def listed(*files: Path, amounts: Sequence[dict[str, Any]] = AMOUNTS) -> str:
    return json.dumps([{"path": str(file)} | amount for file, amount in zip(files, amounts, strict=True)])


def mixed_step(
    model: Path, files: Sequence[Path], out: Path, packing: Packing, objective: ObjectiveName, workers: int
) -> int:
    """One step on a mixture; writes its gradients and what is logged of it."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have readers
    run = mixed_run(model, files, out, packing=packing, objective=objective, workers=workers)
    run.folder.mkdir(parents=True, exist_ok=True)
    reference = reference_log_probs(run) if run.config.objective.needs_reference else None
    told = Told()
    with Readers(run.dataset(reference=reference).__getitem__, workers) as readers:
        TrainingLoop(run, readers, StepFaults(run), observers=[told]).run()
    if run.runtime.rank == 0:
        save_file(run.engine.gradients, out / "gradients.safetensors")  # type: ignore[attr-defined]
        (out / "told.json").write_text(json.dumps(told.lines[0]))
    return 0


@pytest.mark.parametrize(
    ("packing", "objective", "ranks"),
    [
        ("none", "sft", 2),
        ("shared-image", "dpo", 2),
        ("shared-image", "kto", 4),
        ("samples", "orpo", 4),
    ],
)
@pytest.mark.slow
def test_ranks_learn_a_mixture_as_one_process_does(
    small_model_dir: Path, easy_vqa: Path, tmp_path: Path, packing: Packing, objective: ObjectiveName, ranks: int
) -> None:
    """With two readers each; gradients, and the loss of each source, up to the order of float32 sums."""
    files = two_sources(easy_vqa, tmp_path)
    if objective != "sft":
        write_pairs(files)
    found = []
    for world, workers in ((1, 0), (ranks, 2)):
        out = tmp_path / str(world)
        out.mkdir()
        run_ranks(world, mixed_step, small_model_dir, files, out, packing, objective, workers, folder=out)
        found.append((load_file(out / "gradients.safetensors"), json.loads((out / "told.json").read_text())))
    (alone, told), (together, told_together) = found
    assert alone.keys() == together.keys()
    for name, gradient in alone.items():
        assert torch.allclose(gradient, together[name], atol=1e-6), name
    assert told.keys() == told_together.keys() >= {"source/a/loss", "source/b/loss"}
    assert told_together == pytest.approx(told, rel=1e-5)
    assert told["source/a/samples"] + told["source/b/samples"] == 6


def test_the_same_page_of_two_sources_is_one_page(small_model_dir: Path, easy_vqa: Path, tmp_path: Path) -> None:
    """Groups of a page have records of both, though the images are below two folders."""
    run = mixed_run(small_model_dir, two_sources(easy_vqa, tmp_path), tmp_path, packing="shared-image", objective="sft")
    groups = [group for step in run.plan.steps(0) for rows in step for row in rows for group in row]
    both = [group for group in groups if min(group) < 12 <= max(group)]
    assert both
    row = run.dataset()[RowPlan((both[0],), ends_step=True)]
    assert len(row["image_sizes"]) == 1
    assert row["layout"][0][0] > 0
    samples = row["counts"].of_sources[:2]
    assert samples == (sum(index < 12 for index in both[0]), sum(index >= 12 for index in both[0]))


def test_a_limit_of_questions_leaves_some_of_each_source(small_model_dir: Path, easy_vqa: Path, tmp_path: Path) -> None:
    tables = [open_table(file) for file in two_sources(easy_vqa, tmp_path)]
    processor = Phi3VProcessor.from_pretrained(small_model_dir)
    for seed in range(5):
        for limit, expected in ((2, [1, 1]), (8, [3, 5]), (32, [12, 20]), (None, [12, 20])):
            questions = QuestionDataset(mix_tables(tables, ["a", "b"]), processor, limit=limit, seed=seed)
            assert np.bincount(questions.sources()).tolist() == expected
            assert questions.by_source == f" ({expected[0]} of a, {expected[1]} of b)"
            records = questions.index[:, 0].tolist()
            assert records == sorted(set(records)), "each once, in the order of the files"
    assert QuestionDataset(tables[0], processor, limit=5).by_source == ""


@pytest.mark.slow
def test_a_mixture_resumes_as_if_it_had_not_stopped(
    train: Train, tmp_path: Path, easy_vqa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second epoch too, whose sample of a source is another one."""
    files = two_sources(easy_vqa, tmp_path)
    settings = (*COMMON, "data.train", listed(*files), "data.num_workers", 2)
    code, whole = train(*settings, out="whole")
    assert code == 0
    for step in (4, 8):
        part = interrupted_copy(whole, step, tmp_path / f"from-{step}")
        code, _ = train(*settings, out=part.name, resume="auto")
        assert code == 0
        assert_same_run(whole, part, 9)
    logged = read_metrics(whole)
    assert [line["source/a/samples"] + line["source/b/samples"] for line in logged] == [
        line["samples"] for line in logged
    ]
    at_five = next(line for line in logged if line["step"] == 8)
    assert at_five["source/a/tokens"] + at_five["source/b/tokens"] == at_five["tokens"]
    # What differs is refused, and told by its key; files may be at another place.
    capsys.readouterr()
    part = interrupted_copy(whole, 4, tmp_path / "other")
    other = listed(*files, amounts=({"epochs": 2}, {"max_records": 12}))
    assert train(*settings, "data.train", other, out="other", resume="auto")[0] == 2
    assert "data.train was" in capsys.readouterr().err
    moved = tmp_path / "moved"
    (tmp_path / "two").rename(moved)
    renamed = listed(files[0], moved / "b.jsonl", amounts=(AMOUNTS[0], AMOUNTS[1] | {"name": "two"}))
    assert train(*settings, "data.train", renamed, out="other", resume="auto")[0] == 0
    shown = capsys.readouterr().out
    assert f"data.train: {files[1]} → {moved / 'b.jsonl'}" in shown
    assert "data.train[1].name: b → two" in shown
    for a, b in zip(lines(whole), lines(part), strict=True):
        named = b if b["step"] <= 4 else {key.replace("/two/", "/b/"): value for key, value in b.items()}
        assert named == a


def command_with_readers(*words: str) -> int:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    return command(*words)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_mixture_goes_on_on_another_number_of_ranks(
    small_model_dir: Path, easy_vqa: Path, tmp_path: Path, ranks: int
) -> None:
    files = two_sources(easy_vqa, tmp_path)
    settings = dict(zip(COMMON[::2], COMMON[1::2], strict=True)) | {
        "model.path": small_model_dir,
        "data.train": listed(*files),
        "distributed.engine": "ddp",
        "training.learning_rate": 2e-3,
    }

    def words(out: Path) -> list[str]:
        named = settings | {"training.output_dir": out, "data.num_workers": 2}
        return ["train", *(part for name, value in named.items() for part in (f"--{name}", str(value)))]

    run_ranks(ranks, command_with_readers, *words(tmp_path / "whole"), folder=tmp_path / "ranks")
    part = interrupted_copy(tmp_path / "whole", 4, tmp_path / "alone")
    shown = run_ranks(1, command_with_readers, *words(part), "--resume", folder=tmp_path / "printed")
    assert f"saved on {ranks} ranks, going on on 1" in shown
    for a, b in zip(lines(tmp_path / "whole"), lines(part), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key.endswith("loss"):  # float32 sums in another order, carried through a few optimizer steps
                assert a[key] == pytest.approx(b[key], abs=1e-4), key
            elif key.endswith(("samples", "questions")):
                assert a[key] == b[key], key


def test_the_command_line_from_another_folder(
    small_model_dir: Path, easy_vqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A recipe's list with relative paths, with weights; scores by name; then report and doctor from elsewhere."""
    two_sources(easy_vqa, tmp_path)
    for folder in ("one", "two"):
        lines_of = (easy_vqa / "test.jsonl").read_text().splitlines()
        part = lines_of[:6] if folder == "one" else lines_of[20:30]
        (tmp_path / folder / "test.jsonl").write_text("\n".join(part) + "\n")
    recipe = {
        "model": {"path": str(small_model_dir)},
        "data": {
            "train": [{"path": "one/a.jsonl", "weight": 1}, {"path": "two/b.jsonl", "weight": 3, "name": "receipts"}],
            "eval": ["one/test.jsonl", {"path": "two/test.jsonl", "name": "two", "max_records": 3}],
            "mixture_ends": "all",
            "num_workers": 0,
        },
        "training": {"output_dir": "run", "max_steps": 2, "batch_size": 2, "logging_steps": 1},
        "evaluation": {"eval_steps": 2, "max_new_tokens": 4},
    }
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "mixed.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "an epoch takes 12 of 12 records of a (25.0%), 36 of 20 records of receipts (75.0%)" in shown
    assert "10 questions to evaluate on" not in shown
    assert "9 questions to evaluate on (6 of test, 3 of two)" in shown
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["train"]
    assert [source["path"] for source in saved] == [str(tmp_path / name) for name in ("one/a.jsonl", "two/b.jsonl")]
    evaluation = json.loads((tmp_path / "run" / "eval_after.json").read_text())
    assert {name: each["num_questions"] for name, each in evaluation["sources"].items()} == {"test": 6, "two": 3}
    answers = [json.loads(line) for line in (tmp_path / "run" / "predictions_after.jsonl").open()]
    assert [line["source"] for line in answers] == ["test"] * 6 + ["two"] * 3
    for line in answers:
        folder = {"test": "one", "two": "two"}[line["source"]]
        assert all((tmp_path / folder / "images" / image).is_file() for image in line["images"])
    for name, each in evaluation["sources"].items():
        own = [line["score"] for line in answers if line["source"] == name]
        assert each["scores"]["accuracy"]["value"] == pytest.approx(sum(own) / len(own))
    (during,) = [line for line in read_metrics(tmp_path / "run") if "eval" in line]
    assert during["eval_sources"].keys() == {"test", "two"}
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert card.count("accuracy on two, 95 %") == 1
    tuned = resolve_model(str(tmp_path / "run"))
    probes, where = make_probes(tuned, 4, tmp_path)
    assert len(probes) == 4
    assert where == ", ".join(str(tmp_path / name / "test.jsonl") for name in ("one", "two"))
    assert {example.root.parent.name for example in find_examples(tuned)} <= {"one", "two"}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data = "[{path: ../one/a.jsonl, max_records: 4}, {path: ../two/b.jsonl}]"
    keys = ["--model.path", str(small_model_dir), "--training.output_dir", "run", "--method.name", "frozen-vision"]
    assert main(["doctor", *keys, "--data.train", data, "--training.batch_size", "2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "an epoch takes 4 of 12 records of a (16.7%), 20 of 20 records of b (83.3%)" in shown
    run = read_run(tmp_path / "run")
    assert len(run.curves.values["source/receipts/loss"]) == 2
    assert run.curves.evaluations[0]["sources"]["two"]["accuracy"]["n"] == 3
    assert run.evaluations["after"]["sources"]["two"]["num_questions"] == 3
    drawn = gallery(run, Thumbnails(10**6))
    assert drawn is not None
    assert all(place >= 0 for places in drawn["images"] for place in places), "each from its source's folder"
    assert main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[]", "data.train: lists no source"),
        ("[{path: gone/b.jsonl}, {path: one/a.jsonl}]", "gone/b.jsonl: no such file"),
        ("[one/a.jsonl, two/a.jsonl]", "data.train[1].name: 'a' is the name of data.train[0] too"),
        ("[{path: one/a.jsonl, wieght: 2}]", "unknown key wieght\n  → did you mean weight?"),
        ("[{path: one/a.jsonl, weight: 2, epochs: 1}]", "weight and epochs each say"),
        ("[{path: one/a.jsonl, weight: 2}, two/b.jsonl]", "data.train[0].weight: it is the only source with a weight"),
        ("[{path: one/a.jsonl, epochs: 0}]", "data.train[0].epochs: must be above 0"),
        ("[{name: a}]", "data.train[0]: has no path"),
        ("{path: one/a.jsonl}", "must be a path or a list"),
    ],
)
def test_what_is_wrong_with_a_list_is_said_first(
    train: Train, capsys: pytest.CaptureFixture[str], data: str, message: str
) -> None:
    code, folder = train("data.train", data)
    assert code == 2
    assert not folder.exists()
    assert message in capsys.readouterr().err
