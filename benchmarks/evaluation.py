"""How much faster ``phi3v eval`` is than one question at a time, with the same answers.

    python benchmarks/evaluation.py [--model DIR] [--questions 400] [--batch-size 32] [--out FILE.json]

Answers the same easy-vqa test questions twice in one process: one at a time through the library's ``generate``, as the
public recipe's scripts do, and by our evaluation. Without ``--model`` the tiny model is made and trained for
``--steps`` steps first, so that its answers end. Both include reading and cutting the pictures. The two take turns,
three times each, and the fastest counts, so that a busy moment of the machine does not.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_result import RESULTS, ROOT, measured_on, phi3v, write_result
from transformers import GenerationConfig

from phi3v.data.collate import Collator, QuestionDataset
from phi3v.data.sources.easy_vqa import convert_easy_vqa
from phi3v.data.table import open_table
from phi3v.evaluate.generate import decode_answer, generate_answers, stop_token_ids
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.run_folder import environment

WORK = ROOT / "output" / "benchmark-evaluation"
ROUNDS = 3
MAX_NEW_TOKENS = 8
BATCH_TOKENS = 32768


def trained_model(steps: int) -> Path:
    """The tiny model after a few steps on easy-vqa."""
    shutil.rmtree(WORK, ignore_errors=True)
    phi3v("model", "init", "--preset", "tiny", "--out", str(WORK / "model"))
    settings = {
        "model.path": WORK / "model",
        "data.train": WORK / "data" / "train.jsonl",
        "training.output_dir": WORK / "run",
        "training.max_steps": steps,
        "training.batch_size": 8,
        "training.micro_batch_size": 8,
        "training.learning_rate": 1e-3,
        "training.warmup_steps": 10,
        "training.gradient_checkpointing": "false",
        "training.loss_weighting": "token",
    }
    convert_easy_vqa(WORK / "data")
    phi3v("train", *(part for key, value in settings.items() for part in (f"--{key}", str(value))))
    return WORK / "run" / "final"


def one_at_a_time(model: Phi3VForCausalLM, questions: QuestionDataset) -> list[str]:
    """The baseline: each question is a batch of its own, from the pixels on."""
    processor = questions.processor
    stops = stop_token_ids(processor)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=stops, pad_token_id=stops[-1]
    )
    collate = Collator(processor.tokenizer.pad_token_id)
    answers = []
    with torch.inference_mode():
        for index in range(len(questions)):
            batch = collate([questions[index]])
            names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
            inputs = {name: batch[name].to(model.device) for name in names}
            ids = model.generate(**inputs, generation_config=settings)
            answers.append(decode_answer(processor, ids[0, inputs["input_ids"].shape[1] :].tolist(), stops))
    return answers


def ours(model: Phi3VForCausalLM, questions: QuestionDataset, batch_size: int) -> list[str]:
    """The evaluation of ``phi3v train`` and ``phi3v eval``."""
    answers = generate_answers(
        model,
        questions.processor,
        questions,
        batch_size=batch_size,
        batch_tokens=BATCH_TOKENS,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return [answer.text for answer in answers]


def timed(answer: Callable[[], list[str]]) -> tuple[float, list[str]]:
    start = time.perf_counter()
    answers = answer()
    return time.perf_counter() - start, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder (default: the tiny model, trained for --steps)")
    parser.add_argument("--steps", type=int, default=120, help="default: %(default)s")
    parser.add_argument("--questions", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluation.json")
    options = parser.parse_args()
    folder = options.model or trained_model(options.steps)
    convert_easy_vqa(WORK / "data")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Phi3VForCausalLM.from_pretrained(folder).to(device).eval()
    questions = QuestionDataset(open_table(WORK / "data" / "test.jsonl"), Phi3VProcessor.from_pretrained(folder))
    questions.index = questions.index[: options.questions]
    # The first answers pay for what happens once in a process.
    warm_up = QuestionDataset(questions.table, questions.processor, limit=4)
    one_at_a_time(model, warm_up)
    ours(model, warm_up, options.batch_size)
    slow, fast = [], []
    for _ in range(ROUNDS):
        seconds, expected = timed(lambda: one_at_a_time(model, questions))
        slow.append(seconds)
        seconds, given = timed(lambda: ours(model, questions, options.batch_size))
        fast.append(seconds)
        if given != expected:
            wrong = sum(a != b for a, b in zip(given, expected, strict=True))
            raise SystemExit(f"{wrong} of {len(expected)} answers differ")
    count = len(questions)
    figures = {
        "benchmark": "evaluation",
        **measured_on(environment()),
        "model": str(options.model) if options.model else f"tiny, {options.steps} steps on easy-vqa",
        "questions": count,
        "pictures": len({questions.question(index).images for index in range(count)}),
        "distinct_answers": len(set(given)),
        "batch_size": options.batch_size,
        "threads": torch.get_num_threads(),
        "one_at_a_time_questions_per_second": round(count / min(slow), 2),
        "ours_questions_per_second": round(count / min(fast), 2),
        "ratio": round(min(slow) / min(fast), 2),
        "same_predictions": True,
    }
    write_result(figures, options.out)


if __name__ == "__main__":
    main()
