"""What sharing saves in learning from preferences: pairs a second, and the memory of the reference.

    python benchmarks/preference.py                        # the tiny model, on one thread; and a trace at full size
    python benchmarks/preference.py --rounds 1 --batch-size 2 --trace false    # small, to see that it works

Variants of the same optimizer steps of DPO, full fine-tuning, on the same pairs:

- ``separate``: each answer in a row of its own, padded together, and the image encoded for each, as other trainers do;
- ``padded``: the same rows, the image encoded once (``data.packing: none``);
- ``samples``: both answers are branches below page and prompt (``data.packing: samples``);
- ``shared-image``: so are the pairs of other questions about the page (``data.packing: shared-image``).

Pages are drawn in the sizes of public scans of receipts, at num_crops 16, as for ``benchmarks/packing.py``; one pair a
page, and four. The variants take turns for ``--rounds`` rounds, each with an optimizer step; reading is part of it. A
second is CPU time on one thread. Ratios are medians over the rounds, beside their smallest and largest. That the losses
of all are one is checked before.

The trace runs the model of 4.1 billion parameters on torch's fake tensors (see ``benchmarks/plan_trace.py``): the
reference's forward pass and a training step, on a row of a pair about one page of 4 x 4 crops.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

import packing
from bench_result import ROOT, write_result
from phi3v.bench.counting import clock_seconds, one_thread, timed_by
from phi3v.config import LoraConfig, MethodConfig, ObjectiveConfig, RunConfig
from phi3v.data.batches import BatchPlan, RowPlan
from phi3v.data.collate import Page, pack_row
from phi3v.data.lengths import measure_table
from phi3v.data.preferences import AnswerSample, Preferences, lengths_at
from phi3v.data.rows import RowDataset
from phi3v.data.table import RecordTable, open_table
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.presets import init_model, planned_config
from phi3v.model.shape import ModelShape
from phi3v.plan.inputs import TrainSetup
from phi3v.plan.memory import predict_memory
from phi3v.plan.parameters import count_parameters, meta_model
from phi3v.processing.hd_transform import CROP_SIZE, num_distinct_crops, num_img_tokens
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.compute.activations import MicroBatch
from phi3v.train.methods.optimizers import make_optimizer
from phi3v.train.objectives import PreferenceObjective
from plan_trace import GIB, LiveMemory, layer_norm_in_float32, make_model, tensors_of

VARIANTS = {"separate": "none", "padded": "none", "samples": "samples", "shared-image": "shared-image"}
OBJECTIVE = ObjectiveConfig(name="dpo")
PACK_TOKENS = 8192
PROMPT, ANSWER = 60, 16  # tokens beside the page, and of each answer, of the traced pair


def write_pairs(folder: Path, batch: int, pairs_of_page: int) -> Path:
    """So many records; each rejects the answer of another."""
    file = packing.receipts_data(folder, 4 * batch // pairs_of_page, 0).file
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [line for number, line in enumerate(lines) if number % 4 < pairs_of_page][:batch]
    answers = [line["conversations"][0]["assistant"] for line in lines]
    random.Random(0).shuffle(answers)
    for line, answer in zip(lines, answers, strict=True):
        turn = line["conversations"][0]
        turn["rejected"] = answer if answer != turn["assistant"] else answer[::-1]
    out = file.with_name(f"pairs-{pairs_of_page}.jsonl")
    out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return out


class Stepper:
    """Steps of one variant over all records, from the same weights as the others."""

    def __init__(self, variant: str, model_dir: Path, table: RecordTable) -> None:
        self.variant = variant
        self.packing = VARIANTS[variant]
        processor = Phi3VProcessor.from_pretrained(model_dir, num_crops=16)
        attention = "sdpa" if self.packing == "none" else "packed_segments"
        self.model = Phi3VForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation=attention
        ).train()
        self.optimizer = make_optimizer(self.model, RunConfig(), fused=True)
        self.objective = PreferenceObjective(OBJECTIVE)
        preferences = Preferences(table, OBJECTIVE)
        preferences.reference = torch.full((preferences.starts[-1],), -20.0)
        self.dataset = RowDataset(table, processor, packed=self.packing != "none", preferences=preferences)
        plan = BatchPlan(
            lengths_at(measure_table(table, processor), OBJECTIVE, 16),
            self.packing,  # type: ignore[arg-type]
            batch_size=len(table),
            pack_tokens=PACK_TOKENS,
            shared_image_max=8,
        )
        ((self.rows,),) = plan.steps(0)
        self.tokens = 0

    def inputs(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            made = self.dataset[RowPlan(row, ends_step=False)]
            self.tokens += made.pop("counts").tokens
            del made["ends_step"]
            if self.variant == "separate":  # an image for each answer
                copies = len(made["page_index"]) // len(made["image_sizes"])
                made["pages"] = torch.cat([made["pages"]] * copies)
                made["image_sizes"] *= copies
                made["page_index"] = tuple(range(len(made["page_index"])))
            yield made

    def step(self) -> float:
        """One optimizer step; gives its loss."""
        total, self.tokens = 0.0, 0
        for row in self.inputs():
            loss, _ = self.objective.loss(lambda inputs: self.model(**inputs), row, len(self.dataset))
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def measure(model_dir: Path, file: Path, rounds: int) -> dict[str, Any]:
    table = open_table(file, progress=False)
    steppers = {name: Stepper(name, model_dir, table) for name in VARIANTS}
    losses = {name: stepper.step() for name, stepper in steppers.items()}  # which also warms up
    worst = max(abs(loss / losses["separate"] - 1) for loss in losses.values())
    assert worst < 1e-5, losses  # float32
    speeds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            began = clock_seconds()
            stepper.step()
            speeds[name].append(len(table) / (clock_seconds() - began))
            print(f"{name}: {speeds[name][-1]:.3f} pairs/s", flush=True)
    figures: dict[str, Any] = {"pairs": len(table), "pages": packing.pages_of(table), "first_losses_differ_by": worst}
    for name, own in speeds.items():
        figures[name] = {
            "pairs_per_second": round(statistics.median(own), 3),
            "pairs_per_second_range": [round(min(own), 3), round(max(own), 3)],
            "tokens_per_pair": round(steppers[name].tokens / len(table), 1),
        }
    for name in ("samples", "shared-image"):
        for base in ("separate", "padded"):
            over = [ours / theirs for ours, theirs in zip(speeds[name], speeds[base], strict=True)]
            key = f"{name.replace('-', '_')}_over_{base}"
            figures[key] = round(statistics.median(over), 2)
            figures[f"{key}_range"] = [round(min(over), 2), round(max(over), 2)]
    return figures


def traced_row() -> tuple[dict[str, Any], MicroBatch]:
    """A pair about a page of 4 x 4 crops as a packed row, and what the planner knows of it."""
    size = (4 * CROP_SIZE, 4 * CROP_SIZE)
    image = num_img_tokens(4, 4)
    page = Page("page", size, torch.empty(*size, 3, dtype=torch.uint8))
    prompt = [1, *[-1] * image, *range(5, 5 + PROMPT)]
    samples = [
        AnswerSample(
            prompt + [100 + place] * ANSWER,
            [-100] * len(prompt) + [100 + place] * ANSWER,
            [page],
            1,
            0,
            "rejected" if place else "chosen",
            place,
        )
        for place in range(2)
    ]
    preferences = Preferences.__new__(Preferences)  # of no table
    preferences.objective, preferences.reference, preferences.starts = OBJECTIVE, torch.zeros(2), [0, 2]
    row = preferences.complete(pack_row([samples]), samples)
    del row["counts"]
    tokens = row["input_ids"].numel()
    own = tokens - len(prompt) + 1
    return row, MicroBatch(1, tokens, image, num_distinct_crops(4, 4), 2 * ANSWER, own * tokens)


def trace(method: MethodConfig) -> dict[str, float]:
    """GiB at full size of the reference's forward pass, and of an optimizer step that is not the first."""
    config, _ = planned_config("microsoft/Phi-3.5-vision-instruct")
    config._attn_implementation = "packed_segments"
    row, micro = traced_row()
    run, model = RunConfig(method=method), meta_model(config, method, "bf16")
    objective = PreferenceObjective(OBJECTIVE)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = make_model(model, method, "full")
        inputs = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in row.items()}
        held = [*model.parameters(), *model.buffers(), *tensors_of(inputs)]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in held)

        def forward(given: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return model(**given)

        memory = LiveMemory(held)
        with layer_norm_in_float32(), memory, torch.no_grad():
            model.eval()
            objective.answers(forward, inputs, at_start=True)
        reference = memory.peak
        model.train()
        optimizer = make_optimizer(model, run, fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        memory = LiveMemory([*held, *states])
        with layer_norm_in_float32(), memory:
            loss, _ = objective.loss(forward, inputs, 1.0)
            loss.backward()
            optimizer.step()
    setup = TrainSetup(method=method, checkpointing="full", accumulates=False, packing="samples")
    planned = predict_memory(ModelShape.of(config), count_parameters(config, method, "bf16"), setup, micro, cpu=False)
    predicted = sum(size for name, size in planned.parts.items() if name != "overhead")
    second = sum(p.numel() * (2 if method.uses_adapters else 4) for p in model.parameters())
    return {
        "model_gib": round(weights / GIB, 3),
        "reference_pass_gib": round(reference / GIB, 3),
        "training_step_gib": round(memory.peak / GIB, 3),
        "training_step_predicted_gib": round(predicted / GIB, 3),
        "a_second_model_would_be_gib": round(second / GIB, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every variant")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs of an optimizer step")
    parser.add_argument("--trace", choices=("true", "false"), default="true", help="also trace memory at full size")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "preference.json")
    given = parser.parse_args()
    figures: dict[str, Any] = {"timed_by": timed_by(), "num_crops": 16, "rounds": given.rounds}
    with tempfile.TemporaryDirectory() as name, one_thread():
        folder = Path(name)
        init_model("tiny", folder / "model")
        for count in (1, 4):
            file = write_pairs(folder / str(count), given.batch_size, count)
            figures[f"{count} a page"] = measure(folder / "model", file, given.rounds)
    if given.trace == "true":
        methods = (MethodConfig(name="lora", lora=LoraConfig(rank=32)), MethodConfig(name="full"))
        figures["memory"] = {method.name: trace(method) for method in methods}
    print(json.dumps(write_result("preference", figures, given.out), indent=2))


if __name__ == "__main__":
    main()
