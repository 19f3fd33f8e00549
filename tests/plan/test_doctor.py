"""The doctor finds each fault with a message of its own, and says nothing of a sound run but that it is."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v.cli import main
from phi3v.doctor import diagnosis
from phi3v.processing import conversation
from phi3v.processing.conversation import IGNORE_INDEX, TokenStream

Examine = Callable[..., tuple[int, dict[str, dict[str, Any]], str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, colour, file in (("red", (200, 30, 30), "train"), ("blue", (30, 30, 200), "eval")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "images" / f"{name}.png")
        lines = [
            {"id": str(k), "conversations": [{"images": [f"{name}.png"], "user": "what colour?", "assistant": name}]}
            for k in range(4)
        ]
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "train.jsonl"


@pytest.fixture
def examine(tmp_path: Path, data: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> Examine:
    """Run ``phi3v doctor``; gives the exit code, the findings by check (failures first) and what was shown."""

    def run(**settings: object) -> tuple[int, dict[str, dict[str, Any]], str]:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("")
        keys: dict[str, object] = {
            "model.path": tiny_model_dir,
            "data.train": data,
            "data.eval": data.with_name("eval.jsonl"),
            "training.output_dir": tmp_path / "run",
        }
        keys |= {name.replace("__", "."): value for name, value in settings.items()}
        command = [part for name, value in keys.items() for part in (f"--{name}", str(value))]
        code = main(["doctor", str(recipe), "--json", *command])
        captured = capsys.readouterr()
        findings: dict[str, dict[str, Any]] = {}
        for finding in json.loads(captured.out)["findings"]:
            if finding["verdict"] == "fail" or finding["check"] not in findings:
                findings[finding["check"]] = finding
        return code, findings, captured.err

    return run


def failures(findings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {check: finding for check, finding in findings.items() if finding["verdict"] == "fail"}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_sound_run_passes(examine: Examine, tmp_path: Path, method: str) -> None:
    code, findings, shown = examine(method__name=method)
    assert code == 0
    assert not failures(findings)
    assert findings["gradients"]["what"].startswith("all ")
    if method == "lora":
        assert "adapters on qkv_proj ×4" in findings["trained, decoder"]["what"] or (
            "qkv_proj ×4" in findings["trained, decoder"]["what"]
        )
    assert "[image 1: 313 tokens]" in shown
    assert "red<|end|>" in shown
    assert "ready to train" in shown
    assert not (tmp_path / "run").exists()


def test_a_lora_target_that_matches_nothing(examine: Examine) -> None:
    code, findings, _ = examine(method__name="lora", method__lora__targets="[q_porj]")
    assert code == 2
    assert failures(findings).keys() >= {"model"}
    assert "'q_porj' matches no linear layer" in findings["model"]["what"]
    assert "q_proj" in findings["model"]["hint"]


@pytest.mark.parametrize(("setting", "what"), [("fp8", "FP8 needs a GPU"), ("kernels", "Liger's kernels need a GPU")])
def test_kernels_that_the_machine_lacks(examine: Examine, setting: str, what: str) -> None:
    code, findings, _ = examine(**{f"training__{setting}": {"fp8": "true", "kernels": "liger"}[setting]})
    assert code == 2
    assert what in findings["configuration"]["what"]
    assert findings["model"]["verdict"] == "pass"  # the rest is looked at all the same


def test_an_all_masked_dataset(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = diagnosis.encode_record

    def masked(*args: Any, **kwargs: Any) -> TokenStream:
        stream = encode(*args, **kwargs)
        return TokenStream(stream.input_ids, [IGNORE_INDEX] * len(stream.labels))

    monkeypatch.setattr(diagnosis, "encode_record", masked)
    code, findings, _ = examine()
    assert code == 2
    assert "4 of 4 sampled records are masked entirely, first line 1" in findings["labels"]["what"]
    assert findings["gradients"]["verdict"] == "warn"


def test_a_missing_optional_part(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    code, findings, _ = examine(method__name="qlora")
    assert code == 2
    assert "qlora needs bitsandbytes" in findings["configuration"]["what"]
    assert findings["configuration"]["hint"] == 'pip install "phi3v[qlora]"'


def test_a_gradient_that_never_arrives(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose output is cut from the graph, as reentrant checkpointing behind frozen embeddings cuts it."""
    load = diagnosis.load_for_training

    def cut(*args: Any) -> Any:
        model = load(*args)
        model.model.layers[1].register_forward_hook(lambda module, inputs, output: output.detach())
        return model

    monkeypatch.setattr(diagnosis, "load_for_training", cut)
    code, findings, _ = examine()
    assert code == 2
    assert list(failures(findings)) == ["gradients"]
    assert "model.layers.0.self_attn.qkv_proj.weight: trainable, but has no gradient" in findings["gradients"]["what"]


