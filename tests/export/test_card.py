"""The cards of runs and exports: the hub's metadata, no local path, and a snippet that runs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from phi3v.cli import main
from phi3v.config import DataConfig, DataSource, MethodConfig, ModelConfig, RunConfig
from phi3v.data.shards.write import ShardOptions, shard_data
from phi3v.serve.conversation import AnswerSettings, Chat, Turn
from phi3v.train.card import _datasets as datasets_of
from phi3v.train.card import write_card
from phi3v.train.device import choose_device
from phi3v.train.finetuned import FinetunedModel, resolve_model

BASE = "microsoft/Phi-3.5-vision-instruct"


def read_card(folder: Path) -> tuple[ModelCardData, str]:
    card = ModelCard.load(folder / "README.md")
    return card.data, card.text


def require_no_path(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    paths = re.findall(r"(?<![\w:/.])~?/\w[\w.-]*/[\w./-]+", text)
    assert not paths


@pytest.mark.parametrize("kind", ["final", "merged", "adapter"])
def test_metadata(kind: str, run: Path, exports: dict[str, Path]) -> None:
    folder = (exports | {"final": run / "final"})[kind]
    data, text = read_card(folder)
    require_no_path(folder)
    assert data.library_name == ("transformers" if kind == "merged" else "peft")
    assert data.pipeline_tag == "image-text-to-text"
    assert data.tags == ["phi3_v", "phi3v", "lora"]
    assert data.datasets == ["easy-vqa"]
    assert data.language == "en"
    assert data.base_model is None  # a folder of this machine
    assert data.get("base_model_relation") is None
    measured = json.loads((run / "eval_after.json").read_text())
    assert data.metrics == list(measured["scores"]) == ["accuracy", "anls"]
    for result, (name, score) in zip(data.eval_results, measured["scores"].items(), strict=True):
        assert (result.task_type, result.dataset_type, result.dataset_split) == (
            "image-text-to-text",
            "easy-vqa",
            "test",
        )
        low, high = (round(score[key], 4) for key in ("low", "high"))
        assert (result.metric_type, result.metric_value) == (name, round(score["value"], 4))
        assert result.metric_args == {"interval_95": [low, high], "questions": 4}
        assert f"95 % interval {low:.4f} – {high:.4f}" in result.metric_name
        assert f"| after training | {name} | {100 * score['value']:.2f} %" in text
    assert ("How it was checked" in text) == (kind != "final")
    assert ("vllm serve merged --max-model-len 4096 " in text) == (kind == "merged")


def test_shards_tell_their_datasets_too(easy_vqa: Path, tmp_path: Path) -> None:
    shard_data([easy_vqa / "test.jsonl"], tmp_path / "shards", ShardOptions())
    assert datasets_of([DataSource(str(tmp_path / "shards"))]) == ["easy-vqa"]
    (tmp_path / "shards" / "records.arrow").unlink()
    assert datasets_of([DataSource(str(tmp_path / "shards"))]) == []


def test_the_card_is_not_part_of_the_manifest(exports: dict[str, Path], tmp_path: Path) -> None:
    """So that people may edit it."""
    shutil.copytree(exports["merged"], tmp_path / "mine")
    assert "README.md" not in json.loads((tmp_path / "mine" / "manifest.json").read_text())["sha256"]
    (tmp_path / "mine" / "README.md").write_text("# Mine\n")
    assert main(["export", "--verify", str(tmp_path / "mine")]) == 0


@pytest.mark.parametrize("kind", ["final", "merged", "adapter"])
def test_the_snippet_runs(
    kind: str,
    run: Path,
    exports: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Beside the folder, wherever that is now; and it answers as ``phi3v chat`` does."""
    source = run if kind == "final" else exports[kind]
    shutil.copytree(source, tmp_path / "elsewhere" / source.name)
    image = Image.new("RGB", (400, 340), (200, 40, 40))
    image.save(tmp_path / "elsewhere" / "image.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    (code,) = re.findall(r"```python\n(.*?)```", read_card(source / "final" if kind == "final" else source)[1], re.S)
    capsys.readouterr()
    exec(code, {})
    printed = capsys.readouterr().out
    chat = Chat(resolve_model(source.name), choose_device("fp32"))
    *_, answer = chat.answer([Turn("What is shown?", (image,))], AnswerSettings(max_new_tokens=64))
    assert printed.strip() == answer.strip()


def test_a_base_of_the_hub(tmp_path: Path) -> None:
    tuned = FinetunedModel(
        BASE, tmp_path, RunConfig(model=ModelConfig(BASE), method=MethodConfig("qlora")), tmp_path / "gone"
    )
    write_card(tmp_path, tuned, name="mine")
    data, text = read_card(tmp_path)
    assert (data.base_model, data["base_model_relation"], data.license) == (BASE, "adapter", "mit")
    assert data.tags == ["phi3_v", "phi3v", "qlora"]
    assert f"[{BASE}](https://huggingface.co/{BASE}) with the method `qlora`" in text
    write_card(tmp_path, tuned, name="mine", is_adapter=False)
    assert read_card(tmp_path)[0]["base_model_relation"] == "finetune"


def test_licence_and_language_are_those_of_the_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tuned = FinetunedModel(str(base), tmp_path)
    write_card(tmp_path, tuned, name="mine")
    assert read_card(tmp_path)[0].license is None
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: de\n---\n")
    write_card(tmp_path, tuned, name="mine")
    data, _ = read_card(tmp_path)
    assert (data.license, data.language) == ("apache-2.0", "de")
    (base / "README.md").write_text("---\n- : no {metadata\n---\n")
    write_card(tmp_path, tuned, name="mine")
    assert read_card(tmp_path)[0].license is None


def test_a_score_that_was_not_measured_of_these_weights_is_left_out(run: Path, tmp_path: Path) -> None:
    config = RunConfig(data=DataConfig(eval="test.jsonl"), method=MethodConfig("qlora"))
    tuned = FinetunedModel(BASE, run / "final", config, run)
    for weights, is_adapter, number in (
        (tuned, True, 2),
        (tuned, False, None),  # merged into weights that are not in 4 bits
        (replace(tuned, is_checkpoint=True), True, None),
    ):
        write_card(tmp_path, weights, name="mine", is_adapter=is_adapter)
        results = read_card(tmp_path)[0].eval_results
        assert (len(results) if results is not None else None) == number


def test_an_adapter_that_names_its_base_as_the_hub_does(
    run: Path, small_model_dir: Path, tmp_path: Path, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(run), "--out", str(out), "--samples", "1", "--adapter"]
    assert main([*arguments, "--base-id", "./models"]) == 2
    assert "--base-id ./models: is no model's name on the hub" in capsys.readouterr().err
    assert main([*arguments, "--base-id", BASE]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    assert (read_card(out)[0].base_model, read_card(out)[0].license) == (BASE, "mit")
    assert main(["export", "--verify", str(out), "--model", str(small_model_dir)]) == 0
