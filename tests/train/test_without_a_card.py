"""The branches that only a GPU takes, as far as torch lets them run without one.

On fake tensors "on" a GPU no number is computed, but every operation checks that its tensors lie on one device and
that shapes and dtypes fit, and every kernel's arguments are those of its registration. The backward pass cannot run
so: torch's engine asks the driver for contexts and streams. Pinning is a copy here. Where not even that is possible the
code says why: "needs a card". What is the same code on any device is in ``test_on_a_card.py``.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_reads import sample
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.cpp_extension import include_paths, library_paths

from phi3v import Phi3VConfig, Phi3VForCausalLM
from phi3v.data.collate import Collator, pack_row
from phi3v.model import attention
from phi3v.model.attention import BACKENDS, MaskBackend
from phi3v.plan.hardware import find_gpu
from phi3v.processing.hd_transform import cut_flat_pages
from phi3v.train.checkpoints.writer import Checkpointer
from phi3v.train.compute import checkpointing
from phi3v.train.compute.checkpointing import apply_checkpointing, free_bytes
from phi3v.train.device import RuntimeDevice
from phi3v.train.engines.data_parallel import clip_gradients, step_if_finite
from phi3v.train.loop import TrainingLoop
from phi3v.train.methods.optimizers import SLICE, StochasticAdamW
from phi3v.train.observers.faults import Readback
from phi3v.train.pieces import HostCopies, Piece

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: see `pytest -m gpu`")
CUDA = torch.device("cuda", 0)
H100 = RuntimeDevice(CUDA, "bf16", "", 0, 1, gpu=find_gpu("h100"))


GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
namespace at { C10_REGISTER_GUARD_IMPL(CUDA, Guard) }
"""


@pytest.fixture(scope="module")
def device_guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What makes a GPU current, and does nothing: a torch that was built for the CPU has none.

    One that was built for CUDA brings it along for where there is no card.
    """
    if torch.backends.cuda.is_built():
        return
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, or a torch that was built for CUDA")
    folder = tmp_path_factory.mktemp("guard")
    (folder / "guard.cpp").write_text(GUARD)
    headers = [f"-I{path}" for path in include_paths()]
    libraries = [word for path in library_paths() for word in (f"-L{path}", "-lc10")]
    command = [compiler, "-shared", "-fPIC", "-std=c++20", *headers, str(folder / "guard.cpp"), *libraries]
    subprocess.run([*command, "-o", str(folder / "guard.so")], check=True)
    torch.ops.load_library(str(folder / "guard.so"))


@pytest.fixture
def fake_gpu(device_guard: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Fake tensors, autocast as on a GPU, and host memory of which none is pinned."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@pytest.fixture(scope="module")
def batches() -> dict[str, dict[str, Any]]:
    one, other, text = sample(9, ("a", 1)), sample(30, ("a", 1)), sample(20)
    two = sample(15, ("b", 2), ("a", 1))
    return {
        "padded": Collator(0)([one, two, text]),
        "packed": pack_row([[one], [two], [text]]),
        "shared": pack_row([[one, other], [two]]),
    }


IMPLEMENTATIONS = {
    "padded": ("sdpa",),
    "packed": ("packed_segments", "packed_varlen"),
    "shared": ("packed_mask", "packed_varlen", "packed_flex"),
}


def on_gpu(batch: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    """As the training loop sends a row."""
    fake = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    loop: Any = SimpleNamespace(runtime=H100)
    return TrainingLoop._inputs(loop, fake)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kind", ["padded", pytest.param("packed", marks=pytest.mark.slow), "shared"])
def test_a_forward_pass_stays_on_its_device(
    tiny_model_dir: Path, batches: dict[str, Any], fake_gpu: FakeTensorMode, kind: str
) -> None:
    """Under autocast, from pages and ids to the loss, in every attention; flex uncompiled: its kernel is Triton's."""
    batch = batches[kind]
    config = Phi3VConfig.from_pretrained(tiny_model_dir)
    with torch.device(CUDA):
        model = Phi3VForCausalLM(config).train()
    apply_checkpointing(model, "selective")
    row = on_gpu(batch, fake_gpu)
    for name in IMPLEMENTATIONS[kind]:
        model.set_attn_implementation(name)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_flex_attention", lambda _type: flex_uncompiled())
            loss = model(**row, loss_normalizer=2.0, logits_to_keep=None, use_cache=False).loss
        assert isinstance(loss, FakeTensor), name
        assert loss.device == CUDA, name


def flex_uncompiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def test_a_tensor_left_on_the_host_is_found(fake_gpu: FakeTensorMode) -> None:
    """What the tests above are for."""
    with pytest.raises(Exception, match="device"):
        torch.empty(3, device=CUDA) + torch.empty(3)


