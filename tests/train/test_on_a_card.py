"""A step of training on a GPU beside the same on the CPU: `pytest -m gpu`, in a minute.

The code is that of any device: `pytest -m slow` runs it on the CPU, so that a card meets no test that never ran.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import load

from phi3v.config import MethodConfig, RunConfig, TrainingConfig
from phi3v.data.collate import Page, Sample, pack_row
from phi3v.machine import CPU, accelerator_of
from phi3v.train.checkpoints.random_state import random_state, set_random_state
from phi3v.train.compute.checkpointing import apply_checkpointing, free_bytes
from phi3v.train.device import RuntimeDevice
from phi3v.train.engines.choice import EngineChoice
from phi3v.train.engines.data_parallel import DataParallel, step_if_finite
from phi3v.train.loop import TrainingLoop
from phi3v.train.methods.loading import choose_packed_attention
from phi3v.train.methods.optimizers import StochasticAdamW
from phi3v.train.observers.faults import Readback

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)]


@pytest.fixture
def runtime(request: pytest.FixtureRequest) -> RuntimeDevice:
    """In float32."""
    device = torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")
    gpu = accelerator_of(device) if request.param == "cuda" else CPU
    return RuntimeDevice(device, "fp32", "", 0, 1, gpu=gpu)


on_each_device = pytest.mark.parametrize("runtime", DEVICES, indirect=True)


def sample(text: int, *pages: tuple[str, int]) -> Sample:
    """``text`` tokens after the pages, the last three with labels; a page is a name and a number of crops in a row."""
    noise = torch.Generator().manual_seed(text)
    ids, made = [1], []
    for number, (name, crops) in enumerate(pages, start=1):
        ids += [-number] * ((crops + 1) * 144 + 1 + 2 * 12)
        made.append(
            Page(name, (336, 336 * crops), torch.randint(0, 256, (336, 336 * crops, 3), generator=noise).byte())
        )
    ids += range(5, 5 + text)
    return Sample(ids, [-100] * (len(ids) - 3) + ids[-3:], made)


def step(model: Any, runtime: RuntimeDevice, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The gradients of a row, on the host."""
    loop: Any = TrainingLoop.__new__(TrainingLoop)
    loop.runtime = runtime
    dtype = runtime.autocast_dtype
    with torch.autocast(runtime.device.type, dtype, enabled=dtype is not None):
        loss = model(**loop._inputs(row), loss_normalizer=2.0, logits_to_keep=None, use_cache=False).loss
    loss.backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


