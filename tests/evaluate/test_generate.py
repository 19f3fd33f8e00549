"""Batched answers: the same alone and together, ended where they should be."""

from __future__ import annotations

import itertools
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from phi3v.data.collate import QuestionDataset
from phi3v.data.images import load_image
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.evaluate.generate import Generated, generate_answers, sample_answers
from phi3v.evaluate.sampling import Sampling, TokenChooser
from phi3v.evaluate.streaming import stream_answer
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.processing.conversation import decode_answer, stop_token_ids
from phi3v.processing.processor import Phi3VProcessor

END_IN_TINY = 677  # <|end|> in the tiny tokenizer


@pytest.fixture
def questions(easy_vqa: Path, tiny_model_dir: Path) -> QuestionDataset:
    """Questions of different length, with one image, two and none."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (easy_vqa / "test.jsonl").read_text().splitlines()[:3]]
    lines[1]["conversations"][0]["images"] *= 2
    lines[2]["conversations"] = [
        {"user": "what is one and one?", "assistant": "two"},
        lines[2]["conversations"][0] | {"answers": ["blue", "teal"]},
    ]
    file = easy_vqa / "mixed.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return QuestionDataset(open_table(file), Phi3VProcessor.from_pretrained(tiny_model_dir))


def answer(model: Any, questions: QuestionDataset, batch_size: int, **settings: Any) -> list[Generated]:
    settings = {"batch_tokens": 10**6, "max_new_tokens": 6} | settings
    return generate_answers(model, questions.processor, questions, batch_size=batch_size, **settings)


def texts(answers: list[Generated]) -> list[str]:
    return [answer.text for answer in answers]


def loud_model(folder: Path, original_length: int | None = None) -> Phi3VForCausalLM:
    """A model whose random answers differ from question to question.

    Args:
        original_length: up to which the short rotary factors hold.
    """
    config = Phi3VConfig.from_pretrained(folder)
    if original_length is not None:
        config.original_max_position_embeddings = original_length
    torch.manual_seed(3)
    model = Phi3VForCausalLM.from_pretrained(folder, config=config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4.0  # new weights are too small for the images to tell in so narrow a model
        model.lm_head.weight.normal_()
        # Some tokens end an answer early, so that rows leave their batch at different steps.
        model.lm_head.weight[END_IN_TINY] *= 3.0
    return model


def official_pixels(questions: QuestionDataset, index: int) -> dict[str, torch.Tensor]:
    """``pixel_values`` and ``image_sizes`` of a question, as the official processor makes them."""
    names = questions.question(index).images
    images = [load_image(name, store=questions.table.images) for name in names]
    if not images:
        return {}
    features = questions.processor.image_processor(images)
    return {name: features[name] for name in ("pixel_values", "image_sizes")}


def library_answers(model: Any, questions: QuestionDataset, max_new_tokens: int) -> list[str]:
    """One question at a time through the library's ``generate``."""
    processor = questions.processor
    stops = stop_token_ids(processor.backend_tokenizer)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=stops[-1]
    )
    answers = []
    for index in range(len(questions)):
        inputs = {"input_ids": torch.tensor([questions[index].input_ids])} | official_pixels(questions, index)
        with torch.inference_mode():
            ids = model.eval().generate(**inputs, generation_config=settings)
        answers.append(
            decode_answer(processor.backend_tokenizer, ids[0, inputs["input_ids"].shape[1] :].tolist(), stops)
        )
    return answers


def test_answers_do_not_depend_on_the_batch(questions: QuestionDataset, tiny_model_dir: Path) -> None:
    model = loud_model(tiny_model_dir)
    expected = library_answers(model, questions, 6)
    assert len(set(expected)) > 1
    model.train()
    for batch_size in (1, 2, 4):
        assert texts(answer(model, questions, batch_size)) == expected
    assert texts(answer(model, questions, 4, batch_tokens=700)) == expected
    assert model.training  # as it was


