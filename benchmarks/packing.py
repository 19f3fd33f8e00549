"""How much faster packing trains: questions a second of four ways to take the same records, in one run on one machine.

    python benchmarks/packing.py                      # all of it; the tiny model, on this machine's device
    python benchmarks/packing.py --steps 1 --batch-size 8 --pages 4 --seconds 20   # a small run, to see that it works
    python benchmarks/packing.py --attention          # only: what SDPA on packed rows costs, three ways

- ``recipe``: as the public recipe trains: one sample at a time, every picture padded to num_crops + 1 crops which all
  go through the tower, logits of every position, everything recomputed in the backward pass. Attention is eager, as
  in the recipe without flash attention, or as ``--recipe-attention`` says.
- ``padded``: our batches of records, padded to the longest, without recomputing.
- ``samples`` and ``shared-image``: packed rows (docs/packing.md).

Each way takes optimizer steps of the same number of questions with the real trainer; the first step is not counted.
A way is cut off after ``--seconds``, at the end of a step. Datasets: easy-vqa (9.6 questions a picture, 2 crops) and
the stand-in of DocVQA at num_crops=16 (4 questions a page, 17 crops).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

import tasks.docvqa
from bench_result import ROOT, write_result
from phi3v.config import Packing, RunConfig
from phi3v.data.collate import Collator, ConversationDataset
from phi3v.data.convert import ConvertOptions
from phi3v.data.packing import PackedDataset
from phi3v.data.sources import docvqa, easy_vqa
from phi3v.data.table import RecordTable, open_table
from phi3v.model.attention import MaskBackend, SegmentBackend, visible
from phi3v.model.presets import init_model
from phi3v.model.vision import Phi3VImageEmbedding
from phi3v.processing.conversation import IGNORE_INDEX
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.checkpointing import apply_checkpointing
from phi3v.train.device import choose_compute
from phi3v.train.engines import DataParallel
from phi3v.train.loading import inspect_model, load_for_training
from phi3v.train.progress import peak_memory_gb
from phi3v.train.setup import make_plan
from phi3v.train.trainer import Phi3VTrainer, training_arguments
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


class Clock(TrainerCallback):
    """The seconds of every step; asks for the end when they add up to ``limit``."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        control.should_training_stop = control.should_training_stop or sum(self.seconds) > self.limit


