"""Compiled layers and Liger's kernels against the plain ones, where they can run."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
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


INTERPRETED = """
import sys

import numpy
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

from phi3v import Phi3VForCausalLM
from phi3v.config import TrainingConfig
from phi3v.train.compute.kernels import apply_kernels

whole = interpreter._implicit_cvt


def as_compiled(argument):
    # A compiled kernel gets a float as float32; the interpreter leaves it Python's.
    if not isinstance(argument, float):
        return whole(argument)
    return tl.tensor(interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), tl.float32), tl.float32)


interpreter._implicit_cvt = as_compiled
model = Phi3VForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).train()
ids = torch.arange(3, 40)[None]
found = []
for kernels in ("torch", "liger"):
    model.zero_grad(set_to_none=True)
    if kernels == "liger":
        apply_kernels(model, TrainingConfig(kernels=kernels))
        import liger_kernel.ops.rms_norm

        liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # CUDA's library has no interpreter
    loss = model(input_ids=ids, labels=ids, logits_to_keep=None, use_cache=False).loss
    loss.backward()
    found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
(expected, plain), (got, fused) = found
assert model.loss_kernel == "liger"
torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
assert fused.keys() == plain.keys()
for name, gradient in plain.items():
    atol = 1e-5 * float(gradient.abs().max()) + 1e-9
    torch.testing.assert_close(fused[name], gradient, atol=atol, rtol=0, msg=name)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: see `pytest -m gpu`")
@pytest.mark.skipif(not find_spec("liger_kernel"), reason="needs liger-kernel and triton 3.9")
def test_liger_agrees_interpreted(small_model_dir: Path) -> None:
    """Its kernels forward and backward, by Triton's interpreter, which has to know before anything imports it.

    float32; 1e-5 of the largest entry, for other orders of sums.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED, str(small_model_dir)], check=True, env=environment)


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
