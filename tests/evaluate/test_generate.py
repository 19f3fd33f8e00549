"""Batched answers: the same alone and together, ended where they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3v.data.collate import QuestionDataset
from phi3v.data.sources.easy_vqa import convert_easy_vqa
from phi3v.data.table import open_table
from phi3v.evaluate.generate import decode_answer, generate_answers, stop_token_ids
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.processing.processor import Phi3VProcessor


@pytest.fixture
def questions(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> QuestionDataset:
    """Questions of different length, with one picture, two and none."""
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    convert_easy_vqa(tmp_path, progress=False)
    lines: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()[:3]]
    lines[1]["conversations"][0]["images"] *= 2
    lines[2]["conversations"] = [
        {"user": "what is one and one?", "assistant": "two"},
        lines[2]["conversations"][0] | {"answers": ["blue", "teal"]},
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return QuestionDataset(open_table(file), Phi3VProcessor.from_pretrained(tiny_model_dir))


def answer(model: Any, questions: QuestionDataset, batch_size: int) -> list[str]:
    return generate_answers(model, questions.processor, questions, batch_size=batch_size, max_new_tokens=6)


def test_answers_do_not_depend_on_the_batch(questions: QuestionDataset, tiny_model_dir: Path) -> None:
    torch.manual_seed(3)
    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():  # a louder head, so that different questions get different answers
        model.lm_head.weight.normal_()
    model.train()
    alone = answer(model, questions, 1)
    assert len(set(alone)) > 1
    assert answer(model, questions, 2) == alone
    assert answer(model, questions, 4) == alone
    assert model.training  # as it was


def test_the_last_turn_sees_the_turns_before_it(questions: QuestionDataset) -> None:
    assert len(questions) == 4
    assert questions.question(2)[0].endswith("#1")
    assert questions.question(3)[2] == ("blue", "teal")
    text = questions.processor.tokenizer.decode([i for i in questions[3].input_ids if i >= 0])
    assert "one and one" in text
    assert "two<|end|>" in text
    assert text.endswith("<|assistant|>")
    assert "one and one" in questions.processor.tokenizer.decode([i for i in questions[2].input_ids if i >= 0])
    assert "two" not in questions.processor.tokenizer.decode(questions[2].input_ids)


def test_generation_stops_at_end_whatever_the_checkpoint_says(questions: QuestionDataset, tiny_model_dir: Path) -> None:
    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir)
    model.generation_config.eos_token_id = 2  # as the published generation_config.json has it
    end = questions.processor.tokenizer.convert_tokens_to_ids("<|end|>")
    model.lm_head.register_forward_hook(lambda module, args, output: force(output, end))
    lengths: list[int] = []
    generate = model.generate

    def spy(**kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = generate(**kwargs)
        lengths.append(output.shape[1] - kwargs["input_ids"].shape[1])
        return output

    model.generate = spy
    assert answer(model, questions, 4) == ["", "", "", ""]
    assert lengths == [1]


def force(logits: torch.Tensor, token: int) -> torch.Tensor:
    forced = torch.full_like(logits, -1e9)
    forced[..., token] = 0.0
    return forced


def test_an_answer_ends_at_its_first_stop_token(tiny_model_dir: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    stops = stop_token_ids(processor)
    assert len(set(stops)) == 2
    ids = processor.tokenize_text("yes<|end|>\n<|endoftext|>no")
    assert decode_answer(processor, ids, stops) == "yes"


def test_a_limit_draws_the_same_questions_every_time(questions: QuestionDataset) -> None:
    drawn = [
        QuestionDataset(questions.table, questions.processor, limit=2, seed=seed).index.tolist() for seed in (0, 0, 5)
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 2
    assert sorted(drawn[0]) == drawn[0]
