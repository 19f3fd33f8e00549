"""The kinds of adapters: they train, and what is saved answers on the published base as what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from run_helpers import Train, load, read_metrics

from phi3v.config import LoraConfig, MethodConfig, load_config
from phi3v.errors import UserError
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.methods.weights import read_trained, save_final, saved_tensors

KINDS: dict[str, dict[str, Any]] = {
    "default": {"init": "default"},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "pissa": {"init": "pissa"},
    "pissa-rslora-projector": {"init": "pissa", "rslora": True, "also_train": ["projector"]},
    "dora-vision": {"dora": True, "also_train": ["vision"]},
}


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 20, 30, 40, 50, 60]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_answers_as_the_trained_one(tmp_path: Path, small_model_dir: Path, kind: str) -> None:
    method = MethodConfig(name="lora", lora=LoraConfig(rank=4, **KINDS[kind]))
    model = load(small_model_dir, method)
    base = logits(Phi3VForCausalLM.from_pretrained(small_model_dir))
    # Nothing is learnt yet. PiSSA has taken the weights apart in float32.
    torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([[1, 20, 30, 40, 50, 60]])
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model)
    assert float((trained - base).abs().max()) > 1e-2

    tensors = saved_tensors(model)
    save_final(model, Phi3VProcessor.from_pretrained(small_model_dir), tmp_path / "final", tensors)
    assert logits(model).equal(trained)
    back = read_trained(model, tmp_path / "final")
    assert all(torch.equal(back[name], tensors[name]) for name in back)
    reloaded = PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(small_model_dir), tmp_path / "final")
    torch.testing.assert_close(logits(reloaded), trained, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(reloaded.merge_and_unload()), trained, atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    is_pissa = kind.startswith("pissa")
    assert config["r"] == (8 if is_pissa else 4)
    assert config["init_lora_weights"] == ("gaussian" if kind in ("dora", "rslora", "dora-vision") else True)


def test_a_pissa_run_keeps_its_best(train: Train) -> None:
    code, folder = train(
        *("method.name", "lora", "method.lora.rank", 4, "method.lora.init", "pissa", "method.lora.lora_plus_ratio", 8),
        *("evaluation.eval_steps", 1, "evaluation.keep_best", "true", "evaluation.metrics", "[anls]"),
        *("training.max_steps", 2),
    )
    assert code == 0
    line = next(line for line in read_metrics(folder) if line["step"] == 2 and "loss" in line)
    assert line["learning_rate_decoder_B"] == pytest.approx(8 * line["learning_rate_decoder"])
    best = json.loads((folder / "best" / "adapter_config.json").read_text())
    assert best["r"] == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--method.name", "qlora", "--method.lora.init", "pissa"], "4 bits.*gaussian, or method.name lora"),
        (["--method.lora.dora", "true", "--method.lora.init", "pissa"], "which DoRA does not allow"),
        (["--method.lora.lora_plus_ratio", "0"], "must be above 0"),
        (["--training.learning_rates.vision", "-1"], "must be above 0"),
    ],
)
def test_kinds_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_config(None, overrides)
