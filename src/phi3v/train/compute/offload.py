"""Inputs of layers in the host's memory from the forward pass to the backward pass.

Where every layer is recomputed, its input is all that it keeps. Here that is copied to pinned host memory while the
layer computes, and back while the layer behind it is recomputed. torch's ``save_on_cpu`` copies on the stream that
computes, which waits for each copy, and fetches nothing ahead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

MIN_BYTES = 4096  # a smaller tensor costs more to copy than to keep


class Copies(Protocol):
    """Copies beside the computation, in the order in which they are started."""

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Copy once what was queued so far has been computed; both tensors have to stay until then. Gives its end."""

    def wait(self, end: Any) -> None:
        """Let what is computed from here on wait for the end of a copy."""


class SideStream:
    """`Copies` on a CUDA stream of their own; the host waits for none.

    The allocators know nothing of them: device memory belongs to the stream that computes, and whoever starts a copy
    keeps its tensors until that stream waits for its end. Pinned memory is kept by torch until copies from or to it
    have ended. Needs a card: streams are the driver's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        # The source has to be computed, and what was in the target's memory before has to be used up.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        end: torch.cuda.Event = self._stream.record_event()
        return end

    def wait(self, end: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(end)


class HostCopies:
    """`Copies` where the device is the host: for tests, as it saves nothing there."""

    def start(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def wait(self, end: Any) -> None:
        return


def copies_of(device: torch.device) -> Copies:
    """How tensors of a device are copied to the host and back."""
    return SideStream(device) if device.type == "cuda" else HostCopies()


class _Saved:
    """A saved tensor that is moved.

    Attributes:
        host: its values, complete at the end of the copy out.
        on_device: itself until the copy out has ended; then None; then what it is copied back to, until it is taken.
        end: of the copy that is under way.
        version: of the tensor whose values are copied out; None of one that is copied back.
        before: what was saved before it, and is needed after it.
    """

    __slots__ = ("__weakref__", "before", "end", "host", "on_device", "version")

    def __init__(self, host: torch.Tensor, before: weakref.ref[_Saved] | None) -> None:
        self.host = host
        self.before = before
        self.on_device: torch.Tensor | None = None
        self.end: Any = None
        self.version: int | None = None


class Offload:
    """The hooks that move saved tensors out and fetch them back; one for all layers of a model.

    Parameters, tensors of other classes, small ones and views that are not contiguous stay where they are. One that is
    saved twice is moved twice. A tensor is on the device until the next one is saved: one copy at a time is under way.
    """

    def __init__(self, copies_of: Callable[[torch.device], Copies] = copies_of) -> None:
        self._copies_of = copies_of
        self._copies: Copies
        self._device: torch.device | None = None
        self._under_way: list[_Saved] = []  # in the order of their copies; they keep both tensors of each
        self._last: weakref.ref[_Saved] | None = None

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        """What autograd keeps in place of ``tensor``."""
        if type(tensor) is not torch.Tensor or tensor.nbytes < MIN_BYTES or not tensor.is_contiguous():
            return tensor
        if self._device != tensor.device:
            self._device, self._copies = tensor.device, self._copies_of(tensor.device)
        self._settle()
        source = tensor.detach()  # without the graph that it is part of
        saved = _Saved(torch.empty_like(source, device="cpu", pin_memory=source.is_cuda), self._last)
        self._last = weakref.ref(saved)
        saved.on_device, saved.version = source, source._version
        self._start(saved, saved.host, source)
        return saved

    def unpack(self, packed: torch.Tensor | _Saved) -> torch.Tensor:
        """The tensor for the backward pass; the one that is needed next is on its way then."""
        if isinstance(packed, torch.Tensor):
            return packed
        tensor = packed.on_device if packed.on_device is not None else self._fetch(packed)
        self._settle()
        before = packed.before() if packed.before is not None else None
        if before is not None:
            self._fetch(before)
        return tensor

    def _fetch(self, saved: _Saved) -> torch.Tensor:
        # Memory of the stream that computes: by the time that it is free again, that stream has waited for the copy.
        saved.on_device, saved.version = torch.empty_like(saved.host, device=self._device), None
        self._start(saved, saved.on_device, saved.host)
        return saved.on_device

    def _start(self, saved: _Saved, target: torch.Tensor, source: torch.Tensor) -> None:
        saved.end = self._copies.start(target, source)
        self._under_way.append(saved)

    def _settle(self) -> None:
        """Let the computation wait for the copies that are under way, and let go of the device's tensors."""
        for saved in self._under_way:
            self._copies.wait(saved.end)
            assert saved.on_device is not None
            changed = saved.version is not None and saved.version != saved.on_device._version
            saved.on_device = saved.end = None
            if changed:
                raise RuntimeError("the input of a layer was changed in place after it was saved for the backward pass")
        self._under_way.clear()


def checkpoint_offloaded(offload: Offload) -> Callable[..., Any]:
    """torch's non-reentrant `checkpoint`, of layers whose input is moved.

    Returns:
        A plain function, which copies of a model share.
    """

    def run(function: Callable[..., Any], *args: Any) -> Any:
        # Where no gradient goes back, as in a frozen tower, autograd drops what is saved at once.
        if not any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            return checkpoint(function, *args, use_reentrant=False)
        # `checkpoint` has hooks of its own for what the layer saves: these see its arguments alone.
        with saved_tensors_hooks(offload.pack, offload.unpack):
            return checkpoint(function, *args, use_reentrant=False)

    return run
