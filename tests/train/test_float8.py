"""FP8 layers against the plain ones, emulated, and where they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import load

from phi3v import machine
from phi3v.config import LoraConfig, MethodConfig, RunConfig, TrainingConfig
from phi3v.plan.hardware import find_gpu
from phi3v.train.checks import Case, refusals
from phi3v.train.compute.float8 import apply_float8
from phi3v.train.device import RuntimeDevice


def losses_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.arange(3, 60)[None]
    loss = model(input_ids=ids, labels=ids, logits_to_keep=None, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["frozen-vision", "lora"])
def test_emulated_layers_agree(small_model_dir: Path, method: Any) -> None:
    """57 tokens, no multiple of 16. Loss within 1 %, every gradient within 35 % of its norm.

    A rounded factor is off by up to 1/16 (e4m3) or 1/8 (e5m2), at random, and four layers add up; a wrong scale or a
    swapped operand is off by its whole norm and more.
    """
    pytest.importorskip("torchao.float8")
    settings = MethodConfig(method, lora=LoraConfig(rank=4, parts=["decoder"]))
    torch.manual_seed(0)
    expected, plain = losses_and_gradients(load(small_model_dir, settings).train())
    torch.manual_seed(0)
    model = load(small_model_dir, settings).train()
    names = set(model.state_dict())
    assert apply_float8(model, emulate=True) == 4 * model.config.num_hidden_layers
    assert set(model.state_dict()) == names
    loss, rounded = losses_and_gradients(model)
    assert loss != expected
    assert loss == pytest.approx(expected, rel=0.01)
    assert rounded.keys() == plain.keys()
    for name, gradient in plain.items():
        assert (rounded[name] - gradient).norm() <= 0.35 * gradient.norm() + 1e-9, name


def refuse(method: Any = "full", *, device: str = "h100", precision: str = "bf16") -> str:
    config = RunConfig(method=MethodConfig(method), training=TrainingConfig(fp8=True))
    gpu = machine.CPU if device == "cpu" else find_gpu(device)
    return "\n".join(
        map(str, refusals(Case(config, RuntimeDevice(torch.device(gpu.type), precision, "", 0, 1, gpu=gpu))))
    )


def test_it_is_refused_where_it_cannot_run() -> None:
    assert "four bits" in refuse("qlora")
    assert "this is cpu" in refuse(device="cpu")
    assert "NVIDIA A100 80 GB has no products of float8" in refuse(device="a100-80gb")
    assert "AMD Instinct MI300X has no products of float8" in refuse(device="mi300x")
    assert "precision is fp16" in refuse(precision="fp16")
