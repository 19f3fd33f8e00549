"""The proof of a quantised export: rounding is told from faults, and what proves nothing is not taken for a proof."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phi3v.evaluate.decoding import TorchDecoder
from phi3v.export.divergence import (
    OWN,
    Divergence,
    Prompt,
    answer_prompts,
    bound_of,
    diverge,
    drawn_prompts,
    read_prompts,
    round_decoder,
    write_prompts,
)
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.presets import PRETRAINED_TINY
from phi3v.processing.conversation import stop_token_ids
from phi3v.processing.processor import Phi3VProcessor

LONG = ("a page of 4x4", "more than 4,096 tokens")  # these take as long as all others


class Reference:
    """The trained tiny base and what it answers to the drawn prompts."""

    def __init__(self) -> None:
        self.model = Phi3VForCausalLM.from_pretrained(PRETRAINED_TINY, dtype=torch.float32).eval()
        self.processor = Phi3VProcessor.from_pretrained(PRETRAINED_TINY)
        prompts = drawn_prompts(self.processor, self.model.config.long_context_start, 131_072)
        stops = stop_token_ids(self.processor.backend_tokenizer)
        answers, self.logits, self.speed = answer_prompts(TorchDecoder(self.model, self.processor), prompts, stops)
        self.prompts = [replace(prompt, answer=answer) for prompt, answer in zip(prompts, answers, strict=True)]
        self.quick = [prompt.kind for prompt in prompts if prompt.kind not in LONG]
        self.eight, self.four, self.control = (self.rounded(bits) for bits in (8, 4, 2))

    def rounded(self, bits: int) -> Divergence:
        model = copy.deepcopy(self.model)
        round_decoder(model, bits)
        return self.diverge(TorchDecoder(model, self.processor), *self.quick)

    def diverge(self, decoder: Any, *kinds: str) -> Divergence:
        chosen = [index for index, prompt in enumerate(self.prompts) if prompt.kind in kinds]
        prompts = [self.prompts[index] for index in chosen]
        return diverge(prompts, [self.logits[index] for index in chosen], answer_prompts(decoder, prompts)[1])


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def test_there_is_a_prompt_of_every_kind(reference: Reference) -> None:
    kinds = {prompt.kind: prompt for prompt in reference.prompts}
    assert list(kinds) == [
        *(f"a page of {grid}" for grid in ("1x1", "1x2", "2x1", "2x2", "4x4")),
        "two images",
        "text only",
        "more than 4,096 tokens",
        "an answer across 4,096 tokens",
    ]
    assert kinds["a page of 2x1"].pages[0].shape == (672, 336, 3)
    assert len(kinds["more than 4,096 tokens"].input_ids) > 4096
    crossing = kinds["an answer across 4,096 tokens"]
    assert len(crossing.input_ids) <= 4096 < len(crossing.input_ids) + len(crossing.answer) - 1
    assert all(len(prompt.answer) > 1 for prompt in reference.prompts)  # so that the cache is used
    assert reference.speed.prompt_tokens == sum(len(prompt.input_ids) for prompt in reference.prompts)


def test_finer_rounding_is_nearer_and_the_control_fails_every_bound(reference: Reference) -> None:
    eight, four, control = reference.eight, reference.four, reference.control
    assert 0 < eight.mean < four.mean < control.mean
    assert eight.fault(bound_of(8, control)) is None
    assert four.fault(bound_of(4, control)) is None
    assert four.fault(bound_of(8, control)) is not None
    assert control.fault(bound_of(4, control)) is not None
    same = reference.diverge(TorchDecoder(reference.model, reference.processor), "a page of 1x2", "text only")
    assert same.mean < 1e-9  # order of sums


class Swapped(TorchDecoder):
    """Takes a page's rows for its columns, as programs that exchange height and width do."""

    def start(self, input_ids: list[int], pages: Sequence[Any]) -> Any:
        # The same number of crops, laid out as the other grid; only the tokens at the ends of rows are other ones.
        turned = [page.reshape(page.shape[1], page.shape[0], 3) for page in pages]
        counts = [len(page) // 336 * 12 - len(old) // 336 * 12 for page, old in zip(turned, pages, strict=True)]
        ids, number = [], 0
        for token in input_ids:
            if token < 0 and token != -number:
                number = -token
                ids += [token] * max(0, counts[number - 1])
                skip = max(0, -counts[number - 1])
            if token < 0 and skip:
                skip -= 1
                continue
            ids.append(token)
        return super().start(ids, turned)


class WithoutSecondImage(TorchDecoder):
    """Sees the first image in the place of all that have its size, and white ones elsewhere."""

    def start(self, input_ids: list[int], pages: Sequence[Any]) -> Any:
        return super().start(input_ids, [*pages[:1], *(np.full_like(page, 255) for page in pages[1:])])


class AlwaysShort(TorchDecoder):
    """Keeps LongRoPE's short factors whatever the length."""

    def __init__(self, model: Any, processor: Any) -> None:
        model = copy.deepcopy(model)
        model.config.original_max_position_embeddings = 131_072
        model.config.rope_parameters["original_max_position_embeddings"] = 131_072
        super().__init__(Phi3VForCausalLM(model.config).eval(), processor)
        self.model.load_state_dict(model.state_dict())


class OneBehind(TorchDecoder):
    """Forgets the token it is given, as a cache that is not written does."""

    def step(self, token: int) -> Any:
        return super().step(self._ids[-1])


@pytest.mark.parametrize(
    ("fault", "kind", "bits"),
    [
        (Swapped, "a page of 2x1", 8),
        (WithoutSecondImage, "two images", 8),  # the bounds of 4 bits are too wide for these two
        (AlwaysShort, "more than 4,096 tokens", 4),
        (AlwaysShort, "an answer across 4,096 tokens", 4),
        (OneBehind, "a page of 2x2", 4),
    ],
)
def test_a_fault_of_one_kind_is_seen(reference: Reference, fault: type[TorchDecoder], kind: str, bits: int) -> None:
    found = reference.diverge(fault(reference.model, reference.processor), kind)
    whole = replace(reference.eight, kinds=found.kinds)  # the other kinds are as they should be
    assert whole.fault(bound_of(bits, reference.control)) is not None


def test_what_is_no_number_is_a_fault() -> None:
    nothing = np.full((2, 5), np.nan, dtype=np.float32)
    even = np.zeros((2, 5), dtype=np.float32)
    found = diverge([Prompt(OWN, [1], [], [2, 3])], [even], [nothing])
    assert found.fault(1.0) is not None


def test_the_divergence_is_that_of_the_float_model_from_the_export() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    logits = [np.log(values)[None].astype(np.float32) for values in (p, q)]
    found = diverge([Prompt(OWN, [1], [], [0])], logits[:1], logits[1:])
    assert found.mean == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-6)  # logits rounded to float32
    assert found.same == 0.0
    assert found.kinds == {OWN: pytest.approx(found.mean)}


def test_prompts_are_read_as_they_were_written(tmp_path: Path, reference: Reference) -> None:
    prompts = reference.prompts[2:7]
    write_prompts(tmp_path, prompts)
    for before, after in zip(prompts, read_prompts(tmp_path), strict=True):
        assert (before.kind, before.input_ids, before.answer) == (after.kind, after.input_ids, after.answer)
        assert all((a == b).all() for a, b in zip(before.pages, after.pages, strict=True))
