"""Planted faults in fast paths, through the command line on the CPU: found, said, and not used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Train, read_metrics
from torch.nn import functional

from phi3v.config import RunConfig
from phi3v.model import attention, loss
from phi3v.model.attention import SegmentBackend
from phi3v.model.configuration import Phi3VConfig
from phi3v.train.compute import offload
from phi3v.train.compute.fast_paths import FastPaths
from phi3v.train.compute.offload import HostCopies
from phi3v.train.device import RuntimeDevice
from phi3v.train.methods import optimizers
from phi3v.train.selfcheck import check
from phi3v.train.selfcheck.examine import CheckCase, examine
from phi3v.train.selfcheck.process import examine_apart
from phi3v.train.selfcheck.verdict import Verdict

QUICK = ("training.max_steps", 1, "data.eval", "null", "training.micro_batch_size", 1)
PACKED = ("data.packing", "samples", *QUICK)
Kernel = Callable[..., torch.Tensor]


def of_segments(change: Callable[[Kernel, SegmentBackend, tuple[Any, ...]], torch.Tensor]) -> type[SegmentBackend]:
    """The backend with a fault."""

    class Faulty(SegmentBackend):
        def __call__(self, *arguments: Any) -> torch.Tensor:  # type: ignore[override]
            return change(super().__call__, self, arguments)

    return Faulty


class ZeroedHead(torch.autograd.Function):
    """Passes values on, and no gradient to the first half of the last dimension."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        gradient = gradient.clone()
        gradient[..., : gradient.shape[-1] // 2] = 0
        return gradient


def everything_before(kernel: Kernel, backend: SegmentBackend, arguments: tuple[Any, ...]) -> torch.Tensor:
    query, key, value, scale, _dropout = arguments
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)


def raises(kernel: Kernel, backend: SegmentBackend, arguments: tuple[Any, ...]) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


