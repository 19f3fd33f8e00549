"""How much faster packing trains: questions a second of four variants of training on the same records, in turns.

    python benchmarks/packing.py                      # all of it; the tiny model, on this machine's device
    python benchmarks/packing.py --rounds 1 --steps 1 --batch-size 8 --seconds 20   # small, to see that it works
    python benchmarks/packing.py --data receipts   # one dataset; the result keeps what it holds of the other
    python benchmarks/packing.py --attention          # only: what SDPA on packed rows costs, in three forms

- ``recipe``: as the public recipe trains, but with our model, not its code: one sample at a time, every image padded
  to num_crops + 1 crops which all go through the tower, logits of every position, everything recomputed in the
  backward pass. Attention is eager, as in the recipe without flash attention, or as ``--recipe-attention`` says.
- ``padded``: our batches of records, padded to the longest, without recomputing.
- ``samples`` and ``shared-image``: packed rows (docs/packing.md).

Each variant takes optimizer steps of the same number of questions, as ``phi3v bench train`` measures them; the first
step is not counted. Reading is part of a step, and the recipe variant reads float crops. On a CPU a second is CPU time
on one thread. The variants take turns for ``--rounds`` rounds; speeds and ratios are medians over the rounds,
beside their smallest and largest. A variant's turn is cut off after ``--seconds``, at the end of a step.

Datasets: easy-vqa (9.6 questions an image, 2 crops), and at num_crops=16 drawn pages in the sizes and with the lengths
of answers of 626 public scans of receipts (``receipt_pages.csv``), four questions a page, as about DocVQA's.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench_result import ROOT, write_result
from phi3v.bench.counting import timed_by
from phi3v.bench.pages import write_pages
from phi3v.bench.rows import measure_row
from phi3v.bench.settings import BenchSettings, Row, Variant
from phi3v.data.convert import ConvertOptions
from phi3v.data.sources import easy_vqa
from phi3v.data.table import RecordTable, open_table
from phi3v.model.attention import MaskBackend, SegmentBackend, visible
from phi3v.model.presets import init_model

VARIANTS = ("recipe", "padded", "samples", "shared-image")
DATA = ("easy-vqa", "receipts")


@dataclass(frozen=True)
class Data:
    """Records of one question each, those of a page one after the other."""

    name: str
    file: Path
    num_crops: int
    pack_tokens: int
    micro_batch_size: int  # of the padded batches
    batch_size: int  # questions of an optimizer step


def measure(
    variants: dict[str, Variant], data: Data, model_dir: Path, settings: BenchSettings, rounds: int
) -> dict[str, Any]:
    """Every variant, by its name in the result, and the ratios of ``shared-image`` over the others."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            row = measure_row(Row("full", variant), settings, model_dir, data.file)
            print(f"{data.name} {name}: {json.dumps(row)}", flush=True)
            rows[name].append(row)
    result: dict[str, Any] = {}
    for name, own in rows.items():
        wrong = [row for row in own if "error" in row]
        result[name] = wrong[0] if wrong else _summary(own)
    for base in ("recipe", "padded"):
        pairs = list(zip(rows.get("shared-image", []), rows.get(base, []), strict=False))
        if pairs and not any("error" in row for pair in pairs for row in pair):
            over = [ours["questions_per_second"] / theirs["questions_per_second"] for ours, theirs in pairs]
            result[f"shared_image_over_{base}"] = round(statistics.median(over), 2)
            result[f"shared_image_over_{base}_range"] = [round(min(over), 2), round(max(over), 2)]
    return result


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [row["questions_per_second"] for row in rounds]
    return {
        "attention": rounds[0]["attention"],
        "checkpointing": rounds[0]["checkpointing"],
        "steps": sum(row["steps"] for row in rounds),
        "questions_per_second": round(statistics.median(speeds), 3),
        "questions_per_second_range": [min(speeds), max(speeds)],
        "tokens_per_question": rounds[0]["tokens_per_sample"],  # a question a sample
        "peak_memory_gb_so_far": max(row["peak_gb"] for row in rounds),
    }


def easy_vqa_data(folder: Path, batch: int, steps: int) -> Data:
    files = easy_vqa.convert(ConvertOptions(folder / "easy-vqa", progress=False)).files
    # The test file has one record per question, as the recipe does; the training file has one conversation per image.
    return Data("easy-vqa", _first(files["test"], batch * (steps + 1)), 1, 2048, 8, batch)


