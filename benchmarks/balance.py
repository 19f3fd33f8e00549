"""How equal the work of simulated ranks is: the most of a rank over the mean, step by step.

    python benchmarks/balance.py     # benchmarks/results/balance.json, and the table in docs/scaling.md

Work is modelled time: operations of a step of full fine-tuning of the released model, tower included. At the end steps
of a small model on one thread of a CPU are measured beside their modelled work.

Four kinds of data: documents (drawn: page sizes around scanned A4 and letter, 3.87 questions a page, DocVQA's mean);
receipts (page sizes and lengths of answers of 626 public scans, ``receipt_pages.csv``, four questions a page); records
with 1 to 8 images and videos of 8 frames (drawn); and these with a third of plain texts of 200 to 3000 tokens.

Records are dealt to the ranks in three ways:

- dealt: one after the other in the epoch's order, equally many to each, as a distributed sampler does;
- tokens: the plan's assignment by tokens alone;
- work: as training does.

Padded rows are made of a step's records sorted by length; ``drawn`` is the work of rows of records as they were drawn,
over that of these.

``bound`` is what no assignment of these rows or groups goes below: the mean, the largest, and for each k the smallest
k + 1 of the k·ranks + 1 largest, as some rank has so many of them.
"""

from __future__ import annotations

import argparse
import csv
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bench_result import ROOT, write_between_marks, write_result
from phi3v.config import Packing
from phi3v.data.batches import BY_TOKENS, BatchPlan, Row, Step
from phi3v.data.lengths import RecordLengths
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.shape import ModelShape
from phi3v.processing.hd_transform import page_geometry

BEGIN, END = "<!-- balance: begin -->", "<!-- balance: end -->"
RANKS = (2, 8, 64)
SAMPLES = (8, 16)  # a rank in a step
STEPS = 20  # of the first epoch that are looked at
RECORDS = 40_000
PACKINGS: tuple[Packing, ...] = ("none", "samples", "shared-image")
PACK_TOKENS, SHARED_MAX, MICRO_BATCH = 8192, 8, 2
AROUND = 8  # tokens of roles and ends


def lengths_of(
    sizes: list[list[tuple[int, int]]], num_crops: int, page: Any, text: Any, answer: Any, *, shares: bool
) -> RecordLengths:
    """Of records: the sizes of each page's images, the page of each record, its question's and its answer's tokens."""
    known: dict[tuple[int, int], tuple[int, int]] = {}
    for size in {size for images in sizes for size in images}:
        geometry = page_geometry(*size, num_crops)
        known[size] = (geometry.num_img_tokens, geometry.num_distinct_crops)
    images = np.array([[sum(values) for values in zip(*(known[size] for size in own), strict=True)] for own in sizes])
    tokens, crops = images[page].T
    prefix = tokens + 5
    return RecordLengths(
        prefix + text + answer + AROUND,
        tokens,
        answer,
        crops,
        prefix if shares else 0 * prefix,
        page if shares else np.arange(len(page)),
    )


def documents(rng: np.random.Generator, count: int = RECORDS) -> RecordLengths:
    """Scanned pages of about 200 dpi, a few of them tables on their side, and questions with short answers."""
    questions = 1 + rng.poisson(2.87, count)
    page = np.repeat(np.arange(count), questions)[:count]
    pages = int(page.max()) + 1
    width = rng.normal(1700, 250, pages).clip(600, 2600).astype(int)
    upright = rng.normal(1.3, 0.12, pages).clip(0.9, 2.2)
    ratio = np.where(rng.random(pages) < 0.12, rng.uniform(0.6, 0.9, pages), upright)
    sizes = [[(int(w), int(w * r))] for w, r in zip(width, ratio, strict=True)]
    text, answer = (rng.lognormal(np.log(mean), 0.5, count).astype(int) + 2 for mean in (12, 5))
    return lengths_of(sizes, 16, page, text, answer, shares=True)