FAULTS: dict[str, Any] = {
    "scale": lambda kernel, backend, given: kernel(*given[:3], 1.1 * given[3], given[4]),
    "other records": everything_before,
    "gradient": lambda kernel, backend, given: kernel(ZeroedHead.apply(given[0]), *given[1:]),
    "not finite": lambda kernel, backend, given: kernel(*given) * float("nan"),
    "exception": raises,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_not_used(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    monkeypatch.setitem(attention.BACKENDS, "packed_segments", of_segments(FAULTS[fault]))
    keep = ("training.activation_checkpointing", "none")  # which leaves less to look at
    code, folder = train(*PACKED, *keep, "training.self_check", "always")
    shown = capsys.readouterr()
    assert code == 0, shown.err
    line = next(line for line in shown.out.splitlines() if line.startswith("warn self-check"))
    assert "on the CPU, attention packed_segments: " in line
    assert line.endswith("; the run goes on with packed_mask")
    if fault == "exception":
        assert "RuntimeError: no kernel image is available for execution" in line
    elif fault == "not finite":
        assert "is not finite or missing" in line
    else:
        assert "is off by" in line
        assert "the plain path's by" in line
    assert "attention: packed_mask (packed_segments failed the self-check)" in shown.out
    found = json.loads((folder / "environment.json").read_text())["self_check"]
    assert found["used"]["attention"] == "packed_mask"
    assert found["verdicts"]["attention packed_segments"].startswith("failed: ")
    assert read_metrics(folder)[0]["loss"] > 0


def test_other_faulty_paths_are_not_used(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that forgets a chunk, and layer inputs that come back from the host as others."""
    real = loss.checkpoint

    def forgetful(function: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        result: torch.Tensor = real(function, *arguments, **options)
        return 0 * result if len(arguments[1]) < 5 else result

    class Swapped(HostCopies):
        def start(self, target: torch.Tensor, source: torch.Tensor) -> None:
            target.copy_(source.roll(1))

    monkeypatch.setattr(loss, "checkpoint", forgetful)
    monkeypatch.setattr(offload, "HostCopies", Swapped)
    code, folder = train(*PACKED, "training.self_check", "always")
    shown = capsys.readouterr().out
    assert code == 0
    lines = [line for line in shown.splitlines() if line.startswith("warn self-check")]
    assert ["loss chunked" in line and line.endswith("goes on with whole") for line in lines] == [True, False]
    assert lines[1].endswith("the run goes on without checkpointing offload")
    assert json.loads((folder / "environment.json").read_text())["self_check"]["used"]["loss"] == "whole"


def test_what_has_no_plain_way_ends_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Moments that are rounded to other numbers, and half precision that overflows."""
    half = ("training.self_check", "always", "training.precision", "bf16")
    real = optimizers.round_stochastically
    with monkeypatch.context() as patched:
        patched.setattr(optimizers, "round_stochastically", lambda *given: 1.1 * real(*given))
        code, folder = train(*PACKED, *half, "training.optimizer", "adamw_bf16")
    assert code == 2
    error = capsys.readouterr().err
    assert "training.optimizer: on the CPU, optimizer adamw_bf16: the update of a " in error
    assert "is off by" in error
    assert "→ use adamw;" in error
    assert not folder.exists()
    sdpa = attention._sdpa

    def overflowing(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *given: Any, **how: Any) -> Any:
        result = sdpa(query, key, value, *given, **how)
        return result / 0 if value.dtype == torch.bfloat16 else result

    monkeypatch.setattr(attention, "_sdpa", overflowing)
    assert train(*PACKED, *half)[0] == 2
    error = capsys.readouterr().err
    assert "training.precision: on the CPU, precision bf16: the loss is not finite or missing" in error


def test_a_run_is_the_same_with_and_without(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit: the check changes no weight and draws no number of the run's."""
    lora = ("method.name", "lora", "method.lora.dropout", 0.1)
    results = []
    for how in ("off", "always"):
        code, folder = train(*PACKED, *lora, "training.self_check", how, out=how)
        assert code == 0
        results.append((folder / "final" / "adapter_model.safetensors").read_bytes())
        assert ("self_check" in json.loads((folder / "environment.json").read_text())) == (how == "always")
    assert results[0] == results[1]
    shown = capsys.readouterr().out
    checked = "attention packed_segments, loss chunked, checkpointing offload, checkpointing selective, optimizer adamw"
    assert f"self-check: {checked} agree with the plain path" in shown
    assert "warn self-check" not in shown


@pytest.mark.slow  # a new interpreter
def test_another_process_examines(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's kernels are examined in: a case goes there and verdicts come back."""
    cases: list[CheckCase] = []

    def note(case: CheckCase) -> Iterator[Verdict]:
        cases.append(case)
        yield from examine(case)

    monkeypatch.setattr(check, "examine", note)
    assert train(*PACKED, "training.self_check", "always")[0] == 0
    own = [verdict for verdict in examine(cases[0]) if verdict.state != "trying"]
    assert list(examine_apart(cases[0])) == own


# A process that examines nothing: what it says of attention, then, unless that is known, of the loss.
CHILD = """
import json, os, sys, time
known = {entry["path"]: entry["state"] for entry in json.load(open(sys.argv[1] + "/known.json"))}
def say(path, value, state):
    print(json.dumps(dict(path=path, value=value, state=state)), flush=True)
print("a library prints this", flush=True)
if "attention" not in known:
    say("attention", "packed_segments", "trying")
    FAULT
say("loss", "chunked", "passed")
"""


@pytest.mark.parametrize(
    ("fault", "state", "why"),
    [
        ("os.abort()", "failed", "its process ended with code -6"),
        ("sys.exit('CUDA error: an illegal memory access')", "failed", "code 1: CUDA error: an illegal memory access"),
        ("time.sleep(60)", "failed", "its process gave no answer within 2 s"),
        ("os.kill(os.getpid(), 9)", "unchecked", "its process was ended by signal 9"),
    ],
)
def test_a_kernel_that_takes_its_process_along_has_failed(
    small_model_dir: Path, fault: str, state: str, why: str
) -> None:
    """And the rest is examined in another."""
    runtime = RuntimeDevice(torch.device("cpu"), "fp32", "", 0, 1)
    model = Phi3VConfig.from_pretrained(small_model_dir)
    row = {"input_ids": torch.ones(1, 2, dtype=torch.int64), "layout": ((0, 2),)}
    case = CheckCase(RunConfig(), model, torch.float32, runtime, FastPaths("packed_segments"), row)
    command = (sys.executable, "-S", "-c", CHILD.replace("FAULT", fault))
    found, rest = examine_apart(case, seconds=2, command=command)
    assert (found.path, found.value, found.state) == ("attention", "packed_segments", state)
    assert why in found.what
    assert (rest.path, rest.state) == ("loss", "passed")