def test_an_unsupervised_end(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "END_OF_TEXT", "")
    code, findings, _ = examine()
    assert code == 2
    assert list(failures(findings)) == ["end of answers"]
    assert "<|endoftext|> is not trained on" in findings["end of answers"]["what"]
    assert "would not learn to stop" in findings["end of answers"]["what"]


def test_a_precision_that_the_device_lacks(examine: Examine) -> None:
    code, findings, _ = examine(training__precision="fp16")
    assert code == 2
    assert "fp16 training needs a GPU" in findings["precision"]["what"]


def test_a_batch_that_cannot_fit(examine: Examine) -> None:
    code, findings, _ = examine(training__batch_size=1_000_000, training__micro_batch_size=1_000_000)
    assert code == 2
    assert list(failures(findings)) == ["plan"]
    assert "does not fit this machine as it is" in findings["plan"]["what"]
    assert "micro_batch_size 1" in findings["plan"]["hint"]


def test_faults_of_the_data_are_named_with_their_line(examine: Examine, data: Path) -> None:
    data.write_text(data.read_text() + '{"id": "x", "conversations": [{"user": "no answer"}]}\n')
    code, findings, _ = examine()
    assert code == 2
    assert "train.jsonl:5" in findings["data.train"]["what"]


def test_a_finished_run_in_the_way_and_a_missing_model(examine: Examine, tmp_path: Path) -> None:
    (tmp_path / "run" / "final").mkdir(parents=True)
    code, findings, _ = examine()
    assert code == 2
    assert "holds a run already" in findings["run folder"]["what"]
    code, findings, _ = examine(model__path=tmp_path / "nothing", training__output_dir=tmp_path / "other")
    assert code == 2
    assert "model" in failures(findings)


def test_training_looks_at_the_cheap_part(
    tmp_path: Path,
    data: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(diagnosis, "free_space", lambda folder: 1000)
    keys = [
        "--model.path",
        str(tiny_model_dir),
        "--data.train",
        str(data),
        "--training.output_dir",
        str(tmp_path / "r"),
    ]
    assert main(["train", *keys]) == 2
    assert "disk: 0 GiB free" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_record_beyond_what_the_model_reads_stops_every_command(
    examine: Examine,
    data: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 400}))
    line = {"id": "long", "conversations": [{"images": ["red.png"], "user": "why? " * 40, "assistant": "red"}]}
    with data.open("a") as file:
        file.write(json.dumps(line) + "\n")
    for module in ("phi3v.train.prepare", "phi3v.doctor.diagnosis"):
        monkeypatch.setattr(f"{module}.load_for_training", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.setattr("phi3v.train.finetuned.load_weights", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    words = f"{data}:5: the record has "
    code, findings, _ = examine(model__path=model)
    assert code == 2
    assert words in findings["lengths"]["what"]
    assert "reads 400 (max_position_embeddings)" in findings["lengths"]["what"]
    keys = ["--model.path", str(model), "--data.train", str(data), "--training.output_dir", str(tmp_path / "run")]
    for command in (
        ["train", *keys],
        ["plan", str(tmp_path / "recipe.yaml"), *keys],
        ["eval", str(model), "--data", str(data)],
        ["data", "check", str(data), "--model.path", str(model)],
    ):
        assert main(command) == 2, command
        captured = capsys.readouterr()
        assert words in (captured.out + captured.err).replace("conversations: ", ""), command
    assert not (tmp_path / "run").exists()


def test_evaluation_data_is_not_trained_on(examine: Examine, data: Path) -> None:
    assert examine()[1]["overlap"]["verdict"] == "pass"
    code, findings, _ = examine(data__eval=data)
    assert code == 0
    assert findings["overlap"]["verdict"] == "warn"
    assert "of 4 questions 4 are asked there too" in findings["overlap"]["what"]


def test_answers_that_will_be_cut(examine: Examine) -> None:
    assert examine()[1]["answers"]["verdict"] == "pass"
    code, findings, _ = examine(evaluation__max_new_tokens=1)
    assert code == 0
    assert findings["answers"]["verdict"] == "warn"
    assert "4 of 4 questions" in findings["answers"]["what"]


def test_the_objective_is_looked_at(examine: Examine, data: Path) -> None:
    """Pairs are tried with their own loss; where they are lacking, or are not looked at, it is said."""
    code, findings, _ = examine(objective__name="dpo")
    assert code == 2
    assert "train.jsonl:1" in findings["data"]["what"]
    assert "4 of 4 records have no rejected one" in findings["data"]["what"]
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines:
        line["conversations"][0]["rejected"] = "green"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, findings, _ = examine(objective__name="dpo")
    assert code == 0, findings
    assert "dpo, beta 0.1; reference: the model that training begins with; 4 records" in findings["objective"]["what"]
    assert findings["gradients"]["verdict"] == "pass"
    code, findings, _ = examine()
    assert code == 0
    assert findings["objective"]["verdict"] == "warn"
    assert "4 records have rejected answers that it ignores" in findings["objective"]["what"]
