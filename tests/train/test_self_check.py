"""Planted faults in fast paths, through the command line on the CPU: found, said, and not used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from run_helpers import Train, read_metrics
from torch.nn import functional

from phi3v.cli import main
from phi3v.config import RunConfig, TrainingConfig, load_config
from phi3v.model import attention, loss
from phi3v.model.attention import SegmentBackend
from phi3v.model.configuration import Phi3VConfig
from phi3v.train.compute import fast_paths, offload
from phi3v.train.compute.fast_paths import FastPaths
from phi3v.train.compute.offload import HostCopies
from phi3v.train.device import RuntimeDevice
from phi3v.train.methods import optimizers
from phi3v.train.selfcheck import check
from phi3v.train.selfcheck.examine import CheckCase, examine
from phi3v.train.selfcheck.process import examine_apart
from phi3v.train.selfcheck.small_row import drawn_row
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


@pytest.mark.parametrize(
    "fault",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("scale", "not finite"))) for name in FAULTS],
)
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


def verdicts(model: Path, paths: FastPaths, precision: str = "fp32", **keys: str) -> dict[str, Verdict]:
    """Those on a drawn row, by path."""
    config = load_config(None, {name.replace("__", "."): value for name, value in keys.items()})
    runtime = RuntimeDevice(torch.device("cpu"), precision, "", 0, 1)
    shape = Phi3VConfig.from_pretrained(model)
    row = drawn_row(shape.vocab_size, config.data.packing)
    found = examine(CheckCase(config, shape, torch.bfloat16, runtime, paths, row))
    return {verdict.path: verdict for verdict in found if verdict.state != "trying"}


def grown(model: Any) -> None:
    """One layer gives 5 % more than it should."""
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp.down_proj"))
    layer.register_forward_hook(lambda module, given, output: 1.05 * output)


@pytest.mark.parametrize("path", [pytest.param("kernels", marks=pytest.mark.slow), "compile"])
def test_faulty_layers_are_found(small_model_dir: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Of Liger or the compiler, neither of which runs here: stand-ins that are right and then wrong."""
    for is_faulty in (False, True):

        def stand_in(model: Any, training: TrainingConfig, is_faulty: bool = is_faulty) -> None:
            if is_faulty and (training.compile or training.kernels == "liger"):
                grown(model)

        monkeypatch.setattr(fast_paths, "apply_kernels", stand_in)
        paths = FastPaths("packed_mask", "whole", compile=path == "compile", checkpointing="none")
        paths = replace(paths, kernels="liger") if path == "kernels" else paths
        found = verdicts(small_model_dir, paths, data__packing="samples", method__name="frozen-vision")
        assert found[path].state == ("failed" if is_faulty else "passed")


def test_float8_is_held_to_its_own_rounding(small_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated. It may be off by 16 times what bfloat16 may be, and never by half: a lost scale is more than that."""
    pytest.importorskip("torchao.float8")
    paths = FastPaths("sdpa", "whole", fp8=True, checkpointing="none")
    found = verdicts(small_model_dir, paths, "bf16", method__name="frozen-vision")["fp8"]
    assert found.state == "passed"
    assert found.off is not None
    assert found.plain_off is not None
    assert 2 * found.plain_off < found.off < 0.4
    real = fast_paths.apply_float8

    def unscaled(model: Any, **how: Any) -> int:
        count = real(model, **how)
        for name, module in model.named_modules():
            if name.endswith(("qkv_proj", "down_proj")):
                module.register_forward_hook(lambda module, given, output: output / 8)
        return count

    monkeypatch.setattr(fast_paths, "apply_float8", unscaled)
    assert verdicts(small_model_dir, paths, "bf16", method__name="frozen-vision")["fp8"].state == "failed"


def test_half_precision_with_its_loss_scale(small_model_dir: Path) -> None:
    """Frozen weights that are stored in the other half precision too."""
    paths = FastPaths("packed_segments", checkpointing="none")
    keys = {"data__packing": "shared-image", "method__name": "frozen-vision"}
    found = verdicts(small_model_dir, paths, "fp16", **keys)
    assert {verdict.state for verdict in found.values()} == {"passed"}
    assert found["precision"].off is not None
    assert found["precision"].off < 8 * torch.finfo(torch.float16).eps


@pytest.mark.slow  # a run of qlora says whether they run at all
def test_four_bit_products(small_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = FastPaths("sdpa", "whole", checkpointing="none")
    keys = {"method__name": "qlora", "method__lora__rank": "4"}
    assert verdicts(small_model_dir, paths, "bf16", **keys)["four_bit"].state == "passed"
    real = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, given: 1.05 * real(self, given))
    assert verdicts(small_model_dir, paths, "bf16", **keys)["four_bit"].state == "failed"


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
        ("say('attention', 'packed_segments', 'failed'); sys.exit('and its context is broken')", "failed", ""),
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


def test_the_doctor_shows_it(
    tmp_path: Path,
    easy_vqa: Path,
    small_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A pass with both figures; a fault is a warning, as the run would go on without."""
    (tmp_path / "recipe.yaml").write_text("")
    keys = {
        "model.path": small_model_dir,
        "data.train": easy_vqa / "train.jsonl",
        "data.packing": "shared-image",
        "training.output_dir": tmp_path / "run",
        "training.activation_checkpointing": "none",
    }

    def shown(*options: str) -> list[str]:
        given = [part for name, value in keys.items() for part in (f"--{name}", str(value))]
        assert main(["doctor", str(tmp_path / "recipe.yaml"), "--json", *given, *options]) == 0
        findings = json.loads(capsys.readouterr().out)["findings"]
        return [f"{each['verdict']} {each['what']}" for each in findings if each["check"] == "self-check"]

    assert shown() == ["pass not made: no GPU"]
    monkeypatch.setitem(attention.BACKENDS, "packed_segments", of_segments(FAULTS["scale"]))
    fault, passed, optimizer = sorted(shown("--training.self_check", "always"), reverse=True)
    assert fault.startswith("warn on the CPU, attention packed_segments: the gradient of")
    assert fault.endswith("; the run goes on with packed_mask")
    assert "pass optimizer adamw" in passed
    assert "pass loss chunked" in optimizer
