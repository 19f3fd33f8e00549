"""The planner's memory at full size, traced on a machine without a GPU.

    python benchmarks/plan_trace.py [--method full …] [--checkpointing none …] [--batch padded …] [--out FILE]

The whole model, 4.1 billion parameters, runs a training step (forward, backward, optimizer) on torch's fake tensors:
every operation gives a tensor with a shape, a dtype and a storage of a size, and computes nothing. The storages that
are alive at a time add up to what an allocator would hold, without its rounding and fragmentation. Each case is held
against what `phi3v plan` predicts for it, the assumptions that no trace can show (context, fragmentation) left out of
both.

What the trace takes as a GPU has it: autocast's list of operations in float32 (a CPU computes layer norms in bfloat16),
the optimizer over all tensors at once. What it cannot: attention kernels of a GPU; packed rows are computed by SDPA
group by group, which keeps what variable-length attention keeps. QLoRA's 4-bit products have no fake kernels: its
frozen linear layers are traced as layers that keep what bitsandbytes' keep, and their weights are counted, not traced.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bench_result import ROOT, write_result
from phi3v.config import METHODS, LoraConfig, MethodConfig, RunConfig
from phi3v.data.collate import Collator, Page, Sample, pack_row
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.presets import planned_config
from phi3v.model.shape import ModelShape
from phi3v.plan.inputs import TrainSetup
from phi3v.plan.memory import predict_memory
from phi3v.plan.parameters import count_parameters, meta_model, nf4_bytes, quantised
from phi3v.processing.hd_transform import CROP_SIZE, num_distinct_crops, num_img_tokens
from phi3v.train.compute.activations import MicroBatch, Policy
from phi3v.train.compute.checkpointing import apply_checkpointing
from phi3v.train.engines.data_parallel import clip_gradients
from phi3v.train.methods.optimizers import make_optimizer

GIB = 2**30
RANK = 32  # of the adapters
POLICIES = [policy for policy in get_args(Policy) if policy != "offload"]  # on the CPU the host's copies count too
TEXT, ANSWER = 76, 16  # tokens of a record beside its page, and those of them that are answer
# Records of a row: the crops of each one's page as (rows, columns).
BATCHES: dict[str, tuple[tuple[int, int], ...]] = {
    "padded": ((4, 4), (3, 3)),
    "packed": ((4, 4), (3, 3), (4, 4)),
}


class LiveMemory(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there were while it is active.

    As torch's ``MemTracker``, which besides keeps what every module has and takes five times as long; the tests hold
    one against the other.

    Args:
        held: tensors that were there before.

    Attributes:
        peak: bytes.
        phase: a name that the caller sets; ``peak_phase`` is that of the peak.
    """

    def __init__(self, held: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.phase = self.peak_phase = ""
        self.most: dict[str, int] = defaultdict(int)  # in each phase
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._add(value)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.most[self.phase] = max(self.most[self.phase], self.live)
        if self.live > self.peak:
            self.peak, self.peak_phase = self.live, self.phase


class Packed4Bit(nn.Module):
    """A frozen linear layer whose weight is packed, as far as memory sees it: unpacked for each product, never kept."""

    def __init__(self, linear: nn.Linear, packed_bytes: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", torch.empty(packed_bytes, dtype=torch.uint8))
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Product4Bit.apply(inputs, self.out_features)
        product = product if self.bias is None else product + self.bias.to(product.dtype)
        return product.clone()  # PEFT's layer copies what bitsandbytes' gives


class _Product4Bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, width: int) -> torch.Tensor:
        inputs = inputs.bfloat16()
        ctx.shape = (width, inputs.shape[-1])
        return functional.linear(inputs, inputs.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ gradient.new_empty(ctx.shape), None


@contextlib.contextmanager
def layer_norm_in_float32() -> Iterator[None]:
    """Under autocast as on a GPU. In no other operation here does the CPU's autocast differ."""
    library = torch.library.Library("aten", "IMPL")

    def layer_norm(inputs: torch.Tensor, shape: Any, *rest: Any) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            wide = [value.float() if isinstance(value, torch.Tensor) else value for value in (inputs, *rest)]
            return torch.layer_norm(wide[0], shape, *wide[1:])

    library.impl("layer_norm", layer_norm, "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()


def make_batch(pages: Sequence[tuple[int, int]], *, packed: bool) -> tuple[dict[str, Any], MicroBatch]:
    """A micro-batch of one record a page, and what the planner knows of it."""
    samples, grids = [], []
    for number, (rows, columns) in enumerate(pages):
        size = (rows * CROP_SIZE, columns * CROP_SIZE)
        ids = [1, *[-1] * num_img_tokens(rows, columns), *range(5, 5 + TEXT)]
        content = torch.empty(*size, 3, dtype=torch.uint8)
        labels = [-100] * (len(ids) - ANSWER) + ids[-ANSWER:]
        samples.append(Sample(ids, labels, [Page(f"{number}", size, content)]))
        grids.append((rows, columns))
    batch = pack_row([[sample] for sample in samples]) if packed else Collator(0)(samples)
    return batch, MicroBatch(
        rows=1 if packed else len(pages),
        tokens=batch["input_ids"].numel(),
        image_tokens=sum(num_img_tokens(*grid) for grid in grids),
        crops=sum(num_distinct_crops(*grid) for grid in grids),
        answer_tokens=len(pages) * ANSWER,
    )


def make_model(model: Any, method: MethodConfig, policy: Policy) -> Any:
    """A model of `meta_model` with fake storages, ready to train."""
    model = model.to_empty(device="cpu").train()
    if method.name == "qlora":
        packed = quantised(model, method.lora)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and id(child.weight) in packed:
                    size = nf4_bytes(child.weight.numel(), double=method.lora.double_quant)
                    setattr(module, name, Packed4Bit(child, size))
    apply_checkpointing(model, policy)
    return model


def trace(config: Phi3VConfig, method: MethodConfig, policy: Policy, batch: dict[str, Any]) -> LiveMemory:
    """The memory of an optimizer step that is not the first."""
    run, model = RunConfig(method=method), meta_model(config, method, "bf16")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = make_model(model, method, policy)
        optimizer = make_optimizer(model, run, fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # makes the moments
        optimizer.zero_grad()
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        inputs = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        del inputs["counts"]
        memory = LiveMemory([*model.parameters(), *model.buffers(), *states, *tensors_of(inputs)])
        with layer_norm_in_float32(), memory:
            memory.phase = "forward"
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**inputs, loss_normalizer=1.0, logits_to_keep=None, use_cache=False).loss
            memory.phase = "backward"
            loss.backward()
            memory.phase = "optimizer step"
            clip_gradients(model, 1.0)
            optimizer.step()
    return memory


def tensors_of(inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in inputs.values() if isinstance(value, torch.Tensor)]


def traced(config: Phi3VConfig, method: MethodConfig, policy: Policy, batch: str) -> dict[str, Any]:
    """A case's peak, in GiB."""
    config._attn_implementation = "packed_varlen" if batch == "packed" else "sdpa"
    started = time.process_time()
    memory = trace(config, method, policy, make_batch(BATCHES[batch], packed=batch == "packed")[0])
    return {
        "traced_gib": round(memory.peak / GIB, 3),
        "traced_at": memory.peak_phase,
        "traced_by_phase_gib": {phase: round(size / GIB, 3) for phase, size in memory.most.items() if phase},
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def predicted(config: Phi3VConfig, method: MethodConfig, policy: Policy, batch: str) -> dict[str, Any]:
    """What the planner says of the case, in GiB."""
    micro = make_batch(BATCHES[batch], packed=batch == "packed")[1]
    setup = TrainSetup(
        method=method,
        checkpointing=policy,
        accumulates=False,
        attention="flash_attention_2" if batch == "packed" else "sdpa",
        packing="samples" if batch == "packed" else "none",
    )
    counts = count_parameters(config, method, "bf16")
    memory = predict_memory(ModelShape.of(config), counts, setup, micro, cpu=False)
    parts = {name: size for name, size in memory.parts.items() if name != "overhead"}
    return {
        "tokens": micro.tokens,
        "crops": micro.crops,
        "predicted_gib": round(sum(parts.values()) / GIB, 3),
        "predicted_at": memory.moment,
        "predicted_parts_gib": {name: round(size / GIB, 3) for name, size in parts.items()},
    }


def write_docs(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Put the table between its marks in the documentation."""
    rows = {(case["method"], case["checkpointing"]): {} for case in cases}
    for case in cases:
        rows[case["method"], case["checkpointing"]][case["batch"]] = case
    lines = ["| method | checkpointing |" + "".join(f" {b}: traced GiB | predicted | difference |" for b in BATCHES)]
    lines.append("| --- " * (2 + 3 * len(BATCHES)) + "|")
    for (method, policy), own in rows.items():
        cells = [
            f" {own[b]['traced_gib']:.1f} | {own[b]['predicted_gib']:.1f} | {own[b]['difference_percent']:+.1f} % |"
            for b in BATCHES
        ]
        lines.append(f"| {method} | {policy} |" + "".join(cells))
    before, rest = path.read_text(encoding="utf-8").split("<!-- trace: begin -->\n")
    after = rest[rest.index("<!-- trace: end -->") :]
    path.write_text(before + "<!-- trace: begin -->\n" + "\n".join(lines) + "\n" + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--checkpointing", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--batch", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan_trace.json")
    parser.add_argument(
        "--keep", action="store_true", help="keep the traces that --out has and predict anew beside them"
    )
    parser.add_argument("--docs", type=Path, help="whose table is written, of all cases")
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text())["cases"] if arguments.keep and arguments.out.is_file() else []
    traces = {(case["method"], case["checkpointing"], case["batch"]): case for case in known}
    config, _ = planned_config("microsoft/Phi-3.5-vision-instruct")
    cases = []
    for name, policy, batch in product(arguments.method, arguments.checkpointing, arguments.batch):
        method = MethodConfig(name=name, lora=LoraConfig(rank=RANK))
        case = {"method": name, "checkpointing": policy, "batch": batch}
        case |= predicted(config, method, policy, batch)
        old = traces.get((name, policy, batch))
        fresh = old or traced(config, method, policy, batch)
        case |= {key: fresh[key] for key in ("traced_gib", "traced_at", "traced_by_phase_gib", "cpu_seconds")}
        case["difference_percent"] = round(100 * (case["predicted_gib"] / case["traced_gib"] - 1), 1)
        cases.append(case)
        print(name, policy, batch, case["traced_gib"], case["predicted_gib"], case["difference_percent"], flush=True)
        worst = max(abs(case["difference_percent"]) for case in cases)
        write_result("plan_trace", {"rank": RANK, "worst_difference_percent": worst, "cases": cases}, arguments.out)
    if arguments.docs is not None:
        write_docs(cases, arguments.docs)


if __name__ == "__main__":
    main()