@on_each_device
@pytest.mark.parametrize("shared", [False, True], ids=["samples", "shared-image"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_has_the_gradients_of_the_cpu(
    runtime: RuntimeDevice, small_model_dir: Path, shared: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the attention that a run would choose, recomputing what is cheap, beside the whole mask in float32.

    Of the norm of each gradient: float32, 1e-3 for other orders of sums through the layers; bf16, which rounds to 2**-8
    at every one of some fifty products in a row, 15 %. A wrong mask or a lost part is off by the norm itself.
    """
    if precision == "bf16" and not runtime.gpu.bf16:
        pytest.skip(f"{runtime.gpu.name} has no bf16")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default rounds the tower's convolution
    one, other, two = sample(9, ("a", 1)), sample(30, ("a", 1)), sample(15, ("b", 2), ("a", 1))
    row = pack_row([[one, other], [two]] if shared else [[one], [two], [sample(20)]])
    host = RuntimeDevice(torch.device("cpu"), "fp32", "", 0, 1)
    here = RuntimeDevice(runtime.device, precision, "", 0, 1, gpu=runtime.gpu)
    plain = load(small_model_dir, MethodConfig("full")).train()
    plain.set_attn_implementation("packed_mask")
    expected = step(plain, host, row)
    name, _ = choose_packed_attention("auto", here.gpu, here.dtype, shares_prefixes=shared)
    model = load(small_model_dir, MethodConfig("full")).to(here.device).train()
    model.set_attn_implementation(name)
    apply_checkpointing(model, "selective")
    found = step(model, here, row)
    assert found.keys() == expected.keys()
    allowed = 0.15 if precision == "bf16" else 1e-3
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for key, gradient in expected.items():
        off = (found[key] - gradient).norm()
        assert off <= allowed * (gradient.norm() + 1e-3 * whole), f"{key} by {name}: {off / gradient.norm():.3g}"


@on_each_device
def test_a_step_that_is_not_finite_changes_nothing(runtime: RuntimeDevice) -> None:
    model = torch.nn.Linear(8, 8, device=runtime.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for norm, moves in ((1.0, True), (float("nan"), False), (float("inf"), False), (1.0, True)):
        before = model.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, norm)
        step_if_finite(optimizer, torch.tensor(norm, device=runtime.device))
        assert torch.equal(before, model.weight) != moves
        assert model.weight.isfinite().all()


@pytest.mark.parametrize("runtime", ["cpu", DEVICES[1]], indirect=True)
def test_fp16_scales_its_gradients(runtime: RuntimeDevice, small_model_dir: Path) -> None:
    """The engine's own scaler; the CPU has one too. A step that overflows changes nothing, and halves it."""
    model = load(small_model_dir, MethodConfig("full")).to(runtime.device).train()
    config = RunConfig(training=TrainingConfig(precision="fp16", learning_rate=1e-3, warmup_steps=0))
    half = RuntimeDevice(runtime.device, "fp16", "", 0, 1, gpu=runtime.gpu)
    engine = DataParallel(model, EngineChoice("none", ""), config, half)
    engine.prepare(10)
    assert engine.scaler is not None
    assert engine.optimizer.defaults["fused"]
    ids = torch.arange(3, 40, device=runtime.device)[None]
    row = {"input_ids": ids, "labels": ids, "use_cache": False}
    before = {name: value.clone() for name, value in model.named_parameters()}
    norms = []
    for factor in (1e-3, 1e30, 1e-3):
        loss = engine.forward(row, last=True).loss * factor
        engine.backward(loss, last=True)
        norms.append(engine.grad_norm())
        scale, steps = engine.scaler.get_scale(), engine.schedule.last_epoch
        engine.step(norms[-1])
        moved = any(not torch.equal(before[name], value) for name, value in model.named_parameters())
        assert moved == norms[-1].isfinite().item() == (engine.schedule.last_epoch > steps)
        assert engine.scaler.get_scale() == (scale if moved else scale / 2)
        before = {name: value.clone() for name, value in model.named_parameters()}
    assert [bool(norm.isfinite()) for norm in norms] == [True, False, True]


@on_each_device
@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_small_moments_move_weights_as_adamw_does(runtime: RuntimeDevice, moments: Any) -> None:
    """float32 weights, which are not rounded. The moments are off by 2**-8 and 1/16, and so is an update."""
    if moments == "8bit":
        pytest.importorskip("bitsandbytes")
    start = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    weights = [torch.nn.Parameter(start.clone().to(runtime.device)) for _ in range(2)]
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = [
        StochasticAdamW([weights[0]], moments=moments, **settings),
        torch.optim.AdamW([weights[1]], **settings),
    ]
    for number in range(5):
        gradient = torch.randn(100, 100, generator=torch.Generator().manual_seed(number)).to(runtime.device)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    ours, theirs = (weight.detach().cpu() - start for weight in weights)
    assert (ours - theirs).norm() <= (0.15 if moments == "8bit" else 0.02) * theirs.norm()


@on_each_device
def test_random_numbers_come_again(runtime: RuntimeDevice) -> None:
    state = random_state()
    first = torch.rand(5, device=runtime.device)
    set_random_state(state)
    assert torch.equal(torch.rand(5, device=runtime.device), first)


@on_each_device
def test_losses_come_back(runtime: RuntimeDevice) -> None:
    values = [torch.tensor(float(number), device=runtime.device) for number in range(5)]
    assert Readback([*values, torch.tensor(7.0)]).values() == [0, 1, 2, 3, 4, 7]


@on_each_device
def test_some_memory_is_free(runtime: RuntimeDevice) -> None:
    """And less than that where torch may take less."""
    model = torch.nn.Linear(10, 10)
    free = free_bytes(model, runtime.device, 1, 16)
    assert free > 0
    if runtime.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.1)
        try:
            assert free_bytes(model, runtime.device, 1, 16) < 0.11 * torch.cuda.get_device_properties().total_memory
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
