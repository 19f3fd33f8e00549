"""Answering questions: greedy, batched, with a KV cache, each question on exactly one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset
from transformers import GenerationConfig

from phi3v.data.collate import Collator, QuestionDataset
from phi3v.processing.conversation import END, END_OF_TEXT
from phi3v.processing.processor import Phi3VProcessor


def stop_token_ids(processor: Phi3VProcessor) -> list[int]:
    """Generation ends at ``<|end|>`` and ``<|endoftext|>``, whatever generation_config.json says."""
    return [processor.tokenizer.convert_tokens_to_ids(token) for token in (END, END_OF_TEXT)]


def generate_answers(
    model: Any,
    processor: Phi3VProcessor,
    questions: QuestionDataset,
    *,
    batch_size: int,
    max_new_tokens: int,
    autocast_dtype: torch.dtype | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The model's answers in the order of ``questions``, on every rank.

    Args:
        autocast_dtype: compute in this dtype; by default in the model's own.
        on_batch: told how many questions were answered since the last call, on this rank.
    """
    stops = stop_token_ids(processor)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    mine = list(range(rank, len(questions), world_size))
    loader = DataLoader(
        Subset(questions, mine),
        batch_size=batch_size,
        collate_fn=Collator(processor.tokenizer.pad_token_id, padding_side="left"),
        num_workers=num_workers,
    )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    answers: list[str] = []
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else contextlib.nullcontext()
    with torch.inference_mode(), autocast:
        for batch in loader:
            inputs = {
                name: batch[name].to(device)
                for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes")
                if name in batch
            }
            output = model.generate(**inputs, generation_config=settings)
            new = output[:, inputs["input_ids"].shape[1] :]
            answers += [decode_answer(processor, row.tolist(), stops) for row in new]
            on_batch(len(new))
    model.train(was_training)
    if world_size == 1:
        return answers
    indexed = dict(gather_object(list(zip(mine, answers, strict=True))))
    return [indexed[index] for index in range(len(questions))]


def decode_answer(processor: Phi3VProcessor, ids: list[int], stops: list[int]) -> str:
    """The text of generated ``ids`` up to the first stop token."""
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return str(processor.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()
