"""``phi3v eval`` of whatever a tuned model may be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_helpers import Train

from phi3v.cli import main
from phi3v.config import RunConfig
from phi3v.errors import UserError
from phi3v.train.finetuned import resolve_model


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_a_model_folder(
    small_model_dir: Path, easy_vqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = easy_vqa / "yes-no.jsonl"
    lines = [json.loads(line) for line in (easy_vqa / "test.jsonl").read_text().splitlines()[:60]]
    kept = [line for line in lines if line["conversations"][0]["assistant"] in ("yes", "no")][:9]
    data.write_text("".join(json.dumps(line) + "\n" for line in kept))
    names = ["auroc", "accuracy", "per_class_accuracy", "consistency"]
    given = evaluate(
        capsys,
        *(small_model_dir, "--data", data, "--metrics", *names, "--answer-words", "yes", "no"),
        *("--max-new-tokens", 3, "--batch-size", 4, "--num-crops", 2, "--out", tmp_path / "out"),
    )
    assert given["metric"] == "auroc"
    assert list(given["scores"]) == names
    assert 0 <= given["score"] <= 1
    assert given["num_questions"] == 9
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["scores"] == given["scores"]
    predictions = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in predictions] == [line["id"] for line in kept]
    for line, record in zip(predictions, kept, strict=True):
        turn = record["conversations"][0]
        assert (line["prompt"], line["references"], line["images"]) == (
            turn["user"],
            [turn["assistant"]],
            turn["images"],
        )
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["score"] == line["correct"] == (line["prediction"].lower() == turn["assistant"])
    assert main(["eval", str(small_model_dir), "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_run_its_final_and_its_best_come_to_what_the_run_measured(
    train: Train, easy_vqa: Path, method: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, folder = train(
        *("method.name", method, "method.lora.rank", 8, "training.learning_rate", 5e-3),
        *("training.max_steps", 4, "training.batch_size", 1, "training.micro_batch_size", 1),
        *("evaluation.metrics", "[token_f1, anls]", "evaluation.eval_steps", 2, "evaluation.keep_best", "true"),
    )
    assert code == 0
    after = json.loads((folder / "eval_after.json").read_text())
    assert after["metric"] == "token_f1"
    places = [folder, folder / "final", folder / "best"]
    for number, place in enumerate(places):
        out = tmp_path / f"eval-{number}"
        given = evaluate(capsys, place, "--data", easy_vqa / "test.jsonl", "--out", out)
        again = json.loads((out / "eval.json").read_text())
        assert again["generated_texts"] == after["generated_texts"]
        # Metrics, questions and lengths are the run's own.
        assert given["scores"] == after["scores"]
    lines = (folder / "predictions_after.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == after["generated_texts"]
    assert len((folder / "predictions_before.jsonl").read_text().splitlines()) == 4


def test_an_adapter_that_left_its_run(
    train: Train, easy_vqa: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, folder = train(
        *("method.name", "lora", "method.lora.rank", 8, "training.learning_rate", 5e-3),
        *("training.batch_size", 2, "training.micro_batch_size", 2),
    )
    assert code == 0
    after = json.loads((folder / "eval_after.json").read_text())
    shutil.copytree(folder / "final", tmp_path / "my.adapter")
    arguments = ("--max-questions", 4, "--max-new-tokens", 4, "--out", tmp_path / "out")
    evaluate(capsys, tmp_path / "my.adapter", "--data", easy_vqa / "test.jsonl", *arguments)
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["generated_texts"] == after["generated_texts"]
    config = tmp_path / "my.adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="which model the adapter goes on"):
        resolve_model(str(tmp_path / "my.adapter"))


def test_a_run_that_did_not_end_points_at_its_best(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(RunConfig().to_yaml())
    with pytest.raises(UserError, match="did the run end early"):
        resolve_model(str(tmp_path))
    (tmp_path / "best").mkdir()
    with pytest.raises(UserError, match=r"take .*best"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--data", "DATA"], "no model there"),
        (["MODEL", "--data", "nowhere.jsonl"], "no such file"),
        (["MODEL", "--data", "DATA", "--metrics", "blue"], "--metrics: there is no 'blue'"),
        (["MODEL", "--data", "DATA", "--metrics", "auroc"], "evaluation.answer_words"),
        (["MODEL", "--data", "DATA", "--batch-size", "0"], "must be at least 1"),
        (["MODEL", "--data", "DATA", "--num-crops", "0"], "must be at least 1"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str], words: str, small_model_dir: Path, easy_vqa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MODEL": str(small_model_dir), "DATA": str(easy_vqa / "test.jsonl")}
    assert main(["eval", *(places.get(argument, argument) for argument in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_a_checkpoint_is_measured_as_it_is(train: Train, easy_vqa: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights are those of ``final/``, in the dtype that they were trained in."""
    settings = ("evaluation.before", "false", "checkpoint.save_steps", 3, "evaluation.max_new_tokens", 3)
    code, folder = train(*settings, "method.name", "lora", "method.lora.rank", 4)
    assert code == 0
    tuned = resolve_model(str(folder / "checkpoint-3"))
    assert tuned.adapter == folder / "checkpoint-3" / "model"
    assert tuned.run.method.lora.rank == 4
    given = evaluate(capsys, folder / "checkpoint-3", "--data", easy_vqa / "test.jsonl")
    after = json.loads((folder / "eval_after.json").read_text())
    assert given["scores"] == after["scores"]
