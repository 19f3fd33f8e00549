"""A run on 64 nodes of 8 GPUs, simulated on one core: reads, plans, balance and checkpoints. No GPU and no network.

    python benchmarks/scale_simulation.py   # benchmarks/results/scale_simulation.json and the tables of docs/scaling.md

The index of a million made-up records (3.9 questions a page, one page an image of 300 kB on average) is written by the
function with which ``phi3v data shard --model.path`` writes it; the shards themselves are files without content.
Processes of their own then start as training does: one opens the index for the first time on a machine and verifies it,
the others open it again, plan a whole epoch, and go on in the middle of another. CPU time and peak memory are theirs.
With ``--folder``, the index is kept, and not made again.

Everything else is computed: what ranks fetch and how equal their work is by the plan that training makes, with the
defaults of shards and with as many shards in a window as there are ranks; bytes of checkpoints from the released
model's shapes by the engines' rules for dividing tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bench_result import ROOT, peak_memory, write_between_marks, write_result
from phi3v.config import SHUFFLE_WINDOW, LoraConfig, MethodConfig, RunConfig
from phi3v.data.batches import BatchPlan
from phi3v.data.lengths import Ints, RecordLengths, measure_table
from phi3v.data.order import Order, ShardWindows
from phi3v.data.schema import Record, Turn
from phi3v.data.shards.index import INDEX, ImageRow, Shard
from phi3v.data.shards.write import ShardOptions, write_tables
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.presets import init_model
from phi3v.model.shape import ModelShape
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.open_data import open_data, order_of

BEGIN, END = "<!-- scale: begin -->", "<!-- scale: end -->"
NODES, PER_NODE, SAMPLES = 64, 8, 16  # samples of a rank in a step
RANKS = NODES * PER_NODE
QUESTIONS, IMAGE_BYTES, BLOCK = 3.9, 300_000, 512
SHARDS = {"defaults": (ShardOptions().shard_size, SHUFFLE_WINDOW), "a window of 512": (100_000_000, RANKS)}
STEPS = 20  # that balance and reads are looked at
PLANS = (("none", PER_NODE, 64), ("samples", PER_NODE, 64), ("shared-image", RANKS, RANKS * SAMPLES))


@dataclass(frozen=True)
class Pages:
    """Made-up pages, and the page of each record.

    Attributes:
        of_record: (records,) in order.
        bytes, width, height: (pages,) of its image.
    """

    of_record: Ints
    bytes: Ints
    width: Ints
    height: Ints

    @classmethod
    def draw(cls, records: int) -> Pages:
        """Of so many records."""
        rng = np.random.default_rng(0)
        of_record = np.repeat(np.arange(records), 1 + rng.poisson(QUESTIONS - 1, records))[:records]
        count = int(of_record[-1]) + 1
        width = rng.normal(1700, 250, count).clip(600, 2600).astype(np.int64)
        height = (width * rng.normal(1.3, 0.15, count).clip(0.7, 2.2)).astype(np.int64)
        return cls(of_record, rng.lognormal(np.log(IMAGE_BYTES) - 0.125, 0.5, count).astype(np.int64), width, height)

    def shards(self, shard_bytes: int) -> tuple[Ints, Ints]:
        """(pages,) the shard of each page, where they are cut into so many bytes, and its place in the tar."""
        ends = np.cumsum(BLOCK + -(-self.bytes // BLOCK) * BLOCK)
        shard = ends // shard_bytes
        starts = np.append(0, ends[:-1])
        first = starts[np.searchsorted(shard, np.arange(int(shard[-1]) + 1))]
        return shard, starts - first[shard] + BLOCK

    def records_of(self, shard: Ints) -> tuple[int, ...]:
        """The number of records of each shard."""
        return tuple(np.bincount(shard[self.of_record]).tolist())


def write_data(folder: Path, pages: Pages, processor: Phi3VProcessor | None) -> None:
    """The index of the shards of the pages, in ``folder``, and files of the size that the shards would have."""
    shard, offset = pages.shards(SHARDS["defaults"][0])
    names = [f"pages/{number:07d}.jpg" for number in range(len(pages.bytes))]

    def records() -> Iterator[Record]:
        for number, page in enumerate(pages.of_record.tolist()):
            question = f"What is written in field number {number % 97} of this page?"
            turn = Turn(user=question, assistant=f"answer {number}", images=(names[page],))
            yield Record(f"record-{number}", "made up", (turn,), number + 1)

    arrays = (shard, offset, pages.bytes, pages.width, pages.height)
    rows = [
        ImageRow(name, *numbers, turned=False, sha256=hashlib.sha256(name.encode()).digest())
        for name, *numbers in zip(names, *(array.tolist() for array in arrays), strict=True)
    ]
    ends = np.zeros(int(shard[-1]) + 1, dtype=np.int64)
    np.maximum.at(ends, shard, offset + pages.bytes)
    sizes = zip(ends.tolist(), pages.records_of(shard), strict=True)
    made = [
        Shard(f"{k:05d}.tar", size, hashlib.sha256(b"%d" % k).hexdigest(), of) for k, (size, of) in enumerate(sizes)
    ]
    for each in made:
        with (folder / each.file).open("wb") as file:
            file.truncate(each.bytes)  # takes no room
    write_tables(folder, records(), rows, made, ["made-up records"], processor)


def plan_of(lengths: RecordLengths, packing: Any, ranks: int, batch: int, order: Order | None) -> BatchPlan:
    """As training makes it."""
    config = RunConfig()
    return BatchPlan(
        lengths,
        packing,
        batch_size=batch,
        micro_batch_size=2 if packing == "none" else 1,
        pack_tokens=config.data.pack_tokens,
        shared_image_max=config.data.shared_image_max,
        costs=ModelShape.of(Phi3VConfig()).training_costs(),
        world_size=ranks,
        order=order,
    )


def open_lengths(folder: Path, processor: Phi3VProcessor | None) -> tuple[RecordLengths, Order | None]:
    """The records of an index as training opens them: their lengths, and their order."""
    config = RunConfig().with_keys({"data.train": str(folder), "training.progress_bar": False})
    table, _ = open_data(config)
    return measure_table(table, processor).at(16), order_of(config, table)


def measure_plan(folder: Path, packing: str, ranks: int, batch: int) -> dict[str, Any]:
    """In this process: open the index, plan an epoch, go on in the middle of another. CPU seconds, peak of memory."""
    processor = Phi3VProcessor.from_pretrained(folder / "model")
    before = peak_memory()
    started = time.process_time()
    lengths, order = open_lengths(folder / "index", processor)
    plan = plan_of(lengths, packing, ranks, batch, order)
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
        "peak_mb": round(peak_memory() / 1e6),
        "before_mb": round(before / 1e6),
    }


def in_own_process(folder: Path, case: tuple[str, int, int], cache: Path) -> dict[str, Any]:
    """`measure_plan` with nothing in memory before, on one core."""
    command = [sys.executable, __file__, "--plan", str(folder), *map(str, case)]
    environment = os.environ | {"PHI3V_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    core = sorted(os.sched_getaffinity(0))[:1]
    process = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )
    figures: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return figures


def reads_and_balance(lengths: RecordLengths, pages: Pages, shard_bytes: int, window: int) -> dict[str, Any]:
    """Work of 512 ranks; what each fetches: own shards whole, of others' shards the pages that it computes."""
    shard, _ = pages.shards(shard_bytes)
    order = ShardWindows(pages.records_of(shard), window, 0)
    plan = plan_of(lengths, "shared-image", RANKS, RANKS * SAMPLES, order)
    sizes = np.bincount(shard, pages.bytes)
    own = np.zeros((RANKS, 2))  # bytes of the first window, and of all
    for number, shards in enumerate(order.windows(0)):
        for rank in range(RANKS):
            fetched = sizes[shards[rank::RANKS]].sum()
            own[rank] += (fetched if number == 0 else 0, fetched)
    homes, uneven = order.slots(0) % RANKS, []
    at_home = records = 0
    foreign = np.zeros(RANKS)
    for step in islice(plan.steps(0), STEPS):
        work = [sum(map(plan.work, rows)) for rows in step]
        uneven.append(max(work) / (sum(work) / RANKS))
        for rank, rows in enumerate(step):
            for group in (group for row in rows for group in row):
                is_home = homes[group[0]] == rank
                at_home += len(group) * bool(is_home)
                records += len(group)
                foreign[rank] += 0 if is_home else pages.bytes[pages.of_record[group[0]]]
    singly = foreign * plan.num_steps / STEPS
    return {
        "shard_mb": round(shard_bytes / 1e6),
        "shards": len(sizes),
        "window": window,
        "ranks_with_shards": int((own[:, 1] > 0).sum()),
        "first_shards_mb_per_node_most": round(own[:, 0].reshape(NODES, PER_NODE).sum(axis=1).max() / 1e6),
        "own_shards_mb_per_rank_most": round(own[:, 1].max() / 1e6),
        "single_pages_mb_per_rank_mean": round(singly.mean() / 1e6),
        "fetched_over_data": round(float((own[:, 1].sum() + singly.sum()) / sizes.sum()), 2),
        "at_home": round(at_home / records, 3),
        "work_most_over_mean": round(float(np.mean(uneven)), 3),
    }


