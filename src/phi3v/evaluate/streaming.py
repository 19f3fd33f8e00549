"""Answering one prompt, token by token, for a person who reads along."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from phi3v.data.collate import Sample
from phi3v.evaluate.batches import whole_prompts
from phi3v.evaluate.decoding import DecodingState, prefill
from phi3v.evaluate.sampling import GREEDY, Sampling, TokenChooser
from phi3v.processing.conversation import UNFINISHED, decode_answer, stop_token_ids
from phi3v.processing.processor import Phi3VProcessor


def stream_answer(
    model: Any,
    processor: Phi3VProcessor,
    prompt: Sample,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
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
    choose = TokenChooser(sampling, [""])
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
        token = int(choose(state.logits[:, -1], [0]))
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
