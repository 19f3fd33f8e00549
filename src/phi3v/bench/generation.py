"""``phi3v bench generate``: evaluation in batches beside the library's ``generate`` on one question after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from phi3v.bench.counting import clock_seconds, one_thread, timed_by
from phi3v.config import EvaluationConfig
from phi3v.data.collate import QuestionDataset
from phi3v.data.images import load_image
from phi3v.data.table import open_table
from phi3v.evaluate.evaluation import evaluate
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.processing.conversation import decode_answer, stop_token_ids
from phi3v.processing.processor import Phi3VProcessor


def one_by_one(
    model: Phi3VForCausalLM, processor: Phi3VProcessor, questions: QuestionDataset, max_new_tokens: int
) -> list[str]:
    """The answers, one ``generate`` a question, as the public recipe evaluates."""
    stops = stop_token_ids(processor.backend_tokenizer)
    pad = processor.tokenizer.pad_token_id
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad)
    answers = []
    with torch.inference_mode():
        for index in range(len(questions)):
            names = questions.question(index).images
            images = [questions.table.of_image(load_image, name) for name in names]
            counts = processor.image_processor.calc_num_image_tokens(images)
            inputs = {"input_ids": torch.tensor([questions.prompt(index, counts)])}
            if images:
                pixels = processor.image_processor(images)
                inputs |= {"pixel_values": pixels["pixel_values"].to(model.dtype), "image_sizes": pixels["image_sizes"]}
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            output = model.generate(**inputs, generation_config=settings)
            answers.append(
                decode_answer(processor.backend_tokenizer, output[0, inputs["input_ids"].shape[1] :].tolist(), stops)
            )
    return answers


def bench_generate(
    model_path: Path,
    data: Path,
    *,
    questions: int,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    num_crops: int | None = None,
) -> dict[str, Any]:
    """Answer the first ``questions`` of a file in batches and one at a time, with the same model in one run.

    Returns:
        ``one_by_one_questions_per_second``, ``questions_per_second``, ``times_faster``; ``same_answers``, of
        ``questions``; ``accuracy`` of the batches; ``timed_by``, wall time or CPU time.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Phi3VForCausalLM.from_pretrained(model_path).to(device).eval()
    processor = Phi3VProcessor.from_pretrained(model_path, num_crops=num_crops)
    asked = QuestionDataset(open_table(data, progress=False), processor)
    asked.index = asked.index[:questions]

    config = EvaluationConfig(batch_size=batch_size, max_new_tokens=max_new_tokens)
    with one_thread(not torch.cuda.is_available()):
        began = clock_seconds()
        single = one_by_one(model, processor, asked, max_new_tokens)
        seconds_single = clock_seconds() - began
        began = clock_seconds()
        result = evaluate(model, processor, asked, config)
        seconds = clock_seconds() - began
    together = [answer.text for answer in result.generated]
    return {
        "questions": len(asked),
        "pages": len({asked.question(index).images for index in range(len(asked))}),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "one_by_one_questions_per_second": round(len(asked) / seconds_single, 2),
        "questions_per_second": round(len(asked) / seconds, 2),
        "times_faster": round(seconds_single / seconds, 2),
        "timed_by": timed_by(),
        "same_answers": sum(a == b for a, b in zip(single, together, strict=True)),
        "accuracy": result.primary.value,
    }
