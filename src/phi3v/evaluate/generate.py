"""Answering questions: greedy, batched, with a KV cache, each question on exactly one rank.

The library's ``generate`` answers each prompt from scratch and keeps finished rows to the end. Here questions about
one page share its computation, and rows leave the batch when they are done; the answers are the same.

Shapes: ``R`` rows, ``P`` pages, ``T`` tokens, ``W`` answer words, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from phi3v.data.readers import reading
from phi3v.evaluate.batches import (
    PromptBatch,
    PromptBatches,
    Questions,
    cut_batches,
    list_prompts,
    prompts_of_ranks,
    whole_prompts,
)
from phi3v.evaluate.decoding import DecodingState, prefill
from phi3v.processing.conversation import END, decode_answer, stop_token_ids
from phi3v.processing.processor import Phi3VProcessor


@dataclass(frozen=True)
class Generated:
    """An answer.

    Attributes:
        probabilities: of each candidate word, if words were given.
        cut: it reached the limit before its end.
    """

    text: str
    probabilities: list[float]
    cut: bool = False


def generate_answers(
    model: Any,
    processor: Phi3VProcessor,
    questions: Questions,
    *,
    batch_size: int,
    batch_tokens: int,
    max_new_tokens: int,
    words: Sequence[str] = (),
    autocast_dtype: torch.dtype | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Generated]:
    """The model's answers in the order of ``questions``, on every rank.

    Neither the batches nor the number of ranks change an answer, up to the rounding of sums.

    Args:
        batch_tokens: prompt tokens of a batch at most, padding included.
        words: candidate answers whose probabilities are wanted too.
        autocast_dtype: compute in this dtype; by default in the model's own.
        on_batch: told how many questions were answered since the last call, on this rank.
    """
    prompts = list_prompts(questions, model.config.long_context_start)
    mine = prompts_of_ranks(prompts, world_size, batch_size)[rank]
    batches = PromptBatches(questions, cut_batches(mine, batch_size, batch_tokens))
    device = next(model.parameters()).device
    answerer = _Answerer(model, processor, device, max_new_tokens, words)
    was_training = model.training
    model.eval()
    answers: dict[int, Generated] = {}
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else contextlib.nullcontext()
    try:
        with (
            reading(batches.__getitem__, range(len(batches)), num_workers) as made,
            torch.inference_mode(),
            autocast,
        ):
            for batch in made:
                answers |= answerer.answer(batch, questions)
                on_batch(len(batch.indices))
    finally:
        model.train(was_training)
    if world_size > 1:
        answers = dict(gather_object(list(answers.items())))
    return [answers[index] for index in range(len(questions))]


class _Answerer:
    """Answers batches with one model."""

    def __init__(
        self, model: Any, processor: Phi3VProcessor, device: torch.device, max_new_tokens: int, words: Sequence[str]
    ) -> None:
        self.model = model
        self.processor = processor
        self.device = device
        self.max_new_tokens = max_new_tokens
        self.words = [processor.tokenize_text(word + END) for word in words]
        self.stops = stop_token_ids(processor.backend_tokenizer)
        self.long_context_start: int = model.config.long_context_start

    def answer(self, batch: PromptBatch, questions: Questions) -> dict[int, Generated]:
        """The answers to a batch, by question."""
        state = prefill(self.model, self.processor, batch)
        probabilities = self.word_probabilities(state) if self.words else [[] for _ in batch.indices]
        ids: list[list[int]] = [[] for _ in batch.indices]
        crossing = self.decode(state, ids)
        while crossing:
            # Their keys were rotated with the short factors. As in the official code, the whole sample, images
            # included, runs again with the long ones.
            rows = [batch.indices[row] for row in crossing]
            samples = [questions[index] for index in rows]
            for sample, row in zip(samples, crossing, strict=True):
                sample.input_ids = sample.input_ids + ids[row]
            longer = [ids[row] for row in crossing]  # the same lists: they grow in place
            again = self.decode(prefill(self.model, self.processor, whole_prompts(rows, samples)), longer)
            crossing = [crossing[row] for row in again]
        texts = [decode_answer(self.processor.backend_tokenizer, row, self.stops) for row in ids]
        return {
            index: Generated(texts[row], probabilities[row], ids[row][-1] not in self.stops)
            for row, index in enumerate(batch.indices)
        }

    def decode(self, state: DecodingState, ids: list[list[int]]) -> list[int]:
        """Add greedy tokens to each row of ``ids`` until it stops or is full.

        Returns:
            The rows that reached the length from which the long rotary factors hold, unfinished.
        """
        rows = list(range(len(ids)))  # the row of each line of the state
        going = set(rows)
        crossing: list[int] = []
        while True:
            chosen = state.logits[:, -1].argmax(dim=-1)  # [lines]
            for line, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                if row not in going:
                    continue
                ids[row].append(token)
                if token in self.stops or len(ids[row]) == self.max_new_tokens:
                    going.remove(row)
                elif state.lengths[line] == self.long_context_start:
                    going.remove(row)
                    crossing.append(row)
            if not going:
                return crossing
            # Dropping rows copies the cache of the others, so it waits until half of them are done.
            if len(going) <= len(rows) // 2:
                lines = [line for line, row in enumerate(rows) if row in going]
                state.select(lines)
                chosen = chosen[lines]
                rows = [rows[line] for line in lines]
            state.feed({"input_ids": chosen[:, None]})

    def word_probabilities(self, state: DecodingState) -> list[list[float]]:
        """The probability of each word and the end after it, normalised over the words: R lists of W.

        By teacher forcing: each word's tokens are fed after the prompts, then taken back from the cache.
        """
        before = state.logits
        totals = []
        for ids in self.words:
            forced = torch.tensor([ids[:-1]] * len(before), device=self.device)  # [R, T]
            after = state.peek(forced)  # [R, T, V]
            logits = torch.cat([before[:, -1:], after], dim=1).float()  # [R, T + 1, V]
            wanted = torch.tensor(ids, device=self.device).expand(len(before), -1)[..., None]
            totals.append(logits.log_softmax(dim=-1).gather(-1, wanted).sum(dim=(1, 2)))
        probabilities: list[list[float]] = torch.stack(totals, dim=1).double().softmax(dim=1).tolist()
        return probabilities
