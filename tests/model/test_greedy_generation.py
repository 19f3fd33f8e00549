"""Greedy continuations: identical to the reference, cached or not, alone or in a batch, across the LongRoPE switch.

Ids are compared exactly: in none of the cases are the two largest logits near one another at float32's resolution.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from model_inputs import Sample, pad_batch

from phi3v import Phi3VForCausalLM

NAMES = ("one_image", "two_images", "crossing_long_rope")


def continue_greedily(
    model: Any, inputs: dict[str, torch.Tensor], count: int, *, use_cache: bool = True
) -> torch.Tensor:
    """The ids that `generate` adds, or plain forward passes over everything so far."""
    prompt = inputs["input_ids"].shape[1]
    if use_cache:
        return model.generate(**inputs, max_new_tokens=count, do_sample=False)[:, prompt:]
    inputs = dict(inputs)
    for _ in range(count):
        with torch.no_grad():
            new = model(**inputs).logits[:, -1:].argmax(dim=-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    return inputs["input_ids"][:, prompt:]


class Calls:
    """Records how many positions the decoder ran at each call, and how many crops the tower."""

    def __init__(self, model: Any) -> None:
        self.lengths: list[int] = []
        self.crops: list[int] = []
        model.model.layers[0].register_forward_pre_hook(lambda _, args: self.lengths.append(args[0].shape[1]))
        model.model.vision_embed_tokens.img_processor.register_forward_pre_hook(
            lambda _, args: self.crops.append(args[0].shape[0])
        )


def case_of(cases: dict[str, Any], name: str) -> dict[str, Any]:
    (case,) = [c for c in cases["generate"] if c["name"] == name]
    return case


def test_every_case_is_covered(golden_cases: dict[str, Any]) -> None:
    assert tuple(case["name"] for case in golden_cases["generate"]) == NAMES


@dataclass
class Reference:
    """A case of the reference: the model that it ran, its prompt, and the ids that it continued with."""

    model: Any
    given: Sample
    new_ids: list[int]
    switch: int  # from how many tokens on LongRoPE's long factors hold


@pytest.fixture
def reference(
    name: str,
    golden_cases: dict[str, Any],
    golden_arrays: dict[str, torch.Tensor],
    load_golden: Any,
    sample: Any,
) -> Reference:
    case = case_of(golden_cases, name)
    given = sample("generate", name)
    assert given.length == case["prompt_length"]
    new_ids = golden_arrays[f"generate/{name}/new_ids"].tolist()
    assert len(new_ids) == case["max_new_tokens"]
    switch = case["original_max_position_embeddings"]
    return Reference(load_golden(original_max_position_embeddings=switch), given, new_ids, switch)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference(name: str, use_cache: bool, reference: Reference) -> None:
    calls = Calls(reference.model)
    count = len(reference.new_ids)
    new_ids = continue_greedily(reference.model, reference.given.inputs(), count, use_cache=use_cache)
    assert new_ids[0].tolist() == reference.new_ids

    prompt = reference.given.length
    if not use_cache:
        assert calls.lengths == list(range(prompt, prompt + count))
        return
    # Really cached: one token a call but for the prompt and, where the sample outgrows the short factors, one restart
    # over everything so far; the images are encoded once.
    lengths = [prompt] + [1] * (count - 1)
    restart = reference.switch + 1
    crossing = prompt < restart <= prompt + count - 1
    if crossing:
        lengths[restart - prompt] = restart
    assert calls.lengths == lengths
    assert crossing == (name == "crossing_long_rope")
    assert len(calls.crops) == 1


@pytest.mark.parametrize("drafts", ["looked up", "by a model"])
@pytest.mark.parametrize("name", NAMES)
def test_drafts_change_nothing(name: str, drafts: str, reference: Reference) -> None:
    """Also where they would cross the switch of LongRoPE."""
    model, given = reference.model, reference.given
    torch.manual_seed(0)
    other = Phi3VForCausalLM._from_config(model.config, dtype=torch.float32)
    options = {"assistant_model": other} if drafts == "by a model" else {"prompt_lookup_num_tokens": 4}
    ids = model.generate(**given.inputs(), max_new_tokens=len(reference.new_ids), do_sample=False, **options)
    assert ids[0, given.length :].tolist() == reference.new_ids


def test_batch_equals_each_alone(load_golden: Any, sample: Any) -> None:
    """Left-padded prompts of different lengths with one image, two images and none."""
    model = load_golden()
    samples = [sample("generate", "one_image"), sample("generate", "two_images"), sample("text")]
    together = continue_greedily(model, pad_batch(samples, "left"), 10)
    for row, alone in enumerate(samples):
        assert together[row].tolist() == continue_greedily(model, alone.inputs(), 10)[0].tolist(), row


@pytest.mark.parametrize("use_cache", [True, False])
def test_batch_where_one_row_crosses(use_cache: bool, load_golden: Any, sample: Any) -> None:
    """Each row switches to the long factors by its own length: one from the start, one midway, one never.

    The configuration is the reference's crossing case; the continuation of its row is the reference's too.
    """
    crossing = sample("generate", "crossing_long_rope")
    below = Sample(crossing.input_ids[:, -20:])
    assert below.input_ids.min() >= 0
    assert crossing.length == 341
    model = load_golden(original_max_position_embeddings=352)
    samples = [sample("generate", "one_image"), crossing, below, sample("text")]
    count = 20
    assert samples[0].length > 352 > crossing.length > 352 - count > samples[2].length + count
    calls = Calls(model)
    together = continue_greedily(model, pad_batch(samples, "left"), count, use_cache=use_cache)
    if use_cache:
        assert sorted(calls.lengths, reverse=True) == [785 + 12, 785] + [1] * (count - 2)
    for row, alone in enumerate(samples):
        expected = continue_greedily(model, alone.inputs(), count)[0].tolist()
        assert together[row].tolist() == expected, row


def test_two_rows_that_cross_at_different_steps(load_golden: Any, sample: Any) -> None:
    crossing = sample("generate", "crossing_long_rope")
    earlier = Sample(torch.cat([crossing.input_ids, torch.tensor([[5, 6, 7]])], 1), crossing.pixel_values)
    earlier.image_sizes = crossing.image_sizes
    model = load_golden(original_max_position_embeddings=352)
    samples = [crossing, earlier]
    together = continue_greedily(model, pad_batch(samples, "left"), 24)
    for row, alone in enumerate(samples):
        assert together[row].tolist() == continue_greedily(model, alone.inputs(), 24)[0].tolist(), row


def test_crossing_matters(load_golden: Any, sample: Any) -> None:
    """The switch changes the text, so the tests above would see a missing one."""
    given = sample("generate", "crossing_long_rope").inputs()
    short = continue_greedily(load_golden(original_max_position_embeddings=4096), given, 40)
    switched = continue_greedily(load_golden(original_max_position_embeddings=352), given, 40)
    assert short.tolist() != switched.tolist()


def test_text_only(load_golden: Any, sample: Any) -> None:
    model = load_golden()
    calls = Calls(model)
    given = sample("text").inputs()
    assert continue_greedily(model, given, 5).shape == (1, 5)
    assert calls.crops == []


@pytest.mark.parametrize("published", [None, {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 32000}])
def test_official_vocabulary_stops_at_its_end_tokens(
    published: dict[str, int] | None, golden: Path, tmp_path: Path
) -> None:
    """Whatever ``generation_config.json`` says; the published one stops at ``</s>``, which is never written."""
    config = json.loads((golden / "config.json").read_text()) | {"vocab_size": 32064}
    fresh = Phi3VForCausalLM(Phi3VForCausalLM.config_class(**config))
    assert fresh.generation_config.eos_token_id == [32007, 32000]
    fresh.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if published:
        (tmp_path / "generation_config.json").write_text(json.dumps(published))
    model = Phi3VForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == [32007, 32000]
    assert model.generation_config.pad_token_id == 32000

    # And it does stop: a head that only ever says <|end|>.
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[32007] = 1.0
        model.model.norm.weight.fill_(1.0)
        model.model.norm.register_forward_hook(lambda *_: torch.ones(1, 1, model.config.hidden_size))
    output = model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=5, do_sample=False)
    assert output[0].tolist() == [1, 5, 6, 32007]


def test_stop_tokens_of_the_tiny_model(tiny_model_dir: Path) -> None:
    from phi3v import Phi3VProcessor

    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = Phi3VProcessor.from_pretrained(tiny_model_dir).tokenizer
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == stops
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_path_with_dots(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my.model.v1"
    shutil.copytree(tiny_model_dir, folder)
    model = Phi3VForCausalLM.from_pretrained(str(folder))
    saved = tmp_path / "my.model.v2.final"
    model.save_pretrained(saved)
    assert Phi3VForCausalLM.from_pretrained(str(saved)).num_parameters() == model.num_parameters()
