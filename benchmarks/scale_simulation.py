"""A run on 64 nodes of 8 GPUs, simulated on one core: reads, plans, balance and checkpoints. No GPU and no network.

    python benchmarks/scale_simulation.py   # benchmarks/results/scale_simulation.json and the tables of docs/scaling.md

A real index of a million made-up records (3.9 questions a page, one page an image of 300 kB on average) is written and
opened; the shards themselves are not. Opening it and planning a whole epoch run in a process of their own, of which CPU
time and peak memory are measured. Everything else is computed: what ranks fetch by the order that training uses, bytes
of checkpoints from the released model's shapes by the engines' rules for dividing tensors.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bench_result import ROOT, write_between_marks, write_result
from phi3v.config import LoraConfig, MethodConfig
from phi3v.data.batches import BatchPlan
from phi3v.data.cache import keep_arrays
from phi3v.data.lengths import measure_table, tokens_file
from phi3v.data.order import ShardWindows
from phi3v.data.record_rows import SCHEMA
from phi3v.data.shards.index import _IMAGE_SCHEMA, IMAGES, INDEX, RECORDS, Shard, name_keys, write_index
from phi3v.data.table import open_table
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.shape import ModelShape

BEGIN, END = "<!-- scale: begin -->", "<!-- scale: end -->"
NODES, PER_NODE, SAMPLES = 64, 8, 16  # samples of a rank in a step
RANKS = NODES * PER_NODE
QUESTIONS = 3.9
SHARD_BYTES, IMAGE_BYTES = 100_000_000, 300_000
BATCH = 50_000  # records that are written at a time
STEPS = 20  # that balance and reads are looked at
PACKING: dict[str, Any] = {"pack_tokens": 8192, "shared_image_max": 8}
PLANS = (("none", PER_NODE, 64), ("samples", PER_NODE, 64), ("shared-image", RANKS, RANKS * SAMPLES))


def write_data(folder: Path, count: int) -> list[int]:
    """The index of so many records; returns the bytes of each shard."""
    rng = np.random.default_rng(0)
    page = np.repeat(np.arange(count), 1 + rng.poisson(QUESTIONS - 1, count))[:count]
    pages = int(page[-1]) + 1
    width = rng.normal(1700, 250, pages).clip(600, 2600).astype(np.int32)
    height = (width * rng.normal(1.3, 0.15, pages).clip(0.7, 2.2)).astype(np.int32)
    size = rng.lognormal(np.log(IMAGE_BYTES) - 0.125, 0.5, pages).astype(np.int64)
    ends = np.cumsum(size)
    shard_of_page = ends // SHARD_BYTES
    names = [f"pages/{number:07d}.jpg" for number in range(pages)]
    text, targets = rng.integers(20, 60, count), rng.integers(3, 20, count)

    with pa.OSFile(str(folder / RECORDS), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for start in range(0, count, BATCH):
            writer.write_batch(_records(np.arange(start, min(start + BATCH, count)), page, names))

    keys = name_keys(names)
    order = np.argsort(keys, kind="stable")
    columns = {
        "key": keys,
        "name": np.array(names, dtype=object),
        "shard": shard_of_page,
        "offset": (ends - size) - (ends - size)[np.searchsorted(shard_of_page, shard_of_page)],
        "size": size,
        "width": width,
        "height": height,
        "turned": np.zeros(pages, dtype=bool),
        "sha256": np.array([key.tobytes() * 4 for key in keys], dtype=object),
    }
    arrays = [pa.array(columns[field.name][order], field.type) for field in _IMAGE_SCHEMA]
    with pa.OSFile(str(folder / IMAGES), "wb") as sink, pa.ipc.new_stream(sink, _IMAGE_SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=_IMAGE_SCHEMA))

    prefix = np.full(count, 5)
    counts = {
        "text": text + targets,
        "targets": targets,
        "prompts": text,
        "prefixes": prefix,
        "pages": page,
        "answers": np.repeat(targets, 1),
    }
    keep_arrays(folder / tokens_file(None), counts)
    shards = int(shard_of_page[-1]) + 1
    bytes_of = np.bincount(shard_of_page, size, shards).astype(int).tolist()
    records_of = np.bincount(shard_of_page[page], minlength=shards).tolist()
    made = [Shard(f"{k:06d}.tar", bytes_of[k], f"{k:064x}", records_of[k]) for k in range(shards)]
    write_index(folder, made, ["simulated"], [tokens_file(None)])
    return bytes_of


def _records(rows: Any, page: Any, names: list[str]) -> pa.RecordBatch:
    """Some of the records, of one turn each."""
    count = len(rows)
    every = pa.array(np.arange(count + 1, dtype=np.int32))
    turn = {
        "user": pa.array([f"What is written in field number {row % 97} of this page?" for row in rows]),
        "assistant": pa.array([f"answer {row}" for row in rows]),
        "images": pa.ListArray.from_arrays(every, pa.array([names[number] for number in page[rows]])),
        "weight": pa.array(np.ones(count, dtype=np.int8)),
    }
    kind = SCHEMA.field("turns").type.value_type
    empty = {name: pa.array([[]] * count, kind.field(name).type) for name in ("answers", "rejected", "scores")}
    turns = pa.StructArray.from_arrays(
        [turn.get(field.name, empty.get(field.name, pa.nulls(count, field.type))) for field in kind],
        fields=list(kind),
    )
    columns = {
        "id": pa.array([f"record-{row}" for row in rows]),
        "source": pa.array(["simulated"] * count),
        "line": pa.array(rows + 1),
        "turns": pa.ListArray.from_arrays(every, turns),
        "questions": pa.ListArray.from_arrays(every, pa.array(np.zeros(count, dtype=np.int32))),
        "num_images": pa.array(np.ones(count, dtype=np.int32)),
        "num_rejected": pa.array(np.zeros(count, dtype=np.int32)),
    }
    arrays = [columns.get(field.name, pa.nulls(count, field.type)).cast(field.type) for field in SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def plan_of(folder: Path, packing: Any, ranks: int, batch: int) -> tuple[BatchPlan, ShardWindows]:
    """As training makes it, of an index."""
    table = open_table(folder, progress=False)
    lengths = measure_table(table, None).at(16)
    order = ShardWindows(table.shards, window=RANKS, seed=0)
    costs = ModelShape.of(Phi3VConfig()).training_costs()
    size = 2 if packing == "none" else 1
    settings = PACKING | {"batch_size": batch, "micro_batch_size": size, "world_size": ranks, "costs": costs}
    return BatchPlan(lengths, packing, order=order, **settings), order


def measure_plan(folder: Path, packing: str, ranks: int, batch: int) -> dict[str, Any]:
    """In this process: open the index, plan an epoch, go on in the middle of another. CPU seconds, peak of memory."""
    started = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan, _ = plan_of(folder, packing, ranks, batch)
    opened = time.process_time()
    steps = sum(1 for _ in plan.steps(0))
    planned = time.process_time()
    next(plan.steps(1, plan.num_steps // 2))
    return {
        "packing": packing,
        "ranks": ranks,
        "steps": steps,
        "open_seconds": round(opened - started, 2),
        "epoch_seconds": round(planned - opened, 2),
        "resume_seconds": round(time.process_time() - planned, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
        "imports_mb": round(before / 1000),
    }


def in_own_process(folder: Path, case: tuple[str, int, int]) -> dict[str, Any]:
    """`measure_plan` with nothing in memory before."""
    command = [sys.executable, __file__, "--plan", str(folder), *map(str, case)]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


def reads_and_balance(folder: Path, shard_bytes: list[int]) -> dict[str, Any]:
    """Work of 512 ranks; what each fetches: own shards whole, of others' shards the pages that it computes."""
    plan, order = plan_of(folder, "shared-image", RANKS, RANKS * SAMPLES)
    homes, uneven, at_home, records, foreign = order.slots(0) % RANKS, [], 0, 0, 0
    for step in islice(plan.steps(0), STEPS):
        work = [sum(map(plan.work, rows)) for rows in step]
        uneven.append(max(work) / (sum(work) / RANKS))
        for rank, rows in enumerate(step):
            for group in (group for row in rows for group in row):
                is_home = homes[group[0]] == rank
                at_home += len(group) * bool(is_home)
                records += len(group)
                foreign += not is_home
    owned = np.bincount(np.arange(len(shard_bytes)) % RANKS, shard_bytes, RANKS)
    foreign_bytes = foreign / STEPS / RANKS * plan.num_steps * IMAGE_BYTES
    first = order.windows(0)[0]
    files = json.loads((folder / INDEX).read_text())["files"]
    return {
        "shards": len(shard_bytes),
        "data_gb": round(sum(shard_bytes) / 1e9, 1),
        "index_mb": round((sum(file["bytes"] for file in files.values()) + (folder / INDEX).stat().st_size) / 1e6),
        "index_bytes_per_record": round(sum(file["bytes"] for file in files.values()) / len(plan)),
        "first_shards_mb_per_node": round(PER_NODE * sum(shard_bytes[shard] for shard in first) / len(first) / 1e6),
        "work_most_over_mean": round(float(np.mean(uneven)), 3),
        "at_home": round(at_home / records, 3),
        "own_shards_mb_per_rank": round(float(owned.mean()) / 1e6),
        "other_pages_mb_per_rank": round(foreign_bytes / 1e6),
        "without_homes_mb_per_rank": round(float(len(plan) / QUESTIONS * IMAGE_BYTES / RANKS / 1e6)),
    }


