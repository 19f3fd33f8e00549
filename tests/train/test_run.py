"""Whole runs through the real command line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from run_helpers import Train, read_metrics
from safetensors.torch import load_file

from phi3v.config import load_config
from phi3v.data.collate import Collator
from phi3v.data.rows import RowDataset
from phi3v.data.table import open_table
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.presets import init_model
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.methods import weights as saving


def batch_of(easy_vqa: Path, folder: Path, count: int = 2) -> dict[str, torch.Tensor]:
    processor = Phi3VProcessor.from_pretrained(folder)
    dataset = RowDataset(open_table(easy_vqa / "train.jsonl"), processor)
    batch = Collator(processor.tokenizer.pad_token_id)([dataset.samples((index,))[0] for index in range(count)])
    del batch["counts"], batch["loss_weights"]
    return batch


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(**batch).logits
    return result


@pytest.mark.parametrize("method", ["full", "frozen-vision", "lora", "qlora"])
def test_every_method_learns_on_easy_vqa(train: Train, method: str) -> None:
    # A frozen random tower still shows enough for the loss to fall: most of it is the form of the answers.
    settings = ("training.max_steps", 12, "training.learning_rate", 5e-3)
    code, folder = train("method.name", method, "method.lora.rank", 8, *settings)
    assert code == 0
    losses = [line["loss"] for line in read_metrics(folder)]
    assert len(losses) == 12
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]


def test_the_run_folder_holds_what_the_design_says(train: Train, easy_vqa: Path, small_model_dir: Path) -> None:
    code, folder = train("training.max_steps", 2)
    assert code == 0
    held = {path.name for path in folder.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "eval_before.json",
        "eval_after.json",
        "final",
        "log.txt",
    } <= held
    # The resolved configuration reads back as the one that ran.
    again = load_config(folder / "config.yaml")
    assert again.training.max_steps == 2
    assert again.model.path == str(small_model_dir)
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"]["adam_beta2"] == 0.95
    assert json.loads((folder / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    for line in read_metrics(folder):
        assert line["tokens_per_second"] > 0
        assert line["peak_memory_gb"] > 0
    last = read_metrics(folder)[-1]
    assert last["samples"] == 4
    turns = np.bincount(open_table(easy_vqa / "train.jsonl").questions()[:, 0])
    assert turns.min() * 4 <= last["questions"] <= turns.max() * 4
    for name in ("eval_before.json", "eval_after.json"):
        measured = json.loads((folder / name).read_text())
        assert measured["num_questions"] == 4
        assert len(measured["answers"]) == len(measured["generated_texts"]) == 4
        assert measured["score"] == sum(measured["correct"]) / 4
    # Every file of the saved model is hashed, but its card, which people may edit.
    hashes = json.loads((folder / "final" / "manifest.json").read_text())["sha256"]
    assert set(hashes) == {path.name for path in (folder / "final").iterdir()} - {"manifest.json", "README.md"}
    weights = (folder / "final" / "model.safetensors").read_bytes()
    assert hashes["model.safetensors"] == hashlib.sha256(weights).hexdigest()


def test_a_full_run_changes_what_it_trains_and_nothing_else(train: Train, small_model_dir: Path) -> None:
    _, folder = train("method.name", "frozen-vision", "training.max_steps", 2)
    before = load_file(small_model_dir / "model.safetensors")
    after = load_file(folder / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "embed_tokens" not in name}


def test_the_same_seed_gives_the_same_numbers(train: Train) -> None:
    runs = [train("training.max_steps", 3, out=name)[1] for name in ("one", "two")]
    other = train("training.max_steps", 3, "training.seed", 1, out="other")[1]
    keys = ("loss", "grad_norm", "learning_rate", "samples", "questions", "tokens")
    one, two, three = ([{k: line[k] for k in keys} for line in read_metrics(folder)] for folder in (*runs, other))
    assert one == two
    assert one != three
    answers = [json.loads((folder / "eval_after.json").read_text())["generated_texts"] for folder in runs]
    assert answers[0] == answers[1]
    weights = [load_file(folder / "final" / "model.safetensors") for folder in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("method.lora.also_train", "[projector]"),
        ("method.lora.also_train", "[vision, projector]"),
    ],
)
def test_an_adapter_survives_saving_loading_and_merging(
    train: Train, easy_vqa: Path, small_model_dir: Path, monkeypatch: pytest.MonkeyPatch, extra: tuple[Any, ...]
) -> None:
    live: list[Any] = []
    save = saving.save_final
    monkeypatch.setattr(saving, "save_final", lambda model, *rest: (live.append(model), save(model, *rest)))
    # The adapter's folder has a dot in its name and is not called "lora"; both have broken other tools.
    _, folder = train("method.name", "lora", "method.lora.rank", 8, *extra, out="my.run-v1.0")
    batch = batch_of(easy_vqa, folder / "final")
    expected = logits(live[0], batch)
    base = Phi3VForCausalLM.from_pretrained(small_model_dir)
    untrained = logits(base, batch)
    assert (expected - untrained).abs().max() > 0.05  # the run did change the model
    # The adapter holds what was trained, and of the frozen weights only what is part of a module trained in full.
    held = load_file(folder / "final" / "adapter_model.safetensors")
    others = [name for name in held if "lora_" not in name]
    assert all("img_projection" in name or "img_processor" in name for name in others)
    assert len(others) == {(): 0, "[projector]": 4, "[vision, projector]": 59}[extra[-1] if extra else ()]
    loaded = PeftModel.from_pretrained(base, folder / "final")
    # Same float32 operations in the same order: equal up to threads.
    assert (logits(loaded, batch) - expected).abs().max() < 1e-5
    merged = loaded.merge_and_unload()
    # Merging adds the adapter to the weights instead of to the activations: float32 rounding only.
    assert (logits(merged, batch) - expected).abs().max() < 1e-5
    merged.save_pretrained(folder / "merged")
    official = set(load_file(small_model_dir / "model.safetensors"))
    assert set(load_file(folder / "merged" / "model.safetensors")) == official
    again = Phi3VForCausalLM.from_pretrained(folder / "merged")
    assert (logits(again, batch) - expected).abs().max() < 1e-5


def test_a_save_that_loses_something_is_noticed(train: Train, small_model_dir: Path, tmp_path: Path) -> None:
    model = Phi3VForCausalLM.from_pretrained(small_model_dir)
    processor = Phi3VProcessor.from_pretrained(small_model_dir)
    saving.save_final(model, processor, tmp_path / "whole", model.state_dict())
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(saving.IncompleteSaveError, match=r"lm_head\.weight differs"):
        saving.verify_saved(model, tmp_path / "whole", model.state_dict())
    model.register_parameter("new", torch.nn.Parameter(torch.ones(1)))
    with torch.no_grad():
        model.lm_head.weight[0, 0] -= 1
    with pytest.raises(saving.IncompleteSaveError, match=r"not saved|differs"):
        saving.verify_saved(model, tmp_path / "whole", model.state_dict())


def test_a_model_stored_in_bf16_is_saved_in_bf16(train: Train, tmp_path: Path) -> None:
    """Trained in float32, but what is saved (and measured after) has the dtype of the checkpoint it came from."""
    assert init_model("tiny", tmp_path / "bf16", dtype=torch.bfloat16) > 0
    code, folder = train("model.path", tmp_path / "bf16", "training.max_steps", 2, "training.learning_rate", 1e-2)
    assert code == 0
    saved = load_file(folder / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert json.loads((folder / "final" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    before = load_file(tmp_path / "bf16" / "model.safetensors")
    assert not torch.equal(before["lm_head.weight"], saved["lm_head.weight"])


def test_text_only_data_cannot_train_vision(train: Train, easy_vqa: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (easy_vqa / "train.jsonl").read_text().splitlines()[:16]]
    for record in lines:
        record["conversations"][0]["images"] = []
    file = easy_vqa / "text.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ("data.train", file, "data.eval", "null", "training.max_steps", 2)
    assert train(*settings)[0] == 2
    assert "no record has an image" in capsys.readouterr().err
    assert train(*settings, "method.name", "frozen-vision", out="frozen")[0] == 0


@pytest.mark.parametrize("method", ["full", "frozen-vision", "lora", "qlora"])
def test_bf16_trains_on_the_cpu(train: Train, easy_vqa: Path, tmp_path: Path, method: str) -> None:
    """Float32 and bfloat16 tensors meet in every method: in the embeddings, the residual stream and the cache.

    One record, over and over: a CPU without bfloat16 instructions takes ten seconds for each.
    """
    (tmp_path / "images").symlink_to(easy_vqa / "images")
    for name, line in (("one.jsonl", "train.jsonl"), ("ask.jsonl", "test.jsonl")):
        (tmp_path / name).write_text((easy_vqa / line).read_text(encoding="utf-8").splitlines()[0] + "\n")
    settings: dict[str, Any] = {
        "training.precision": "bf16",
        "method.name": method,
        "method.lora.rank": 8,
        "data.train": tmp_path / "one.jsonl",
        "data.eval": tmp_path / "ask.jsonl",
        "training.max_steps": 2,
        "training.batch_size": 1,
        "training.micro_batch_size": 1,
        "training.warmup_steps": 0,
        "evaluation.before": "false",
    }
    code, folder = train(*(part for item in settings.items() for part in item))
    assert code == 0
    losses = [line["loss"] for line in read_metrics(folder)]
    assert losses[-1] < losses[0]


def test_fp16_without_a_gpu_is_refused(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, folder = train("training.precision", "fp16")
    assert code == 2
    assert "fp16 training needs a GPU" in capsys.readouterr().err
    assert not folder.exists()


def test_a_finished_run_is_not_overwritten_by_accident(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = train("training.max_steps", 2)
    assert code == 0
    kept = (folder / "final" / "model.safetensors").read_bytes()
    code, _ = train("training.max_steps", 2, "training.seed", 5)
    assert code == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (folder / "final" / "model.safetensors").read_bytes() == kept
    (folder / "notes.txt").write_text("mine")
    code, _ = train("training.max_steps", 2, "training.seed", 5, "training.overwrite", "true")
    assert code == 0
    assert (folder / "final" / "model.safetensors").read_bytes() != kept
    assert (folder / "notes.txt").read_text() == "mine"


def test_without_evaluation_data_it_just_trains(train: Train) -> None:
    code, folder = train("data.eval", "null", "training.max_steps", 1)
    assert code == 0
    assert not (folder / "eval_before.json").exists()
    assert not (folder / "eval_after.json").exists()


def test_batch_size_must_divide(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = train("training.batch_size", 8, "training.micro_batch_size", 3)
    assert code == 2
    assert "use a multiple of 3" in capsys.readouterr().err