def receipts(rng: np.random.Generator, count: int = RECORDS) -> RecordLengths:
    """The scans as often as it takes, about other images each time."""
    with (Path(__file__).parent / "receipt_pages.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    questions = [int(row["questions"]) for row in rows]
    page = np.repeat(np.arange(len(rows)), questions)
    sizes = [[(int(row["width"]), int(row["height"]))] for row in rows]
    mean = np.array([int(row["answer_characters"]) / 4 / int(row["questions"]) for row in rows])[page]
    text = rng.integers(8, 20, len(page))
    lengths = lengths_of(sizes, 16, page, text, mean.astype(int) + 1, shares=True)
    return lengths.repeated(-(-count // len(lengths)))


def mixed(rng: np.random.Generator, count: int = RECORDS) -> RecordLengths:
    """Half one image, a third 2 to 8, the rest videos of 8 frames; each with a question of its own."""
    kinds = rng.random(count)
    numbers = np.where(kinds < 0.5, 1, np.where(kinds < 0.83, rng.integers(2, 9, count), 8))
    shapes = [(640, 480), (480, 640), (1024, 768), (1000, 400), (336, 336)]
    sizes = [
        [(320, 240)] * 8 if kind >= 0.83 else [shapes[k] for k in rng.integers(0, len(shapes), number)]
        for kind, number in zip(kinds, numbers, strict=True)
    ]
    text, answer = rng.integers(10, 120, count), rng.lognormal(np.log(30), 1.0, count).astype(int) + 2
    return lengths_of(sizes, 4, np.arange(count), text, answer, shares=False)


def with_texts(rng: np.random.Generator, count: int = RECORDS) -> RecordLengths:
    """`mixed`, and plain texts in place of a third of it."""
    lengths, plain = mixed(rng, count), rng.random(count) < 1 / 3
    tokens = np.where(plain, rng.integers(200, 3000, count), lengths.tokens)
    images, crops = (np.where(plain, 0, values) for values in (lengths.image_tokens, lengths.crops))
    return RecordLengths(tokens, images, lengths.targets, crops, lengths.prefix, lengths.page)


DATA = {"documents": documents, "receipts": receipts, "images and videos": mixed, "with texts": with_texts}


def bound(items: list[float], ranks: int) -> float:
    """The least that the most of a rank can be, over the mean."""
    ordered = np.sort(items)[::-1]
    mean = ordered.sum() / ranks
    least = max(mean, ordered[0])
    for k in range(1, (len(ordered) - 1) // ranks + 1):
        least = max(least, ordered[k * ranks - k : k * ranks + 1].sum())
    return float(least / mean)


def items_of(plan: BatchPlan, step: Step) -> list[Row]:
    """What is assigned as a whole: padded rows, or the groups of packed ones."""
    rows = [row for rows in step for row in rows]
    return rows if not plan.is_packed else [(group,) for row in rows for group in row]


def figures(lengths: RecordLengths, packing: Packing, ranks: int, samples: int, costs: Any) -> dict[str, float]:
    """Means over the first steps; ``work_p95`` of the worst of them, ``rows``: where ranks meet in every row."""
    plans = [
        BatchPlan(
            lengths,
            packing,
            batch_size=ranks * samples,
            micro_batch_size=MICRO_BATCH if packing == "none" else 1,
            pack_tokens=PACK_TOKENS,
            shared_image_max=SHARED_MAX,
            world_size=world,
            costs=by,
        )
        for world, by in ((1, costs), (ranks, BY_TOKENS), (ranks, costs))
    ]
    alone, _, by_work = plans
    places = {index: at for at, index in enumerate(alone.chunks(0).records.tolist())}
    names = ("dealt", "tokens", "work", "bound", "rows", "groups", *(("drawn",) if packing == "none" else ()))
    kept: dict[str, list[float]] = {name: [] for name in names}
    numbers = islice(zip(*(plan.steps(0) for plan in plans), by_work.steps(0, equal=True), strict=True), STEPS)
    for one, tokens, work, equal in numbers:
        # In the order of the epoch: a page comes where the first of its records does.
        items = items_of(alone, one)
        items.sort(key=lambda item: places[item[0][0]])
        dealt = [items[rank::ranks] for rank in range(ranks)]
        for name, step in (("dealt", dealt), ("tokens", tokens), ("work", work)):
            loads = [sum(map(by_work.work, rows)) for rows in step]
            kept[name].append(max(loads) / (sum(loads) / ranks))
        kept["bound"].append(bound([by_work.work(item) for item in items], ranks))
        kept["groups"].append(len(items) / ranks)
        if packing == "none":
            records = sorted((index for item in items for (index,) in item), key=places.__getitem__)
            starts = range(0, len(records), MICRO_BATCH)
            drawn = [tuple((index,) for index in records[at : at + MICRO_BATCH]) for at in starts]
            kept["drawn"].append(sum(map(by_work.work, drawn)) / sum(map(by_work.work, items)))
        loads = [[by_work.work(row) for row in rows] for rows in equal]
        height = max(map(len, loads))
        at_once = [max(own[place] if place < len(own) else 0.0 for own in loads) for place in range(height)]
        kept["rows"].append(sum(at_once) / (sum(map(sum, loads)) / ranks))
    means = {name: round(float(np.mean(values)), 3) for name, values in kept.items()}
    return means | {"work_p95": round(float(np.percentile(kept["work"], 95)), 3)}


def measure() -> list[dict[str, Any]]:
    """Steps of a small model on one thread beside their modelled work, both as ratios to the first."""
    import torch

    from phi3v.model.modeling import Phi3VForCausalLM

    torch.set_num_threads(1)
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4}
    config = Phi3VConfig(
        vocab_size=32064,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        clip_vision_config=vision | {"image_size": 336, "patch_size": 14, "projection_dim": 128},
        attn_implementation="packed_segments",
    )
    torch.manual_seed(0)
    model = Phi3VForCausalLM(config).train()
    costs = ModelShape.of(config).training_costs()
    # (images of 336 x 336, which are a crop and 313 tokens each), tokens of the prefix beside, branches
    shapes: list[tuple[int, int, tuple[int, ...]]] = [
        (0, 0, (1024,)),
        (0, 0, (3072,)),
        (3, 5, (80,)),
        (1, 5, (700,)),
        (6, 5, (60,)),
        (2, 5, (100,) * 8),
        (0, 600, (60,) * 8),
    ]
    found = []
    for images, before, branches in shapes:
        prefix = images * 313 + before
        tokens = prefix + sum(branches)
        ids = torch.randint(1000, 30000, (1, tokens))
        ids[0, : images * 313] = -1
        labels = torch.full_like(ids, -100)
        ends = np.cumsum([prefix, *branches])[1:]
        for end in ends:
            labels[0, end - 10 : end] = ids[0, end - 10 : end]
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "labels": labels,
            "layout": ((prefix if len(branches) > 1 or images else 0, *branches),) if prefix else ((0, *branches),),
            "image_positions": torch.arange(images * 313),
            "target_positions": (labels[0] != -100).nonzero()[:, 0].tolist(),
            "logits_to_keep": None,
        }
        if images:
            inputs["pages"] = torch.randint(0, 255, (images * 336 * 336, 3), dtype=torch.uint8)
            inputs["image_sizes"] = ((336, 336),) * images
            inputs["page_index"] = tuple(range(images))
        below = np.array(branches)
        work = costs.of(
            tokens=tokens,
            pairs=float(prefix**2 + 2 * prefix * below.sum() + (below**2).sum()),
            crops=images,
            image_tokens=images * 313,
            targets=10 * len(branches),
        )
        times = []
        for _ in range(4):
            start = time.process_time()
            model(**inputs).loss.backward()
            times.append(time.process_time() - start)
            model.zero_grad()
        found.append((work, min(times)))
    return [
        {
            "images": images,
            "prefix": images * 313 + before,
            "branches": list(branches),
            "modelled": round(work / found[0][0], 2),
            "measured": round(seconds / found[0][1], 2),
        }
        for (images, before, branches), (work, seconds) in zip(shapes, found, strict=True)
    ]


def markdown(result: dict[str, Any]) -> str:
    """The tables of docs/scaling.md: of the most ranks, where it is hardest."""
    columns = ("dealt", "tokens", "work", "bound", "rows")
    lines = [
        "| data | packing | samples a rank | dealt | by tokens | by work | bound | in every row | padded as drawn |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        if case["ranks"] != RANKS[-1]:
            continue  # the result has them
        values = " | ".join(f"{case[name]:.2f}" for name in columns)
        drawn = f"{case['drawn']:.2f}" if "drawn" in case else ""
        lines.append(f"| {case['data']} | `{case['packing']}` | {case['samples']} | {values} | {drawn} |")
    lines += ["", "Steps of a small model, as ratios to the first:", ""]
    lines += ["| images | prefix | branches | modelled | measured |", "|---|---|---|---|---|"]
    for shape in result["measured"]:
        branches = f"{len(shape['branches'])} of {shape['branches'][0]}"
        ratios = f"{shape['modelled']:.2f} | {shape['measured']:.2f}"
        lines.append(f"| {shape['images']} | {shape['prefix']} | {branches} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/balance.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/scaling.md")
    arguments = parser.parse_args()
    costs = ModelShape.of(Phi3VConfig()).training_costs()
    cases = []
    for data, make in DATA.items():
        lengths = make(np.random.default_rng(0))
        for packing in PACKINGS:
            if packing == "shared-image" and not lengths.prefix.any():
                continue  # nothing is shared: as `samples`
            for ranks in RANKS:
                for samples in SAMPLES:
                    found = figures(lengths, packing, ranks, samples, costs)
                    cases.append({"data": data, "packing": packing, "ranks": ranks, "samples": samples, **found})
                    print(cases[-1], flush=True)
    settings = {"steps": STEPS, "pack_tokens": PACK_TOKENS, "shared_image_max": SHARED_MAX}
    settings["micro_batch_size"] = MICRO_BATCH
    result = write_result("balance", {"settings": settings, "cases": cases, "measured": measure()}, arguments.out)
    write_between_marks(arguments.docs, (BEGIN, END), markdown(result))


if __name__ == "__main__":
    main()
