"""Answering one prompt, token by token, for a person who reads along."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any

import torch

from phi3v.data.collate import Sample
from phi3v.evaluate.decoding import decoder_of
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
    tokenizer = processor.backend_tokenizer
    stops = stop_token_ids(tokenizer)
    choose = TokenChooser(sampling, [""])
    decoder = decoder_of(model, processor, autocast_dtype)
    ids: list[int] = []
    # Entered anew for each token: a context held over a yield would hold for the caller too.
    with around():
        logits = decoder.start(prompt.input_ids, [page.content.numpy() for page in prompt.pages])
    while True:
        token = int(choose(torch.from_numpy(logits)[None], [0]))
        ids.append(token)
        text = decode_answer(tokenizer, ids, stops)
        if token in stops or len(ids) == max_new_tokens:
            yield text
            return token in stops
        yield text.rstrip(UNFINISHED)
        with around():
            logits = decoder.step(token)
