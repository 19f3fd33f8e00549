"""Compiled layers and Liger's kernels against the plain ones, where they can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Train, load

from phi3v.config import MethodConfig, RunConfig, TrainingConfig
from phi3v.plan.hardware import find_gpu
from phi3v.train.checks import Case, refusals
from phi3v.train.compute.checkpointing import apply_checkpointing
from phi3v.train.compute.kernels import apply_kernels
from phi3v.train.device import RuntimeDevice


def gradients(model: Any, device: str = "cpu") -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.arange(3, 60, device=device)[None]
    loss = model(input_ids=ids, labels=ids, logits_to_keep=None, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_agree(small_model_dir: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Under selective checkpointing; 1e-5 of the largest entry. The default suite traces and differentiates the layers;
    building the compiler's own kernels, the default outside of tests, takes a minute.

    Fused kernels take the sums of norms and softmax in another order: float32 rounding, through four layers.
    """
    expected, plain = gradients(load(small_model_dir, MethodConfig("frozen-vision")).train())
    model = load(small_model_dir, MethodConfig("frozen-vision")).train()
    apply_checkpointing(model, "selective")
    compile_layer = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_layer(self, backend=backend, **how))
    names = set(model.state_dict())
    apply_kernels(model, TrainingConfig(compile=True))
    assert set(model.state_dict()) == names
    torch._dynamo.utils.counters.clear()
    loss, compiled = gradients(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert loss == pytest.approx(expected, rel=1e-6)
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        atol = 1e-5 * float(gradient.abs().max()) + 1e-9
        torch.testing.assert_close(compiled[name], gradient, atol=atol, rtol=0, msg=name)


@pytest.mark.gpu
def test_liger_agrees(small_model_dir: Path) -> None:
    """float32 on the GPU; 1e-4 of the largest entry, for its kernels use fast exponentials."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("liger_kernel")
    model = load(small_model_dir, MethodConfig("full")).cuda().train()
    expected, plain = gradients(model, "cuda")
    model.zero_grad()
    apply_kernels(model, TrainingConfig(kernels="liger"))
    loss, fused = gradients(model, "cuda")
    assert loss == pytest.approx(expected, rel=1e-4)
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-9, rtol=0)


def test_liger_is_refused_where_it_cannot_run(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        code, folder = train("training.kernels", "liger")
        assert code == 2
        assert "training.kernels: Liger's kernels need a GPU" in capsys.readouterr().err
        assert not folder.exists()
    old = RuntimeDevice(torch.device("cuda"), "fp16", "", 0, 1, gpu=find_gpu("t4"))
    liger = RunConfig(training=TrainingConfig(kernels="liger"))
    assert ["does not train in fp16" in str(found) for found in refusals(Case(liger, old))] == [True]
    assert not refusals(Case(RunConfig(), old))
