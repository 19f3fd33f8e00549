"""Answering one prompt, token by token, for a person who reads along."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from phi3v.data.collate import Sample
from phi3v.evaluate.batches import whole_prompts
from phi3v.evaluate.decoding import DecodingState, prefill
from phi3v.processing.conversation import UNFINISHED, decode_answer, stop_token_ids
from phi3v.processing.processor import Phi3VProcessor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest (greedy); higher ones draw more freely.
        top_p: draw from the likeliest tokens that have this probability together.
        seed: of the draws; the same seed gives the same answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def stream_answer(
    model: Any,
    processor: Phi3VProcessor,
    prompt: Sample,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    autocast_dtype: torch.dtype | None = None,
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Generator[str, None, bool]:
    """The answer so far after each token, and last the whole answer.

    Greedy, that is the text which `generate_answers` gives. The caller may stop at any token by asking no further.

    Args:
        around: entered around each run of the model, so never while the caller has the answer so far.

    Returns:
        Whether the answer came to its end; if not, it was cut at ``max_new_tokens``.
    """
    stops = stop_token_ids(processor.backend_tokenizer)
    device = next(model.parameters()).device
    choose = _Chooser(sampling, device)
    ids: list[int] = []

    @contextlib.contextmanager
    def computing() -> Iterator[None]:
        # Entered anew for each token: a context held over a yield would hold for the caller too.
        autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else contextlib.nullcontext()
        with around(), torch.inference_mode(), autocast:
            yield

    def read() -> DecodingState:
        whole = Sample(prompt.input_ids + ids, [], prompt.pages)
        return prefill(model, processor, whole_prompts([0], [whole]))

    with computing():
        state = read()
    while True:
        token = choose(state.logits[:, -1])
        ids.append(token)
        text = decode_answer(processor.backend_tokenizer, ids, stops)
        if token in stops or len(ids) == max_new_tokens:
            yield text
            return token in stops
        yield text.rstrip(UNFINISHED)
        with computing():
            if state.lengths[0] == model.config.long_context_start:
                # Its keys were rotated with the short factors: all runs again with the long ones, as in the batches.
                state = read()
            else:
                state.feed({"input_ids": torch.tensor([[token]], device=device)})


class _Chooser:
    """Takes the next token from logits (1, V)."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(sampling.seed)
        self.warpers: list[Callable[[Any, torch.Tensor], torch.Tensor]] = []
        if sampling.temperature > 0:
            self.warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: torch.Tensor) -> int:
        if not self.warpers:
            return int(logits.argmax(dim=-1))
        scores = logits.float()
        for warp in self.warpers:
            scores = warp(None, scores)
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator))