def test_real_questions_are_answered_as_one_by_one(pages: QuestionDataset, tiny_model_dir: Path) -> None:
    model = loud_model(tiny_model_dir)
    pages.index = pages.index[:24]
    expected = library_answers(model, pages, 8)
    alone = answer(model, pages, 1, max_new_tokens=8, words=["yes", "no", "red"])
    assert texts(alone) == expected
    assert len(set(expected)) > 3
    assert len({len(text) for text in expected}) > 1
    for batch_size in (3, 8):
        together = answer(model, pages, batch_size, max_new_tokens=8, words=["yes", "no", "red"])
        assert texts(together) == expected
        for one, other in zip(alone, together, strict=True):
            # Float32 sums in another order; the loud head multiplies them.
            assert other.probabilities == pytest.approx(one.probabilities, abs=1e-4)


def test_every_image_is_computed_once_a_batch(pages: QuestionDataset, tiny_model_dir: Path) -> None:
    model = loud_model(tiny_model_dir)
    pages.index = pages.index[:16]
    distinct = len({pages.question(index).images for index in range(16)})
    seen: list[int] = []
    model.model.vision_embed_tokens.register_forward_hook(lambda module, args, output: seen.append(len(args[1])))
    answer(model, pages, 16, max_new_tokens=2)
    assert seen == [distinct]
    assert distinct < 4
    sampled(model, pages, list(range(16)), batch_size=48, max_new_tokens=2)
    assert seen == [distinct] * 2


def test_answers_cross_the_rotary_switch_as_in_the_library(pages: QuestionDataset, tiny_model_dir: Path) -> None:
    """The short factors hold up to a length that some prompts reach and some answers cross."""
    pages.index = pages.index[:12]
    lengths = sorted(len(pages[index].input_ids) for index in range(12))
    for start in (lengths[0], lengths[-1] + 3):
        model = loud_model(tiny_model_dir, start)
        assert model.config.long_context_start == start
        expected = library_answers(model, pages, 6)
        for batch_size in (1, 12):
            assert texts(answer(model, pages, batch_size)) == expected


def test_word_probabilities_are_those_of_whole_sequences(pages: QuestionDataset, tiny_model_dir: Path) -> None:
    model = loud_model(tiny_model_dir).eval()
    pages.index = pages.index[:5]
    words = ["yes", "no", "a long answer"]
    given = answer(model, pages, 4, words=words)
    tokenize = pages.processor.tokenize_text
    for index, got in enumerate(given):
        totals = []
        for word in words:
            ids = tokenize(word + "<|end|>")
            inputs = {"input_ids": torch.tensor([pages[index].input_ids + ids])} | official_pixels(pages, index)
            with torch.no_grad():
                logits = model(**inputs).logits[0].double()
            log_probabilities = logits[-len(ids) - 1 : -1].log_softmax(-1)
            totals.append(log_probabilities[range(len(ids)), ids].sum())
        expected = torch.stack(totals).softmax(0).tolist()
        assert got.probabilities == pytest.approx(expected, abs=1e-4)
        assert sum(got.probabilities) == pytest.approx(1.0)


def test_the_last_turn_sees_the_turns_before_it(questions: QuestionDataset) -> None:
    assert len(questions) == 4
    assert questions.question(2).id.endswith("#1")
    assert questions.question(3).references == ("blue", "teal")
    assert questions.question(2).images == ()
    assert len(questions.question(1).images) == 2
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
    calls: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    assert texts(answer(model, questions, 4)) == ["", "", "", ""]
    assert calls == [4]  # one step, and nothing after it


@pytest.mark.parametrize(("token", "cut"), [("<|end|>", False), ("<|endoftext|>", False), ("a", True)])
def test_an_answer_that_reaches_the_limit_before_its_end_is_cut(
    questions: QuestionDataset, tiny_model_dir: Path, token: str, cut: bool
) -> None:
    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir)
    number = questions.processor.tokenizer.convert_tokens_to_ids(token)
    model.lm_head.register_forward_hook(lambda module, args, output: force(output, number))
    for tokens in (1, 2):
        assert [one.cut for one in answer(model, questions, 4, max_new_tokens=tokens)] == [cut] * 4


def force(logits: torch.Tensor, token: int) -> torch.Tensor:
    forced = torch.full_like(logits, -1e9)
    forced[..., token] = 0.0
    return forced