class RecipeTrainer(Phi3VTrainer):
    """The recipe's loss: logits of every position."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        names = ("input_ids", "attention_mask", "pages", "image_sizes", "page_index")
        logits = model(**{name: inputs[name] for name in names}, use_cache=False).logits
        targets = inputs["labels"][:, 1:]
        losses = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        loss = (losses * inputs["loss_weights"][:, 1:].flatten()).sum() / num_items_in_batch
        return (loss, logits) if return_outputs else loss


def run_padded_crops(model: Any, num_crops: int) -> None:
    """Pad every picture to ``num_crops`` + 1 crops and let the tower compute them all, as the recipe does."""
    embedding = next(module for module in model.modules() if isinstance(module, Phi3VImageEmbedding))
    for layer in embedding.img_processor.vision_model.encoder.layers:
        layer.self_attn.config._attn_implementation = model.config._attn_implementation
    plain = embedding.img_processor.forward

    def forward(crops: torch.Tensor) -> torch.Tensor:
        # One sample at a time, and so one picture here.
        blank = crops.new_zeros(num_crops + 1 - len(crops), *crops.shape[1:])
        features: torch.Tensor = plain(torch.cat([crops, blank]))
        return features[: len(crops)]

    embedding.img_processor.forward = forward  # type: ignore[method-assign]


def measure(
    way: str, data: Data, model_dir: Path, batch_size: int, steps: int, limit: float, recipe_attention: Any
) -> dict[str, Any]:
    """Questions a second of one way, and what else there is to know of it."""
    config = RunConfig()
    config.model.path, config.model.num_crops = str(model_dir), data.num_crops
    config.training.batch_size, config.training.max_steps = batch_size, steps + 1
    config.training.logging_steps = steps + 1
    packing: Packing = "samples" if way == "samples" else "shared-image" if way == "shared-image" else "none"
    config.data.packing, config.data.pack_tokens = packing, data.pack_tokens
    config.data.shared_image_max = 16
    if way == "recipe":
        config.model.attention = recipe_attention
    if way == "padded":
        config.training.micro_batch_size = data.micro_batch_size
    compute = choose_compute("auto")
    processor = Phi3VProcessor.from_pretrained(model_dir, num_crops=data.num_crops)
    table = open_table(data.file, progress=False)
    facts = inspect_model(config, compute)
    model = load_for_training(config, facts, compute)
    if way == "recipe":
        apply_checkpointing(model, "full")
        run_padded_crops(model, data.num_crops)
    plan = make_plan(config, compute, model, table, processor)
    dataset = ConversationDataset(table, processor) if plan is None else PackedDataset(table, processor)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            config,
            Path(folder),
            precision=compute.precision,
            use_cpu=compute.device.type == "cpu",
            accumulation=config.accumulation_steps(1),
            num_workers=0,
        )
        arguments.report_to = []
        trainer = (RecipeTrainer if way == "recipe" else Phi3VTrainer)(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=Collator(processor.tokenizer.pad_token_id),
            config=config,
            engine=DataParallel(0, 1),
            plan=plan,
        )
        clock = Clock(limit)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    counted = clock.seconds[1:] or clock.seconds
    questions = trainer.seen["questions"] / len(clock.seconds)
    return {
        "attention": facts.attention,
        "steps": len(counted),
        "questions_per_second": round(questions / statistics.median(counted), 3),
        "tokens_per_question": round(trainer.seen["tokens"] / trainer.seen["questions"], 1),
        "peak_memory_gb_so_far": round(peak_memory_gb(), 2),
    }


def easy_vqa_data(folder: Path, batch: int, steps: int) -> Data:
    files = easy_vqa.convert(ConvertOptions(folder / "easy-vqa", progress=False)).files
    # The test file has a record a question, as the recipe takes it; the training file has a conversation a picture.
    return Data("easy-vqa", _first(files["test"], batch * (steps + 1)), 1, 2048, 8)


def docvqa_data(folder: Path, pages: int) -> Data:
    tasks.docvqa.make(folder / "original", Sizes(train=pages, val=0, test=1), 0)
    options = ConvertOptions(folder / "docvqa", source=str(folder / "original"), progress=False)
    return Data("docvqa", docvqa.convert(options).files["train"], 16, 8192, 2)


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
    parser.add_argument("--batch-size", type=int, default=64, help="questions of an optimizer step")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--pages", type=int, default=96, help="pages of the stand-in of DocVQA, four questions each")
    parser.add_argument("--seconds", type=float, default=300, help="a way ends after so many, at the end of a step")
    parser.add_argument("--recipe-attention", choices=("eager", "sdpa", "flash_attention_2"), default="eager")
    parser.add_argument("--attention", action="store_true", help="compare ways to attend on the CPU, and end")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "packing.json")
    given = parser.parse_args()
    if given.attention:
        print(json.dumps(compare_attention(), indent=2))
        return
    figures: dict[str, Any] = {"batch_size": given.batch_size}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = given.model or folder / "model"
        if given.model is None:
            init_model("tiny", model)
        for wanted in given.data:
            if wanted == "easy-vqa":
                data = easy_vqa_data(folder, given.batch_size, given.steps)
            else:
                data = docvqa_data(folder, given.pages)
            table = open_table(data.file, progress=False)
            result: dict[str, Any] = {
                "questions": len(table),
                "pages": pages_of(table),
                "num_crops": data.num_crops,
                "pack_tokens": data.pack_tokens,
                "micro_batch_size_padded": data.micro_batch_size,
            }
            for way in given.ways:
                limits = (given.batch_size, given.steps, given.seconds)
                result[way] = measure(way, data, model, *limits, given.recipe_attention)
                print(f"{data.name} {way}: {json.dumps(result[way])}", flush=True)
            for base in ("recipe", "padded"):
                if {base, "shared-image"} <= result.keys():
                    ours, theirs = (result[way]["questions_per_second"] for way in ("shared-image", base))
                    result[f"shared_image_over_{base}"] = round(ours / theirs, 2)
            figures[data.name] = result
    print(json.dumps(write_result("packing", figures, given.out), indent=2))


if __name__ == "__main__":
    main()