def receipts_data(folder: Path, batch: int, steps: int) -> Data:
    with (Path(__file__).parent / "receipt_pages.csv").open(encoding="utf-8") as table:
        every = [{name: int(value) for name, value in row.items()} for row in csv.DictReader(table)]
    every = [page for page in every if page["questions"] == 4]  # all but two
    pages = -(-batch * (steps + 1) // 4)
    chosen = [every[index * len(every) // pages] for index in range(pages)]
    file = write_pages(
        folder / "receipts",
        pages,
        sizes=[(page["width"], page["height"]) for page in chosen],
        questions=[4],
        answer_characters=[page["answer_characters"] for page in chosen],
    )
    # Padded rows of one record: of so few pages two would often be of one, which then computes its image once.
    return Data("receipts", _first(file, batch * (steps + 1)), 16, 8192, 1, batch)


def _first(file: Path, count: int) -> Path:
    out = file.with_name(f"first-{count}.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()[:count]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def pages_of(table: RecordTable) -> int:
    return len({image for record in table for turn in record.turns for image in turn.images})


def compare_attention() -> dict[str, Any]:
    """Milliseconds, forward and backward, of SDPA over a packed row: by segments, a mask a group, the whole mask."""
    layouts = {
        "8 pages of easy-vqa, 9 questions each": ((313, *[18] * 9),) * 8,
        "2 pages of DocVQA, 4 questions each": ((2509, *[25] * 4),) * 2,
        "12 samples of 333": ((0, 333),) * 12,
    }
    device = torch.device("cpu")
    figures: dict[str, Any] = {}
    for name, layout in layouts.items():
        groups = [sum(group) for group in layout]
        masks = [visible((group,)) for group in layout]

        def by_group(
            q: Any, k: Any, v: Any, scale: Any, dropout: float, groups: Any = groups, masks: Any = masks
        ) -> Any:
            parts = (tensor.split(groups, dim=2) for tensor in (q, k, v))
            attend = functional.scaled_dot_product_attention
            return torch.cat([attend(*part, attn_mask=m) for m, *part in zip(masks, *parts, strict=True)], 2)

        tensors = [torch.randn(1, 4, sum(groups), 32, requires_grad=True) for _ in range(3)]
        figures[name] = {
            "segments": _milliseconds(SegmentBackend(layout, device), tensors),
            "a mask a group": _milliseconds(by_group, tensors),
            "the whole mask": _milliseconds(MaskBackend(layout, device), tensors),
        }
    return figures


def _milliseconds(attend: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> float:
    times = []
    for _ in range(4):
        began = time.perf_counter()
        attend(*tensors, None, 0.0).sum().backward()
        times.append(time.perf_counter() - began)
    return round(1000 * statistics.median(times[1:]), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the tiny preset with random weights")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch-size", type=int, help="questions of an optimizer step (default: 64, receipts 8)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every variant")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn that are timed")
    parser.add_argument("--seconds", type=float, default=240, help="a turn ends after so many, at the end of a step")
    parser.add_argument("--recipe-attention", choices=("eager", "flash"), default="eager")
    parser.add_argument(
        "--attention", action="store_true", help="compare attention implementations on the CPU, and end"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "packing.json")
    given = parser.parse_args()
    if given.attention:
        print(json.dumps(compare_attention(), indent=2))
        return
    figures: dict[str, Any] = {}
    if given.out.exists():  # of a dataset that is not measured now
        before = json.loads(given.out.read_text(encoding="utf-8"))
        figures = {name: before[name] for name in DATA if name in before}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = given.model or folder / "model"
        if given.model is None:
            init_model("tiny", model)
        for wanted in given.data:
            if wanted == "easy-vqa":
                data = easy_vqa_data(folder, given.batch_size or 64, given.steps)
            else:
                data = receipts_data(folder, given.batch_size or 8, given.steps)
            table = open_table(data.file, progress=False)
            result: dict[str, Any] = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "questions": len(table),
                "pages": pages_of(table),
                "num_crops": data.num_crops,
                "batch_size": data.batch_size,
                "pack_tokens": data.pack_tokens,
                "micro_batch_size_padded": data.micro_batch_size,
                "timed_by": timed_by(),
                "rounds": given.rounds,
                "steps_of_a_round": given.steps,
            }
            settings = BenchSettings(
                batch_size=data.batch_size,
                steps=given.steps,
                seconds=given.seconds,
                num_crops=data.num_crops,
                micro_batch=data.micro_batch_size,
                pack_tokens=data.pack_tokens,
                shared_image_max=16,
                optimizer="adamw",
            )
            variants: dict[str, Variant] = {variant: variant for variant in given.variants}
            if "recipe" in variants and given.recipe_attention == "flash":
                variants["recipe"] = "recipe-flash"
            result |= measure(variants, data, model, settings, given.rounds)
            figures[data.name] = result
    print(json.dumps(write_result("packing", figures, given.out), indent=2))


if __name__ == "__main__":
    main()