def checkpoints() -> list[dict[str, Any]]:
    """Bytes of trained weights and AdamW's moments in float32, in all and of the rank that writes the most."""
    from phi3v.plan.parameters import meta_model

    found = []
    for name, method in (("full", MethodConfig(name="full")), ("lora", MethodConfig(name="lora", lora=LoraConfig()))):
        model = meta_model(Phi3VConfig(), method, "bf16")
        shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
        numbers, rows = np.array([[shape.numel(), shape[0]] for shape in shapes]).T

        def fsdp2(ranks: int, rows: Any = rows, numbers: Any = numbers) -> Any:
            """Of each tensor what the first rank holds: torch.chunk divides rows, and gives it the most."""
            return np.minimum(-(-rows // ranks), rows) * (numbers // rows)

        def megabytes(held: Any) -> float:
            return round(float(held.sum()) * 3 * 4 / 1e6, 1)  # weight and two moments

        found.append(
            {
                "method": name,
                "tensors": len(shapes),
                "total_mb": megabytes(numbers),
                "ddp_most_mb": megabytes(-(-numbers // RANKS)),
                "zero_mb": megabytes(numbers / RANKS),
                "fsdp2_most_mb": megabytes(fsdp2(RANKS)),
                "hsdp_most_mb": megabytes(-(-fsdp2(PER_NODE) // NODES)),  # replicas share the writing
            }
        )
    return found


def markdown(result: dict[str, Any]) -> str:
    """The tables of docs/scaling.md."""
    lines = ["| plan of a million records | ranks | start, s | epoch planned, s | resumed, s | peak, MB |"]
    lines.append("|---|---|---|---|---|---|")
    for case in (result["first"], *result["plans"]):
        first = ", the first time on a machine" if case is result["first"] else ""
        seconds = " | ".join(f"{case[f'{name}_seconds']:.1f}" for name in ("open", "epoch", "resume"))
        lines.append(f"| `{case['packing']}`{first} | {case['ranks']} | {seconds} | {case['peak_mb']} |")
    reads = result["reads"].values()
    wide = [f"{each['shard_mb']} MB, window {each['window']}" for each in reads]
    lines += ["", f"| 512 ranks; shards of | {' | '.join(wide)} |", "|---|---|---|"]
    for title, name, unit in (
        ("shards", "shards", ""),
        ("ranks that have some", "ranks_with_shards", ""),
        ("index, fetched once a node", "", ""),
        ("a node's own shards of the first window, at most", "first_shards_mb_per_node_most", " MB"),
        ("own shards of a rank in an epoch, at most", "own_shards_mb_per_rank_most", " MB"),
        ("single pages of others' shards a rank, on average", "single_pages_mb_per_rank_mean", " MB"),
        ("all that is fetched over the data", "fetched_over_data", ""),
        ("records computed where their shard is", "at_home", "%"),
        ("work of a step, most over mean", "work_most_over_mean", ""),
    ):
        values = [each[name] if name else f"{result['index_mb']} MB" for each in reads]
        shown = [f"{value:.1%}" if unit == "%" else f"{value}{unit}" for value in values]
        lines.append(f"| {title} | {' | '.join(shown)} |")
    lines += ["", "| sharded checkpoint, MB | in all | a rank: `ddp` | ZeRO | `fsdp2` | `fsdp2`, 64 replicas |"]
    lines.append("|---|---|---|---|---|---|")
    for case in result["checkpoints"]:
        names = ("total", "ddp_most", "zero", "fsdp2_most", "hsdp_most")
        lines.append(f"| `{case['method']}` | {' | '.join(str(case[f'{name}_mb']) for name in names)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/scale_simulation.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/scaling.md")
    parser.add_argument("--folder", type=Path, help="where the index is kept, or was; by default it is not")
    parser.add_argument("--plan", nargs=4, metavar=("FOLDER", "PACKING", "RANKS", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        folder, packing, ranks, batch = arguments.plan
        print(json.dumps(measure_plan(Path(folder), packing, int(ranks), int(batch))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        os.environ["PHI3V_CACHE"] = str(Path(temporary) / "cache of the writer")
        pages = Pages.draw(arguments.records)
        if not (folder / "index" / INDEX).exists():
            (folder / "index").mkdir(parents=True)
            init_model("tiny", folder / "model")
            write_data(folder / "index", pages, Phi3VProcessor.from_pretrained(folder / "model"))
        processor = Phi3VProcessor.from_pretrained(folder / "model")
        plans = []
        for case in (PLANS[0], *PLANS):
            plans.append(in_own_process(folder, case, Path(temporary) / "cache"))
            print(plans[-1], flush=True)
        lengths, _ = open_lengths(folder / "index", processor)
        reads = {name: reads_and_balance(lengths, pages, *cut) for name, cut in SHARDS.items()}
        print(reads, flush=True)
        index = json.loads((folder / "index" / INDEX).read_text())["files"].values()
        index_bytes = sum(file["bytes"] for file in index) + (folder / "index" / INDEX).stat().st_size
    figures = {
        "nodes": NODES,
        "gpus_per_node": PER_NODE,
        "records": arguments.records,
        "data_gb": round(int(pages.bytes.sum()) / 1e9, 1),
        "index_mb": round(index_bytes / 1e6),
        "index_bytes_per_record": round(index_bytes / arguments.records),
        "first": plans[0],
        "plans": plans[1:],
        "reads": reads,
        "checkpoints": checkpoints(),
    }
    result = write_result("scale_simulation", figures, arguments.out)
    write_between_marks(arguments.docs, (BEGIN, END), markdown(result))


if __name__ == "__main__":
    main()
