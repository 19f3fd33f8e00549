"""The planner's predictions beside what was measured.

    python benchmarks/plan_accuracy.py [--out benchmarks/results/plan_accuracy.json]

On the CPU: one training step of the tiny model, by method and checkpointing, its peak as torch's allocator counts it
(the process's own memory, which the planner adds as overhead, is left out of both). For the real size: parameters and
optimizer bytes against those of the real optimizer on meta tensors, and Microsoft's published memory and speed, which
are theirs and only a plausibility check. Memory does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from bench_result import ROOT, write_result
from phi3v.config import METHODS, DataConfig, LoraConfig, MethodConfig, ModelConfig, Packing, RunConfig
from phi3v.data.collate import Collator, Page, Sample, pack_row
from phi3v.model.presets import init_model, planned_config
from phi3v.model.shape import ModelShape
from phi3v.plan.hardware import find_machine
from phi3v.plan.inputs import TrainSetup
from phi3v.plan.memory import predict_memory
from phi3v.plan.parameters import count_parameters, meta_model
from phi3v.plan.planner import Planner
from phi3v.plan.published import compare_published
from phi3v.processing.conversation import ChatTurn, encode_conversation
from phi3v.processing.hd_transform import CROP_SIZE, num_distinct_crops
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.compute.activations import MicroBatch
from phi3v.train.compute.checkpointing import apply_checkpointing
from phi3v.train.device import choose_device
from phi3v.train.methods.loading import inspect_model, load_for_training

MACHINES = ("4xrtx-8000", "8xa100-80gb", "8xv100-32gb", "1xh100", "1xrtx-4090", "1xt4")
# Rows, width and height of the image, questions of the first row, and how many fewer each next one has.
BATCHES = {
    "a page": (1, 1275, 1650, 1, 0),
    "8 small pictures": (8, 64, 64, 1, 0),
    "4 x 10 questions": (4, 640, 480, 10, 0),
    "4 x 10, 8, 6, 4 questions": (4, 640, 480, 10, 2),
}
# Packed rows: width and height of the image, and the questions of each group about one.
ROWS: dict[str, tuple[Packing, int, int, tuple[int, ...]]] = {
    "row of 3 pages": ("samples", 1275, 1650, (1, 1, 1)),
    "row of a page with 8 questions and one with 4": ("shared-image", 1275, 1650, (8, 4)),
    "row of 6 small pictures with 8 questions each": ("shared-image", 64, 64, (8,) * 6),
}


@dataclass(frozen=True)
class Case:
    """One measured step."""

    method: str
    checkpointing: str
    batch: str
    accumulates: bool = False


def cases() -> Iterator[Case]:
    """Every method with and without recomputing, on every batch; one that accumulates; packed rows."""
    for method in METHODS:
        for checkpointing in ("none", "full"):
            for batch in BATCHES:
                yield Case(method, checkpointing, batch)
    yield Case("full", "none", "a page", accumulates=True)
    for method in ("full", "lora"):
        for checkpointing in ("none", "full"):
            for row in ROWS:
                yield Case(method, checkpointing, row)


def make_batch(processor: Phi3VProcessor, name: str) -> tuple[dict[str, Any], MicroBatch]:
    """The model's inputs and what the planner knows of them."""
    rows, width, height, questions, fewer = BATCHES[name]
    samples: list[Sample] = []
    pages: list[Page] = []
    for row in range(rows):
        page = processor.image_processor.page(Image.new("RGB", (width, height), (row, 80, 120)))
        size = (page.shape[0], page.shape[1])
        pages.append(Page(f"{row}.png", size, page))
        asked = range(questions - fewer * row)
        turns = [ChatTurn(f"what is shown, {k}?", "a rectangle", 1 if k == 0 else 0) for k in asked]
        stream = encode_conversation(processor.backend_tokenizer, turns, [pages[-1].num_img_tokens])
        samples.append(Sample(stream.input_ids, stream.labels, pages[-1:], len(turns)))
    batch = Collator(processor.tokenizer.pad_token_id)(samples)
    return batch, MicroBatch(
        rows=rows,
        tokens=batch["input_ids"].numel(),
        image_tokens=int((batch["input_ids"] < 0).sum()),
        crops=sum(num_distinct_crops(page.size[0] // CROP_SIZE, page.size[1] // CROP_SIZE) for page in pages),
        answer_tokens=int((batch["labels"] != -100).sum()),
    )


def make_row(processor: Phi3VProcessor, name: str) -> tuple[dict[str, Any], MicroBatch]:
    """A packed row and what the planner knows of it."""
    _, width, height, questions = ROWS[name]
    groups: list[list[Sample]] = []
    for number, asked in enumerate(questions):
        page = processor.image_processor.page(Image.new("RGB", (width, height), (number, 80, 120)))
        own = [Page(f"{number}.png", (page.shape[0], page.shape[1]), page)]
        tokens = [own[0].num_img_tokens]
        turns = [ChatTurn(f"what is shown, {k}?", "a rectangle", 1) for k in range(asked)]
        streams = [encode_conversation(processor.backend_tokenizer, [turn], tokens) for turn in turns]
        groups.append([Sample(stream.input_ids, stream.labels, own, 1) for stream in streams])
    row = pack_row(groups)
    pages = [group[0].pages[0].size for group in groups]
    return row, MicroBatch(
        rows=1,
        tokens=row["input_ids"].numel(),
        image_tokens=int((row["input_ids"] < 0).sum()),
        crops=sum(num_distinct_crops(size[0] // CROP_SIZE, size[1] // CROP_SIZE) for size in pages),
        answer_tokens=int((row["labels"] != -100).sum()),
        branch_pairs=sum(sum(rest) * (prefix + sum(rest)) for prefix, *rest in row["layout"] if prefix),
    )


def measure(model: Any, batch: dict[str, Any], *, accumulates: bool) -> int:
    """Peak bytes of the second optimizer step, weights and moments included."""
    inputs = {name: value for name, value in batch.items() if name != "counts"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step() -> None:
        for _ in range(2 if accumulates else 1):
            # As a loader makes it.
            copied = {n: value.clone() if isinstance(value, torch.Tensor) else value for n, value in inputs.items()}
            model(**copied, logits_to_keep=None, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    step()
    gc.collect()
    held = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        held += [value for value in state.values() if isinstance(value, torch.Tensor)]
    for parameter in model.parameters():
        if (quantised := getattr(parameter, "quant_state", None)) is not None:
            held += [value for value in vars(quantised).values() if isinstance(value, torch.Tensor)]
    base = sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted(
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    # The counter runs on from earlier measurements, whose last tensors it never sees freed.
    before = memory[0][1] - memory[0][2]
    return base + max(total for _, total, _ in memory) - before


def measured_rows(folder: Path) -> list[dict[str, Any]]:
    """Predicted and measured peaks of the tiny model."""
    config, _ = planned_config(str(folder))
    shape = ModelShape.of(config)
    processor = Phi3VProcessor.from_pretrained(folder)
    runtime = choose_device("fp32")
    rows = []
    for case in cases():
        method = MethodConfig(name=case.method, lora=LoraConfig(rank=8))  # type: ignore[arg-type]
        packing = ROWS[case.batch][0] if case.batch in ROWS else "none"
        run = RunConfig(model=ModelConfig(path=str(folder)), method=method, data=DataConfig(packing=packing))
        model = load_for_training(run, inspect_model(run, runtime), runtime)
        if case.checkpointing == "full":
            apply_checkpointing(model, "full")
        batch, micro = make_row(processor, case.batch) if packing != "none" else make_batch(processor, case.batch)
        measured = measure(model, batch, accumulates=case.accumulates)
        setup = TrainSetup(
            method=method,
            precision="fp32",
            checkpointing=case.checkpointing,  # type: ignore[arg-type]
            packing=packing,
            accumulates=case.accumulates,
        )
        memory = predict_memory(shape, count_parameters(config, method, "fp32"), setup, micro, cpu=True)
        predicted = memory.peak - memory.parts["overhead"]
        rows.append(
            {
                "method": case.method,
                "checkpointing": case.checkpointing,
                "batch": case.batch + (", accumulated" if case.accumulates else ""),
                "predicted_mb": round(predicted / 1e6, 2),
                "measured_mb": round(measured / 1e6, 2),
                "difference_percent": round(100 * (predicted / measured - 1), 1),
                "moment": memory.moment,
                "parts_mb": {name: round(size / 1e6, 2) for name, size in memory.parts.items() if name != "overhead"},
            }
        )
        del model
    return rows


def exact_rows() -> list[dict[str, Any]]:
    """Parameter and optimizer bytes of the real size, predicted and as torch's own AdamW has them on meta tensors."""
    config, _ = planned_config("microsoft/Phi-3.5-vision-instruct")
    rows = []
    for name in ("full", "frozen-vision", "lora"):
        method = MethodConfig(name=name)  # type: ignore[arg-type]
        counts = count_parameters(config, method, "bf16")
        model = meta_model(config, method, "bf16")
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer = torch.optim.AdamW(trained)
        optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        rows.append(
            {
                "method": name,
                "parameters": counts.total,
                "trainable": counts.trainable,
                "weight_bytes": counts.weight_bytes,
                "weight_bytes_counted": sum(p.numel() * p.element_size() for p in model.parameters()),
                "optimizer_bytes": counts.optimizer_bytes("adamw"),
                "optimizer_bytes_counted": sum(v.numel() * v.element_size() for v in states),
            }
        )
    return rows


def machine_rows() -> list[dict[str, Any]]:
    """The public recipe on the machines that its advice is about, planned without data."""
    config = RunConfig()
    config.model.num_crops, config.training.batch_size = 16, 64
    planner = Planner(config, progress=False)
    rows = []
    for name in MACHINES:
        plan = planner.plan(find_machine(name, None))
        for method in METHODS:
            option = plan.best(method)
            rows.append({"machine": plan.machine.label} | option.to_json_dict())
    return rows


def write_docs(result: dict[str, Any], path: Path) -> None:
    """Put the tables between their marks in the documentation."""
    text = path.read_text(encoding="utf-8")
    accuracy = [
        [
            r["method"],
            r["checkpointing"],
            r["batch"],
            r["predicted_mb"],
            r["measured_mb"],
            f"{r['difference_percent']} %",
        ]
        for r in result["tiny_cpu"]
    ]
    machines = [
        [
            r["machine"],
            r["method"],
            r["engine"],
            r["verdict"],
            "–" if r["samples_per_second"] is None else f"{r['samples_per_second']:.2f}",
            r["reason"],
        ]
        for r in result["machines"]
    ]
    published = [
        [
            r["gpus"],
            r["method"],
            "yes" if r["flash_attention"] else "no",
            "–" if r["published_gb"] is None else f"~{r['published_gb']}",
            r["planner_gb"],
            r["published_images_per_second"],
            f"{r['implied_utilisation']:.0%}",
            r["remark"],
        ]
        for r in result["published"]
    ]
    for name, head, rows in (
        ("accuracy", "method, checkpointing, batch, predicted MB, measured MB, difference", accuracy),
        ("machines", "machine, method, engine, verdict, samples/s, why", machines),
        ("published", "GPUs, method, flash, Microsoft GB, planner GiB, Microsoft images/s, share, remark", published),
    ):
        lines = [head.split(", "), ["---"] * len(head.split(", ")), *rows]
        table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan_accuracy.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "planning.md", help="whose tables are written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tiny"
        init_model("tiny", folder)
        rows = measured_rows(folder)
    table = Table("method", "checkpointing", "batch", "predicted MB", "measured MB", "difference", "moment")
    for row in rows:
        shown = ("method", "checkpointing", "batch", "predicted_mb", "measured_mb", "difference_percent", "moment")
        table.add_row(*(str(row[key]) for key in shown))
    console = Console(width=140)
    console.print(table)
    worst = max(abs(row["difference_percent"]) for row in rows)
    figures = {
        "worst_difference_percent": worst,
        "tiny_cpu": rows,
        "real_size": exact_rows(),
        "published": compare_published(),
        "machines": machine_rows(),
    }
    result = write_result("plan_accuracy", figures, arguments.out)
    write_docs(result, arguments.docs)
    console.print(f"worst difference {worst} %; written to {arguments.out}", highlight=False)


if __name__ == "__main__":
    main()
