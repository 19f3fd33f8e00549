"""Parameters and their bytes: exact, for the real size and against loaded models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.config import METHODS, LoraConfig, MethodConfig, MethodName, ModelConfig, RunConfig
from phi3v.model.presets import planned_config
from phi3v.model.shape import ModelShape
from phi3v.plan.parameters import count_parameters, meta_model
from phi3v.train.device import choose_device
from phi3v.train.methods.loading import inspect_model, load_for_training

PARAMETERS = 4_146_621_440  # of the published checkpoint, see tests/model/test_full_size.py


@pytest.mark.parametrize("method", ["full", "frozen-vision", "lora"])
def test_the_real_size_is_exact(method: MethodName) -> None:
    """Every parameter of the published model, and the moments that torch's own AdamW makes for the trained ones."""
    config, _ = planned_config("microsoft/Phi-3.5-vision-instruct")
    choice = MethodConfig(name=method, lora=LoraConfig(rank=8))
    counts = count_parameters(config, choice, "bf16")
    model = meta_model(config, choice, "bf16")
    adapters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert counts.total == PARAMETERS + adapters
    assert counts.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert counts.optimizer_bytes("adamw") == sum(v.numel() * v.element_size() for v in states)


def test_the_real_size_in_four_bits() -> None:
    """4-bit linear layers (all but the head) and half-precision rest; QLoRA's authors count 0.5 + 0.0625 bytes."""
    config, _ = planned_config("microsoft/Phi-3.5-vision-instruct")
    shape = ModelShape.of(config)
    counts = count_parameters(config, MethodConfig(name="qlora", lora=LoraConfig(rank=8)), "bf16")
    head = embeddings = shape.vocabulary * shape.hidden
    packed = PARAMETERS - head - embeddings
    assert counts.frozen_bytes == pytest.approx(0.5625 * packed + 2 * (head + embeddings), rel=0.002)


def tensors(model: Any) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (value for value in (state.absmax, state.code) if value is not None)
            if state.state2 is not None:
                yield from (state.offset, state.state2.absmax, state.state2.code)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loaded_model_has_the_bytes_that_were_counted(
    tiny_model_dir: Path, method: MethodName, precision: str
) -> None:
    """bitsandbytes shares one code book among the layers of the CPU or not: half a kilobyte a layer is left open."""
    choice = MethodConfig(name=method, lora=LoraConfig(rank=4))
    run = RunConfig(model=ModelConfig(path=str(tiny_model_dir)), method=choice)
    runtime = choose_device(precision)  # type: ignore[arg-type]
    model = load_for_training(run, inspect_model(run, runtime), runtime)
    config, _ = planned_config(str(tiny_model_dir))
    counts = count_parameters(config, choice, precision)
    counted = sum(tensor.numel() * tensor.element_size() for tensor in tensors(model))
    assert counts.weight_bytes == pytest.approx(counted, abs=0 if method != "qlora" else 512 * 60)
    assert counts.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_eight_bit_moments_keep_small_tensors_in_full() -> None:
    config, _ = planned_config("microsoft/Phi-3.5-vision-instruct")
    counts = count_parameters(config, MethodConfig(name="full"), "bf16")
    assert 2.0 < counts.optimizer_bytes("adamw_8bit") / counts.trainable < 2.1
    assert counts.optimizer_bytes("adamw_bf16") == 4 * counts.trainable