def test_pages_are_cut_there(fake_gpu: FakeTensorMode) -> None:
    crops = cut_flat_pages(torch.zeros(3 * 336 * 336, 3, dtype=torch.uint8, device=CUDA), [(336, 336), (672, 336)])
    assert (crops.device, crops.shape) == (CUDA, (4, 3, 336, 336))


def test_a_step_that_is_not_finite_is_left_out_on_the_device(fake_gpu: FakeTensorMode) -> None:
    """Clipping, fused AdamW with its ``found_inf`` and the way back of the loss read nothing."""
    model = torch.nn.Linear(8, 8, device=CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        norm = clip_gradients(model, 1.0)
        step_if_finite(optimizer, norm)
    assert optimizer.found_inf.device == CUDA  # type: ignore[attr-defined]
    assert all(state["step"].device == CUDA for state in optimizer.state.values())


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_small_moments_stay_there(fake_gpu: FakeTensorMode, monkeypatch: pytest.MonkeyPatch, moments: Any) -> None:
    """More values than are updated at a time. A generator is the driver's: numbers are drawn without one."""
    if moments == "8bit":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(StochasticAdamW, "_generator", lambda *_: None)
    monkeypatch.setattr(StochasticAdamW, "_code", lambda _self, _signed, device: torch.empty(256, device=device))
    monkeypatch.setattr(torch.Tensor, "__int__", lambda _: 0)  # the code of zero, which is read once
    weight = torch.nn.Parameter(torch.empty(SLICE + 512, dtype=torch.bfloat16, device=CUDA))
    optimizer = StochasticAdamW([weight], moments=moments)
    for _ in range(2):
        weight.grad = torch.empty_like(weight)
        optimizer.step()
    state = optimizer.state[weight]
    assert {value.device for value in state.values() if isinstance(value, torch.Tensor)} == {CUDA}
    assert state["exp_avg"].dtype == (torch.uint8 if moments == "8bit" else torch.bfloat16)


def test_numbers_come_back_from_the_device(fake_gpu: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """In lean mode the norm is the host's."""
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    back = Readback([torch.empty((), device=CUDA), torch.empty(())])
    assert back._host.device.type == "cpu"
    assert back._arrived is not None


def test_a_row_of_any_layout_is_one_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as on a GPU, through the compiler's front, below recomputing layers. Rows of one block and of many.

    Where the compiler stood aside for what recomputes, torch would make the whole matrix of scores.
    """
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(
        attention, "_flex_attention", lambda _type: torch.compile(flex_attention, dynamic=True, backend="eager")
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layouts = (((30, 5, 9), (0, 11)), ((40, 6), (3, 4, 5)), ((100, 140, 40), (0, 31)))
    weight = torch.randn(16, 16, requires_grad=True)
    found = []
    for layout in layouts:
        states = torch.randn(1, 2, sum(map(sum, layout)), 16)
        backend, plain = BACKENDS["packed_flex"](layout, torch.device("cpu")), MaskBackend(layout, torch.device("cpu"))

        def layer(states: torch.Tensor, backend: Any = backend) -> torch.Tensor:
            with torch.no_grad():  # it has no backward pass on the CPU
                attended = backend(states, states, states, None, 0.0)
            return attended @ weight

        output = checkpointing._RECOMPUTE_CHEAP(layer, states)
        torch.testing.assert_close(output, plain(states, states, states, None, 0.0) @ weight, atol=1e-5, rtol=1e-5)
        output.sum().backward()
        found.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert found[0] == 1
    assert found[-1] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_memory_that_torch_may_not_take_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(10, 10, bias=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (90_000, 100_000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5_000)
    for fraction, free in ((1.0, 90_000), (0.2, 15_000)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, fraction=fraction: fraction)
        assert free_bytes(model, CUDA, 1, 16) == free - 1_600


def test_a_save_beside_training_stays_on_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread is on the first one, where each rank of a machine would take memory."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    device = torch.device("cuda", 3)
    saves: Any = SimpleNamespace(run=SimpleNamespace(runtime=SimpleNamespace(device=device)), _error=None)
    Checkpointer._guarded(saves, lambda: chosen.append("written"))
    assert saves._error is None
    assert chosen == [device, "written"]


def test_copies_of_a_save_take_what_torch_pins() -> None:
    """Each tensor rounded up to a power of two."""
    with FakeTensorMode():
        pieces = [Piece(str(size), torch.empty(size, device=CUDA), 0, size) for size in (1024, 1025)]
    assert HostCopies().missing(pieces) == 4 * (1024 + 2048)
    assert HostCopies().missing([Piece("", torch.empty(1025), 0, 1025)]) == 4 * 1025