def checkpoints() -> list[dict[str, Any]]:
    """Bytes of trained weights and AdamW's moments in float32, in all and of the rank that writes the most."""
    from phi3v.plan.parameters import meta_model  # not in the processes whose memory is measured

    found = []
    for name, method in (("full", MethodConfig(name="full")), ("lora", MethodConfig(name="lora", lora=LoraConfig()))):
        model = meta_model(Phi3VConfig(), method, "bf16")
        shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
        numbers = 3 * 4 * np.array([shape.numel() for shape in shapes])  # weight and two moments
        rows = np.array([shape[0] for shape in shapes])

        def most(ranks: int, rows: Any = rows, numbers: Any = numbers) -> int:
            # As torch.chunk divides rows: the first ranks have the most.
            return int((np.minimum(-(-rows // ranks), rows) * (numbers // rows)).sum())

        total = int(numbers.sum())
        ddp = int(sum(-(-number // 12 // RANKS) * 12 for number in numbers.tolist()))
        found.append(
            {
                "method": name,
                "tensors": len(shapes),
                "total_gb": round(total / 1e9, 3),
                "fsdp2_most_mb": round(most(RANKS) / 1e6, 1),
                "zero_mb": round(total / RANKS / 1e6, 1),
                "ddp_mb": round(ddp / 1e6, 1),
                "fsdp2_in_a_node_mb": round(most(PER_NODE) / 1e6, 1),
                "gathered_on_rank_0_gb": round(total / 1e9, 3),
            }
        )
    return found


def markdown(result: dict[str, Any]) -> str:
    """The table of docs/scaling.md."""
    data = result["data"]
    rows = [
        (
            "Index of the shards",
            f"{data['index_mb']} MB, {data['index_bytes_per_record']} bytes a record; once a node",
        ),
        ("Shards", f"{data['shards']} of 100 MB, {data['data_gb']} GB"),
        ("First shards needed", f"{data['first_shards_mb_per_node']} MB a node"),
        ("Records on the rank that has their shard", f"{data['at_home']:.1%}"),
        ("Own shards of a rank, fetched whole in an epoch", f"{data['own_shards_mb_per_rank']} MB"),
        ("Single pages of others' shards", f"{data['other_pages_mb_per_rank']} MB a rank"),
        ("All pages, if each were fetched singly", f"{data['without_homes_mb_per_rank']} MB a rank"),
        ("Work of a step, most over mean of 512 ranks", f"{data['work_most_over_mean']:.3f}"),
    ]
    for case in result["checkpoints"]:
        parts = f"FSDP2 at most {case['fsdp2_most_mb']} MB, ZeRO {case['zero_mb']} MB, DDP {case['ddp_mb']} MB a rank"
        rows.append((f"Sharded checkpoint, `{case['method']}`", f"{case['total_gb']} GB; {parts}"))
    lines = ["| simulated: 64 nodes x 8 GPUs, a million records | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", "| plan of a million records | ranks | index opened, s | epoch planned, s | resumed, s | peak, MB |"]
    lines.append("|---|---|---|---|---|---|")
    for case in result["plans"]:
        seconds = " | ".join(f"{case[f'{name}_seconds']:.1f}" for name in ("open", "epoch", "resume"))
        lines.append(f"| `{case['packing']}` | {case['ranks']} | {seconds} | {case['peak_mb']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/scale_simulation.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/scaling.md")
    parser.add_argument("--plan", nargs=4, metavar=("FOLDER", "PACKING", "RANKS", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        folder, packing, ranks, batch = arguments.plan
        print(json.dumps(measure_plan(Path(folder), packing, int(ranks), int(batch))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shard_bytes = write_data(folder, arguments.records)
        plans = []
        for case in PLANS:
            plans.append(in_own_process(folder, case))
            print(plans[-1], flush=True)
        data = reads_and_balance(folder, shard_bytes)
        print(data, flush=True)
    figures = {
        "nodes": NODES,
        "gpus_per_node": PER_NODE,
        "records": arguments.records,
        "plans": plans,
        "data": data,
        "checkpoints": checkpoints(),
    }
    result = write_result("scale_simulation", figures, arguments.out)
    write_between_marks(arguments.docs, (BEGIN, END), markdown(result))


if __name__ == "__main__":
    main()
