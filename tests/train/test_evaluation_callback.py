"""Measuring while it trains: what it writes, what it keeps, when it stops, and that training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Train, read_metrics
from safetensors.torch import load_file

from phi3v.config import RunConfig
from phi3v.evaluate.evaluation import EvaluationResult
from phi3v.evaluate.metrics import Score
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.presets import init_model
from phi3v.train.device import RuntimeDevice
from phi3v.train.engines import DataParallel
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.methods.weights import in_stored_dtype, read_trained, save_replacing
from phi3v.train.observers import evaluation as evaluation_callback

SIX_STEPS = ("training.max_steps", 6, "training.batch_size", 1, "training.micro_batch_size", 1)


def measured(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder) if "eval" in line]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Scores that measurements come to, one after the other, in place of real ones."""
    script: list[float | None] = []

    def measure(*args: Any, **kwargs: Any) -> EvaluationResult:
        value = script.pop(0)
        return EvaluationResult([Score("accuracy", value, value, value, 4)], 0.1, [], [], [], 4)

    monkeypatch.setattr(evaluation_callback, "evaluate_model", measure)
    return script


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("method.name", "lora", "method.lora.rank", 4, "method.lora.dropout", 0.5),  # dropout draws random numbers
    ],
)
def test_training_does_not_notice(train: Train, extra: tuple[Any, ...]) -> None:
    settings = (*extra, *SIX_STEPS, "evaluation.after", "false")
    code, plain = train(*settings, out="plain")
    assert code == 0
    code, folder = train(
        *settings, "evaluation.eval_steps", 2, "evaluation.eval_steps_questions", 3, "evaluation.keep_best", "true"
    )
    assert code == 0
    keys = ("step", "loss", "grad_norm", "learning_rate", "samples", "tokens")
    lines = [[{k: line[k] for k in keys} for line in read_metrics(f) if "loss" in line] for f in (plain, folder)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in measured(folder)] == [2, 4, 6]
    for line in measured(folder):
        score = line["eval"]["accuracy"]
        assert score["n"] == 3
        assert score["low"] <= score["value"] <= score["high"]


def test_the_last_step_is_measured_too(train: Train) -> None:
    code, folder = train("evaluation.eval_steps", 4, "training.max_steps", 5, "evaluation.metrics", "[anls, accuracy]")
    assert code == 0
    lines = measured(folder)
    assert [line["step"] for line in lines] == [4, 5]
    assert list(lines[0]["eval"]) == ["anls", "accuracy"]
    # Without keep_best the last weights stay; measured at the last step and after, they come to the same.
    after = json.loads((folder / "eval_after.json").read_text())
    assert after["scores"]["anls"]["value"] == lines[-1]["eval"]["anls"]["value"]
    assert not (folder / "best").exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_final_holds_the_best_weights(
    train: Train, scripted: list[float | None], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted += [0.25, 0.75, 0.75]
    settings = (
        *("method.name", method, "method.lora.rank", 4, "evaluation.before", "false"),
        *SIX_STEPS,
    )
    code, folder = train(*settings, "evaluation.eval_steps", 2, "evaluation.keep_best", "true")
    assert code == 0
    shown = capsys.readouterr().out
    assert "final/ holds the weights of step 4" in shown
    assert [line["best"] for line in measured(folder)] == [True, True, False]  # of equal scores the first stays
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    best, final = (load_file(folder / save / name) for save in ("best", "final"))
    assert best.keys() == final.keys()
    assert all(torch.equal(best[key], final[key]) for key in best)
    assert (folder / "best" / "manifest.json").is_file()
    # Another step wins, and the weights are others.
    scripted += [0.5, 0.25, 0.125]
    code, other = train(*settings, "evaluation.eval_steps", 2, "evaluation.keep_best", "true", out="other")
    assert code == 0
    second = load_file(other / "final" / name)
    assert any(not torch.equal(second[key], final[key]) for key in final)
    result = json.loads((folder / "log.txt").read_text().split("result ")[1].splitlines()[0])
    assert result["best_step"] == 4
    assert not result["stopped_early"]


def test_it_stops_when_nothing_gets_better(
    train: Train, scripted: list[float | None], capsys: pytest.CaptureFixture[str]
) -> None:
    scripted += [0.5, None, 0.5, 0.4]
    code, folder = train(
        *("training.max_steps", 20, "evaluation.eval_steps", 1, "evaluation.early_stopping_patience", 2),
        *("evaluation.before", "false", "evaluation.after", "false"),
    )
    assert code == 0
    assert [line["step"] for line in measured(folder)] == [1, 2, 3]
    assert max(line["step"] for line in read_metrics(folder)) == 3
    shown = capsys.readouterr().out
    assert "stopping at step 3" in shown
    assert "stopped early" in shown


def test_weights_are_measured_as_they_are_saved_and_trained_as_they_were(tmp_path: Path) -> None:
    init_model("tiny", tmp_path / "bf16", dtype=torch.bfloat16)
    model = Phi3VForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight += 1e-5
    before = {name: (p, p.data.clone()) for name, p in model.named_parameters()}
    with in_stored_dtype(model, torch.bfloat16):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter.data, before[name][1])


def test_a_save_is_replaced_as_a_whole_and_reads_back(tmp_path: Path, small_model_dir: Path) -> None:
    from phi3v.processing.processor import Phi3VProcessor

    model = Phi3VForCausalLM.from_pretrained(small_model_dir)
    device = RuntimeDevice(torch.device("cpu"), "fp32", "", 0, 1)
    engine = DataParallel(model, EngineChoice("none", ""), RunConfig(), device)
    processor = Phi3VProcessor.from_pretrained(small_model_dir)
    for value in (1.0, 2.0):
        with torch.no_grad():
            model.lm_head.weight.fill_(value)
        save_replacing(model, processor, tmp_path / "best", engine.full_state_dict())
        assert [path.name for path in tmp_path.iterdir()] == ["best"]
    with torch.no_grad():
        model.lm_head.weight.fill_(3.0)
    engine.load_full_state_dict(read_trained(model, tmp_path / "best"))
    assert bool((model.lm_head.weight == 2.0).all())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("evaluation.keep_best", "true"), "there is no evaluation during training"),
        (("evaluation.early_stopping_patience", 2), "set evaluation.eval_steps"),
        (("evaluation.eval_steps", 2, "data.eval", "null"), "there is no data to evaluate on"),
        (("evaluation.metrics", "[acuracy]"), "did you mean accuracy?"),
        (("evaluation.metrics", "[]"), "no metric is named"),
        (("evaluation.metrics", "[anls, anls]"), "named twice"),
        (("evaluation.metrics", "[auroc]"), "the positive one first"),
        (("evaluation.metrics", "[auroc]", "evaluation.answer_words", "[yes]"), "at least two"),
        (
            ("evaluation.metrics", "[auroc]", "evaluation.answer_words", "[maybe, never]"),
            "which is none of the answer words",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_loaded(
    train: Train,
    settings: tuple[Any, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("phi3v.train.prepare.load_for_training", lambda *args: pytest.fail("a model was loaded"))
    code, folder = train(*settings)
    assert code == 2
    assert words in capsys.readouterr().err
    assert not folder.exists()