def test_an_answer_ends_at_its_first_stop_token(tiny_model_dir: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    stops = stop_token_ids(processor.backend_tokenizer)
    assert len(set(stops)) == 2
    ids = processor.tokenize_text("yes<|end|>\n<|endoftext|>no")
    assert decode_answer(processor.backend_tokenizer, ids, stops) == "yes"


def test_a_limit_draws_the_same_questions_every_time(questions: QuestionDataset) -> None:
    drawn = [
        QuestionDataset(questions.table, questions.processor, limit=2, seed=seed).index.tolist() for seed in (0, 0, 5)
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 2
    assert sorted(drawn[0]) == drawn[0]


def with_end(stream: Generator[str, None, bool]) -> Generator[Any, None, None]:
    """What is streamed, and last what it returns."""
    yield (yield from stream)


def test_a_streamed_answer_grows_to_that_of_the_batch(pages: QuestionDataset, tiny_model_dir: Path) -> None:
    """Also where it crosses the length from which the long rotary factors hold."""
    pages.index = pages.index[:6]
    lengths = sorted(len(pages[index].input_ids) for index in range(6))
    for start in (4096, lengths[0], lengths[-1] + 3):
        model = loud_model(tiny_model_dir, start).eval()
        for index, expected in enumerate(answer(model, pages, 6)):
            *sights, is_whole = with_end(stream_answer(model, pages.processor, pages[index], max_new_tokens=6))
            assert is_whole is not expected.cut
            assert sights[-1] == expected.text
            assert all(later.startswith(sight) for sight, later in itertools.pairwise(sights))


def sampled(
    model: Any, questions: QuestionDataset, wanted: list[int], batch_size: int, seed: int = 0, **settings: Any
) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    sample_answers(
        model,
        questions.processor,
        questions,
        wanted,
        lambda answers: found.update({index: texts(of_question) for index, of_question in answers.items()}),
        batch_size=batch_size,
        sampling=Sampling(temperature=0.8, top_p=0.9, seed=seed),
        **{"count": 3, "batch_tokens": 10**6, "max_new_tokens": 6} | settings,
    )
    return found


@pytest.mark.parametrize("crossing", [False, True])
def test_what_is_drawn_depends_on_the_question_and_the_seed_alone(
    pages: QuestionDataset, tiny_model_dir: Path, crossing: bool
) -> None:
    """Also where answers cross the length from which the long rotary factors hold."""
    longest = max(len(pages[index].input_ids) for index in range(6))
    model = loud_model(tiny_model_dir, longest + 2 if crossing else None)
    together = sampled(model, pages, list(range(6)), batch_size=9)
    assert sampled(model, pages, list(range(6)), batch_size=1) == together
    assert sampled(model, pages, [4, 1], batch_size=6) == {index: together[index] for index in (4, 1)}
    shares = [sampled(model, pages, list(range(6)), batch_size=9, rank=rank, world_size=2) for rank in (0, 1)]
    assert shares[0] | shares[1] == together
    assert not shares[0].keys() & shares[1].keys()
    assert sampled(model, pages, list(range(6)), batch_size=9, seed=1) != together
    assert sum(len(set(of_question)) for of_question in together.values()) > 9  # of 18
    fewer = sampled(model, pages, [0], batch_size=9, count=2)
    assert fewer == {0: together[0][:2]}


def test_draws_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3]])).expand(4000, -1)
    names = [str(number) for number in range(len(logits))]
    drawn = TokenChooser(Sampling(temperature=1.0), names)(logits, range(len(logits)))
    shares = drawn.bincount(minlength=5) / len(drawn)
    # Five standard deviations of a share of 0.5 are 0.04.
    assert torch.allclose(shares, torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3]), atol=0.04)
    assert shares[[0, 2]].tolist() == [0, 0]
    nucleus = TokenChooser(Sampling(temperature=1.0, top_p=0.6), names)(logits, range(len(logits)))
    assert set(nucleus.tolist()) == {3, 4}
    assert TokenChooser(Sampling(), names)(logits[:2], [0, 1]).tolist() == [3, 3]
    with pytest.raises(UserError, match="not finite"):
        TokenChooser(Sampling(temperature=1.0), ["a"])(torch.full((1, 5), float("nan")), [0])
