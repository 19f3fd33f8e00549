"""Inputs of layers that wait in the host's memory: what is moved, when, and that no number changes."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from phi3v.train.compute.offload import MIN_BYTES, Offload, checkpoint_offloaded

WIDTH = 64
ROWS = MIN_BYTES // (4 * WIDTH)  # of the smallest tensor that is moved


class LateCopies:
    """Copies that run when they are waited for and not before, in their order, as a side stream's may.

    Attributes:
        started: what was copied, in words.
    """

    def __init__(self, device: torch.device) -> None:
        self.waiting: list[Any] = []
        self.started: list[tuple[int, int]] = []  # addresses of targets and sources
        self.ended = 0

    def start(self, target: torch.Tensor, source: torch.Tensor) -> int:
        target.fill_(float("nan"))
        # Weakly: it is for `Offload` to keep them.
        self.waiting.append((weakref.ref(target), weakref.ref(source)))
        self.started.append((target.data_ptr(), source.data_ptr()))
        return len(self.started)

    def wait(self, end: int) -> None:
        while self.ended < end:
            target, source = (tensor() for tensor in self.waiting[self.ended])
            assert target is not None, "the target was let go of while it was written"
            assert source is not None, "the source was let go of while it was read"
            target.copy_(source)
            self.ended += 1


def late() -> tuple[Offload, Callable[[], LateCopies]]:
    made: list[LateCopies] = []

    def make(device: torch.device) -> LateCopies:
        made.append(LateCopies(device))
        return made[-1]

    return Offload(make), lambda: made[0]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.nn.functional.dropout(torch.tanh(self.linear(hidden)), 0.1)


def run(layers: nn.ModuleList, first: torch.Tensor, call: Callable[..., Any] | None, rows: int = 2) -> Any:
    """Gradients of as many rows, one after the other, as in a step."""
    torch.manual_seed(1)
    layers.zero_grad()
    for row in range(rows):
        hidden = first * (row + 1)
        for layer in layers:
            hidden = layer(hidden) if call is None else call(layer, hidden)
        hidden.square().sum().backward()
    return [parameter.grad.clone() for parameter in layers.parameters()]  # type: ignore[union-attr]


@pytest.fixture
def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(5))


@pytest.fixture
def first() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, requires_grad=True)


def test_gradients_are_bit_equal_however_late_copies_end(layers: nn.ModuleList, first: torch.Tensor) -> None:
    """The values are copied, not computed."""
    offload, copies = late()
    expected = run(layers, first, None)
    own = run(layers, first, checkpoint_offloaded(offload))
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    # Of five inputs all go out, and the last is still there when the backward pass begins.
    assert len(copies().started) == 2 * (5 + 4)
    assert copies().ended == len(copies().started)


def test_inputs_come_back_in_the_order_in_which_they_are_needed(layers: nn.ModuleList, first: torch.Tensor) -> None:
    offload, copies = late()
    run(layers, first, checkpoint_offloaded(offload), rows=1)
    out, back = copies().started[:5], copies().started[5:]
    assert [source for _, source in back] == [target for target, _ in reversed(out[:4])]


def test_one_input_is_fetched_while_another_layer_is_recomputed(layers: nn.ModuleList, first: torch.Tensor) -> None:
    offload, copies = late()
    seen = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: seen.append((len(copies().started), copies().ended)))
    run(layers, first, checkpoint_offloaded(offload), rows=1)
    # Forward: a layer computes while its own input is copied. Backward: while that of the layer before is fetched.
    assert seen[:5] == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]
    assert seen[5:] == [(6, 5), (7, 6), (8, 7), (9, 8), (9, 9)]


def test_the_device_keeps_one_input_at_a_time(layers: nn.ModuleList, first: torch.Tensor) -> None:
    alive: list[StorageWeakRef] = []
    counts: list[int] = []

    def watch(layer: nn.Module, args: Any) -> None:
        alive.append(StorageWeakRef(args[0].untyped_storage()))
        counts.append(sum(not storage.expired() for storage in alive))

    for layer in layers:
        layer.register_forward_pre_hook(watch)
    run(layers, first, functools.partial(checkpoint, use_reentrant=False), rows=1)
    assert counts[:5] == [1, 2, 3, 4, 5]
    alive.clear()
    counts.clear()
    run(layers, first, checkpoint_offloaded(late()[0]), rows=1)
    assert counts[:5] == [1, 1, 1, 1, 1]


def test_parameters_small_tensors_and_odd_views_stay(first: torch.Tensor) -> None:
    offload, _ = late()
    big = first.detach()
    stay = [nn.Parameter(big), big[:1], big.t(), big[:1].expand(ROWS, WIDTH), torch.empty(0)]
    for tensor in stay:
        assert offload.pack(tensor) is tensor
        assert offload.unpack(tensor) is tensor
    part = torch.randn(2 * ROWS, WIDTH)[ROWS:]  # a view, but in one piece
    packed = offload.pack(part)
    assert not isinstance(packed, torch.Tensor)
    assert packed.host.untyped_storage().nbytes() == part.nbytes  # not what it is a view of
    assert torch.equal(offload.unpack(packed), part)


def test_a_tensor_that_is_saved_twice_or_asked_for_twice() -> None:
    offload, _ = late()
    a, b = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    saved = [offload.pack(tensor) for tensor in (a, b, a)]
    for _ in range(2):
        for packed, tensor in zip(reversed(saved), (a, b, a), strict=True):
            assert torch.equal(offload.unpack(packed), tensor)
    assert torch.equal(offload.unpack(saved[1]), b)


def test_a_graph_that_is_never_used_leaves_nothing(layers: nn.ModuleList, first: torch.Tensor) -> None:
    """As after a step that ended with an exception; the next one is right."""
    offload, _ = late()
    call = checkpoint_offloaded(offload)
    hidden = first * 1
    for layer in layers:
        hidden = call(layer, hidden)
    del hidden
    gc.collect()
    assert len(offload._under_way) == 1
    expected = run(layers, first, None)
    assert all(torch.equal(a, b) for a, b in zip(run(layers, first, call), expected, strict=True))
    assert not offload._under_way


def test_nothing_is_moved_where_no_gradient_goes_back(layers: nn.ModuleList, first: torch.Tensor) -> None:
    offload, _ = late()
    call = checkpoint_offloaded(offload)
    with torch.no_grad():
        call(layers[0], first * 1)
    call(layers[0], first.detach())
    assert offload._device is None


def test_an_input_that_is_changed_in_place_is_not_copied_silently(first: torch.Tensor) -> None:
    offload, _ = late()
    hidden = first.detach() * 1
    offload.pack(hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        offload.pack(first.detach() * 1)


def test_what_other_operations_save_can_be_moved_too(first: torch.Tensor) -> None:
    """Hooks around operations that are not recomputed: outputs, squares that save a tensor twice."""
    offload, _ = late()

    def compute(hidden: torch.Tensor) -> torch.Tensor:
        hidden = torch.sigmoid(hidden * hidden)
        return (torch.exp(hidden) * hidden).sum()

    (expected,) = torch.autograd.grad(compute(first), first)
    with saved_tensors_hooks(offload.pack, offload.unpack):
        loss = compute(first)
    (own,) = torch.autograd.grad(loss, first)
    assert torch.equal(own, expected)
