"""Whether the attention backends for packed rows agree on this device, and what each costs forward and backward."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from phi3v.machine import accelerator_of
from phi3v.model.attention import BACKENDS, Layout, MaskBackend
from phi3v.train.methods.loading import packed_obstacle

# bfloat16 keeps 8 bits. Outputs and gradients are averages of many rounded numbers: on the norm they stay within a
# few roundings, 2 ** -8 each, of the float32 reference; a wrong mask is off by the norm itself.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}

LAYOUTS: dict[str, Layout] = {
    "samples": ((0, 2443), (0, 1993), (0, 2569)),
    "shared-image": ((2509, 25, 31, 28, 25), (1933, 22, 40, 33)),
}
SMALL_LAYOUTS: dict[str, Layout] = {"samples": ((0, 40), (0, 7)), "shared-image": ((60, 5, 9), (0, 11))}


def compare_attention(
    layouts: dict[str, Layout] | None = None, *, heads: int = 32, width: int = 96, repeats: int = 5
) -> list[dict[str, Any]]:
    """Every backend in bf16 (on a CPU float32) against the whole mask in float32.

    Args:
        layouts: rows to attend over; by default one of samples and one that shares pages.
        heads, width: as the model's; inputs are (1, heads, T, width).

    Returns:
        A row for each backend and layout: ``error``, why it cannot run; or ``largest_difference``, the worst of output
        and gradients by relative norm, ``tolerance``, ``agrees``, and ``milliseconds``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for row_name, layout in (layouts or LAYOUTS).items():
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, heads, sum(map(sum, layout)), width)
        exact = [torch.randn(shape, device=device, generator=generator).to(dtype).float() for _ in range(3)]
        expected = _run(MaskBackend(layout, device), exact)
        for name, make in BACKENDS.items():
            row: dict[str, Any] = {"rows": row_name, "backend": name, "dtype": str(dtype).removeprefix("torch.")}
            rows.append(row)
            if (obstacle := packed_obstacle(name, accelerator_of(device), dtype)) is not None:
                row["error"] = obstacle
                continue
            try:
                backend = make(layout, device)
                found = _run(backend, [tensor.to(dtype) for tensor in exact])
                worst = max(_difference(a, b) for a, b in zip(found, expected, strict=True))
                row |= {"largest_difference": float(f"{worst:.3g}"), "tolerance": TOLERANCE[dtype]}
                row["agrees"] = worst <= TOLERANCE[dtype]
                row["milliseconds"] = _milliseconds(backend, [tensor.to(dtype) for tensor in exact], repeats)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            except Exception as error:  # whatever a kernel may raise; the others are still worth knowing
                row |= {"agrees": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return rows


def _run(backend: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = backend(*leaves, None, 0.0)
    # A sum would give every value the same gradient, and queries none.
    weights = torch.linspace(-1, 1, output.shape[1], device=output.device)[None, :, None, None].to(output.dtype)
    (output * weights * output.detach()).sum().backward()
    gradients = [leaf.grad for leaf in leaves]
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def _milliseconds(backend: Any, tensors: list[torch.Tensor], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        _wait()
        began = time.perf_counter()
        _run(backend, tensors)
        _wait()
        times.append(time.perf_counter() - began)
    return round(1e3 * statistics.median(times[1:]), 2)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
