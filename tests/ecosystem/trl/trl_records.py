"""What the tests of all trainers share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.data.collate import Collator, PageReader, Sample, make_sample
from phi3v.data.schema import Record
from phi3v.data.table import RecordTable

LORA = LoraConfig(r=4, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
COLOURS = ("red", "green", "blue", "yellow")
SIZES = ((300, 300), (700, 300), (320, 900), (336, 336))


def turn(user: str, assistant: str, *images: int) -> dict[str, Any]:
    return {"images": [f"{COLOURS[index]}.png" for index in images], "user": user, "assistant": assistant}


RECORDS: list[dict[str, Any]] = [
    {"id": "one image", "conversations": [turn("Which colour is this?", "red", 0)]},
    {
        "id": "several turns",
        "system": "Answer in few words.",
        "conversations": [
            turn("Which colour is this?", "It is green, or so.", 1),
            turn("Sure?", "Yes."),
            turn("Warm or cold?", "Neither."),
        ],
    },
    {"id": "several images", "conversations": [turn("What are these?\nOne after the other!", "blue\nyellow", 2, 3)]},
    {
        "id": "images in later turns",
        "conversations": [turn("What is this?", "red", 0), turn("And these?", "blue, yellow, blue", 2, 3, 2)],
    },
    {"id": "no image", "conversations": [turn("Which colour is the sky?", "blue")]},
]


def settings(out: Path, **more: Any) -> dict[str, Any]:
    """Of a short run on the CPU; gradient checkpointing is TRL's default."""
    common = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return common | more


def last_answer(record: Record, answer: str | None = None) -> Record:
    """The record with its last answer, or ``answer`` in place of it, as the only target."""
    *before, last = record.turns
    context = [replace(each, weight=0) for each in before]
    return replace(record, turns=(*context, replace(last, assistant=last.assistant if answer is None else answer)))


def our_sample(table: RecordTable, record: Record, processor: Phi3VProcessor) -> Sample:
    return make_sample(PageReader(table, processor.image_processor), record, processor)


def our_loss(model_dir: Path, processor: Phi3VProcessor, samples: list[Sample]) -> float:
    """Of a batch, ``loss_weighting: token``."""
    model = Phi3VForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    batch = Collator(processor.tokenizer.pad_token_id, "token")(samples)
    del batch["counts"]
    with torch.no_grad():
        return float(model(**batch).loss)


def as_theirs(sample: Sample, processor: Phi3VProcessor) -> list[int]:
    """Our tokens with transformers' id of images in place of the numbered ones."""
    return [processor.image_token_id if token < 0 else token for token in sample.input_ids]
