"""How much faster evaluation is than answering one question at a time, with the same answers.

    make quickstart && python benchmarks/evaluation.py [--questions 300]

Both ways answer the same questions with the same model in one run: the library's ``generate`` on one sample after the
other, as the public recipe does, and ours in batches of like length with each page read once.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import GenerationConfig

from bench_result import ROOT, write_result
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.config import EvaluationConfig
from phi3v.data.collate import QuestionDataset
from phi3v.data.images import load_image
from phi3v.data.table import open_table
from phi3v.evaluate.decoding import decode_answer, stop_token_ids
from phi3v.evaluate.evaluation import evaluate


def one_by_one(
    model: Phi3VForCausalLM, processor: Phi3VProcessor, questions: QuestionDataset, max_new_tokens: int
) -> list[str]:
    """The answers, one ``generate`` a question."""
    stops = stop_token_ids(processor)
    pad = processor.tokenizer.pad_token_id
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad)
    answers = []
    with torch.inference_mode():
        for index in range(len(questions)):
            names = questions.question(index).images
            pictures = [load_image(name, root=questions.table.images_root) for name in names]
            counts = processor.image_processor.calc_num_image_tokens(pictures)
            inputs = {"input_ids": torch.tensor([questions.prompt(index, counts)])}
            pixels = processor.image_processor(pictures)
            inputs |= {name: pixels[name] for name in ("pixel_values", "image_sizes")}
            output = model.generate(**inputs, generation_config=settings)
            answers.append(decode_answer(processor, output[0, inputs["input_ids"].shape[1] :].tolist(), stops))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "quickstart" / "run" / "final")
    parser.add_argument("--data", type=Path, default=ROOT / "quickstart" / "data" / "test.jsonl")
    parser.add_argument("--questions", type=int, default=1000, help="the first so many of the file")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="as the public recipe")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "evaluation.json")
    arguments = parser.parse_args()
    model = Phi3VForCausalLM.from_pretrained(arguments.model).eval()
    processor = Phi3VProcessor.from_pretrained(arguments.model)
    questions = QuestionDataset(open_table(arguments.data), processor)
    questions.index = questions.index[: arguments.questions]

    began = time.perf_counter()
    single = one_by_one(model, processor, questions, arguments.max_new_tokens)
    seconds_single = time.perf_counter() - began
    config = EvaluationConfig(batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens)
    result = evaluate(model, processor, questions, config)
    together = [answer.text for answer in result.generated]
    figures = {
        "questions": len(questions),
        "pages": len({questions.question(index).images for index in range(len(questions))}),
        "batch_size": arguments.batch_size,
        "max_new_tokens": arguments.max_new_tokens,
        "one_by_one_questions_per_second": round(len(questions) / seconds_single, 2),
        "questions_per_second": round(len(questions) / result.seconds, 2),
        "times_faster": round(seconds_single / result.seconds, 2),
        "same_answers": sum(a == b for a, b in zip(single, together, strict=True)),
        "accuracy": result.primary.value,
    }
    print(json.dumps(write_result("evaluation", figures, arguments.out), indent=2))


if __name__ == "__main__":
    main()
