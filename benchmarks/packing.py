"""How much faster packing trains: questions a second of four ways to take the same records, in one run on one machine.

    python benchmarks/packing.py                      # all of it; the tiny model, on this machine's device
    python benchmarks/packing.py --steps 1 --batch-size 8 --pages 4 --seconds 20   # a small run, to see that it works
    python benchmarks/packing.py --data docvqa     # one dataset; the result keeps what it holds of the other
    python benchmarks/packing.py --attention          # only: what SDPA on packed rows costs, three ways

- ``recipe``: as the public recipe trains: one sample at a time, every picture padded to num_crops + 1 crops which all
  go through the tower, logits of every position, everything recomputed in the backward pass. Attention is eager, as
  in the recipe without flash attention, or as ``--recipe-attention`` says.
- ``padded``: our batches of records, padded to the longest, without recomputing.
- ``samples`` and ``shared-image``: packed rows (docs/packing.md).

Each way takes optimizer steps of the same number of questions, as ``phi3v bench train`` measures them; the first step
is not counted. Reading is part of a step, and the recipe's way reads float crops. A way is cut off after ``--seconds``,
at the end of a step. Datasets: easy-vqa (9.6 questions a picture, 2 crops) and the stand-in of DocVQA at num_crops=16
(4 questions a page, 17 crops).
"""

from __future__ import annotations

import argparse
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

import tasks.docvqa
from bench_result import ROOT, write_result
from phi3v.bench.rows import measure_row
from phi3v.bench.settings import Row, Settings, Way
from phi3v.data.convert import ConvertOptions
from phi3v.data.sources import docvqa, easy_vqa
from phi3v.data.table import RecordTable, open_table
from phi3v.model.attention import MaskBackend, SegmentBackend, visible
from phi3v.model.presets import init_model
from tasks.parts import Sizes

WAYS = ("recipe", "padded", "samples", "shared-image")


@dataclass(frozen=True)
class Data:
    """Records of one question each, those of a page one after the other."""

    name: str
    file: Path
    num_crops: int
    pack_tokens: int
    micro_batch_size: int  # of the padded batches
    batch_size: int  # questions of an optimizer step


def measure(way: Way, data: Data, model_dir: Path, settings: Settings) -> dict[str, Any]:
    """Questions a second of one way, and what else there is to know of it."""
    row = measure_row(Row("full", way), settings, model_dir, data.file)
    if "error" in row:
        return row
    return {
        "attention": row["attention"],
        "steps": row["steps"],
        "questions_per_second": round(row["questions_per_second"], 3),
        "tokens_per_question": row["tokens_per_sample"],  # a question a sample
        "peak_memory_gb_so_far": row["peak_gb"],
    }


def easy_vqa_data(folder: Path, batch: int, steps: int) -> Data:
    files = easy_vqa.convert(ConvertOptions(folder / "easy-vqa", progress=False)).files
    # The test file has a record a question, as the recipe takes it; the training file has a conversation a picture.
    return Data("easy-vqa", _first(files["test"], batch * (steps + 1)), 1, 2048, 8, batch)


def docvqa_data(folder: Path, pages: int, batch: int) -> Data:
    tasks.docvqa.make(folder / "original", Sizes(train=pages, val=0, test=1), 0)
    options = ConvertOptions(folder / "docvqa", source=str(folder / "original"), progress=False)
    return Data("docvqa", docvqa.convert(options).files["train"], 16, 8192, 2, batch)


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
    parser.add_argument("--data", nargs="+", choices=("easy-vqa", "docvqa"), default=["easy-vqa", "docvqa"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch-size", type=int, help="questions of an optimizer step (default: 64, docvqa 32)")
    parser.add_argument("--steps", type=int, default=2, help="steps that are timed")
    parser.add_argument("--pages", type=int, default=24, help="pages of the stand-in of DocVQA, four questions each")
    parser.add_argument("--seconds", type=float, default=240, help="a way ends after so many, at the end of a step")
    parser.add_argument("--recipe-attention", choices=("eager", "flash"), default="eager")
    parser.add_argument("--attention", action="store_true", help="compare ways to attend on the CPU, and end")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "packing.json")
    given = parser.parse_args()
    if given.attention:
        print(json.dumps(compare_attention(), indent=2))
        return
    figures: dict[str, Any] = {}
    if given.out.exists():  # of a dataset that is not measured now
        before = json.loads(given.out.read_text(encoding="utf-8"))
        figures = {name: before[name] for name in ("easy-vqa", "docvqa") if name in before}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = given.model or folder / "model"
        if given.model is None:
            init_model("tiny", model)
        for wanted in given.data:
            if wanted == "easy-vqa":
                data = easy_vqa_data(folder, given.batch_size or 64, given.steps)
            else:
                data = docvqa_data(folder, given.pages, given.batch_size or 32)
            table = open_table(data.file, progress=False)
            result: dict[str, Any] = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "questions": len(table),
                "pages": pages_of(table),
                "num_crops": data.num_crops,
                "batch_size": data.batch_size,
                "pack_tokens": data.pack_tokens,
                "micro_batch_size_padded": data.micro_batch_size,
            }
            settings = Settings(
                batch_size=data.batch_size,
                steps=given.steps,
                seconds=given.seconds,
                num_crops=data.num_crops,
                micro_batch=data.micro_batch_size,
                pack_tokens=data.pack_tokens,
                shared_image_max=16,
                optimizer="adamw",
            )
            for way in given.ways:
                kind: Way = "recipe-flash" if way == "recipe" and given.recipe_attention == "flash" else way
                result[way] = measure(kind, data, model, settings)
                print(f"{data.name} {way}: {json.dumps(result[way])}", flush=True)
            for base in ("recipe", "padded"):
                speeds = [result.get(way, {}).get("questions_per_second") for way in ("shared-image", base)]
                if all(speeds):
                    ours, theirs = speeds
                    result[f"shared_image_over_{base}"] = round(ours / theirs, 2)
            figures[data.name] = result
    print(json.dumps(write_result("packing", figures, given.out), indent=2))


if __name__ == "__main__":
    main()
