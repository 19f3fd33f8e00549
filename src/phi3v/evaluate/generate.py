"""Answering questions: batched, with a KV cache, each question on exactly one rank.

The library's ``generate`` answers each prompt from scratch and keeps finished rows to the end. Here questions about
one page share its computation, and rows leave the batch when they are done; the answers are the same. Several answers
to a question share its whole prompt.

Shapes: ``R`` rows, ``P`` pages, ``T`` tokens, ``W`` answer words, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object

from phi3v.data.collate import QuestionDataset
from phi3v.data.readers import reading
from phi3v.evaluate.batches import (
    Prompt,
    PromptBatch,
    PromptBatches,
    Questions,
    cut_batches,
    list_prompts,
    prompts_of_ranks,
    whole_prompts,
)
from phi3v.evaluate.decoding import DecodingState, Pixels, prefill
from phi3v.evaluate.sampling import GREEDY, Sampling, TokenChooser
from phi3v.processing.conversation import END, decode_answer, stop_token_ids
from phi3v.processing.processor import Phi3VProcessor
from phi3v.runtime import Runtime


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
    answers: dict[int, Generated] = {}

    def take(answered: dict[int, list[Generated]]) -> None:
        answers.update({index: first for index, (first,) in answered.items()})
        on_batch(len(answered))

    prompts = list_prompts(questions, model.config.long_context_start)
    mine = prompts_of_ranks(prompts, world_size, batch_size)[rank]
    batches = cut_batches(mine, batch_size, batch_tokens)
    answerer: Answerer = (
        GraphAnswerer(model, max_new_tokens, [processor.tokenize_text(word + END) for word in words])
        if isinstance(model, Runtime)
        else TorchAnswerer(model, processor, max_new_tokens, words, autocast_dtype=autocast_dtype)
    )
    _answer_batches(answerer, questions, batches, take, num_workers)
    if world_size > 1:
        answers = dict(gather_object(list(answers.items())))
    return [answers[index] for index in range(len(questions))]


def sample_answers(
    model: Any,
    processor: Phi3VProcessor,
    questions: QuestionDataset,
    wanted: Sequence[int],
    take: Callable[[dict[int, list[Generated]]], None],
    *,
    count: int,
    sampling: Sampling,
    batch_size: int,
    batch_tokens: int,
    max_new_tokens: int,
    autocast_dtype: torch.dtype | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Several answers to each question, drawn by its id and the seed; a question is on one rank.

    Neither the batches, the number of ranks nor what else is answered change an answer, up to the rounding of sums.

    Args:
        wanted: the questions that are answered.
        take: gets the answers of a batch, by question, as soon as they are there.
        count: of answers to a question.
        batch_size: answers that are written at once; the answers to a question stay together.
        batch_tokens: prompt tokens of a batch at most, those of each answer counted.
    """
    prompts = list_prompts(questions, model.config.long_context_start)
    together = max(1, batch_size // count)
    mine = prompts_of_ranks([prompts[index] for index in wanted], world_size, together)[rank]
    batches = cut_batches(mine, together, batch_tokens // count)
    answerer = TorchAnswerer(
        model, processor, max_new_tokens, count=count, sampling=sampling, autocast_dtype=autocast_dtype
    )
    _answer_batches(answerer, questions, batches, take, num_workers)


class Answerer(Protocol):
    """A model that answers batches of prompts."""

    def computing(self) -> AbstractContextManager[Any]:
        """Entered while it answers."""

    def answer(self, batch: PromptBatch, questions: Questions) -> dict[int, list[Generated]]:
        """The answers to a batch, by question."""


def _answer_batches(
    answerer: Answerer,
    questions: Questions,
    prompts: Sequence[Sequence[Prompt]],
    take: Callable[[dict[int, list[Generated]]], None],
    num_workers: int,
) -> None:
    batches = PromptBatches(questions, prompts)
    with reading(batches.__getitem__, range(len(batches)), num_workers) as made, answerer.computing():
        for batch in made:
            take(answerer.answer(batch, questions))


class TorchAnswerer:
    """Our own model as an `Answerer`; ``count`` answers to each question."""

    def __init__(
        self,
        model: Any,
        processor: Phi3VProcessor,
        max_new_tokens: int,
        words: Sequence[str] = (),
        count: int = 1,
        sampling: Sampling = GREEDY,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.device = next(model.parameters()).device
        self.max_new_tokens = max_new_tokens
        self.count = count
        self.sampling = sampling
        self.autocast_dtype = autocast_dtype
        self.words = [processor.tokenize_text(word + END) for word in words]
        self.stops = stop_token_ids(processor.backend_tokenizer)
        self.long_context_start: int = model.config.long_context_start

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """The model is in evaluation mode meanwhile."""
        was_training = self.model.training
        self.model.eval()
        dtype = self.autocast_dtype
        autocast = torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()
        try:
            with torch.inference_mode(), autocast:
                yield
        finally:
            self.model.train(was_training)

    def answer(self, batch: PromptBatch, questions: Questions) -> dict[int, list[Generated]]:
        """The answers to a batch, by question."""
        state = prefill(self.model, self.processor, batch)
        probabilities = self.word_probabilities(state) if self.words else [[] for _ in batch.indices]
        asked = [index for index in batch.indices for _ in range(self.count)]  # of each answer, its question
        if self.count > 1:
            state.select([line for line in range(len(batch.indices)) for _ in range(self.count)])
        choose = TokenChooser(self.sampling, self.names(batch.indices, questions))
        ids: list[list[int]] = [[] for _ in asked]
        crossing = self.decode(state, ids, choose, range(len(asked)))
        while crossing:
            # Their keys were rotated with the short factors. As in the official code, the whole sample, images
            # included, runs again with the long ones.
            rows = [asked[row] for row in crossing]
            samples = [questions[index] for index in rows]
            for sample, row in zip(samples, crossing, strict=True):
                sample.input_ids = sample.input_ids + ids[row]
            longer = [ids[row] for row in crossing]  # the same lists: they grow in place
            state = prefill(self.model, self.processor, whole_prompts(rows, samples))
            again = self.decode(state, longer, choose, crossing)
            crossing = [crossing[row] for row in again]
        texts = [decode_answer(self.processor.backend_tokenizer, row, self.stops) for row in ids]
        answers = [Generated(text, [], row[-1] not in self.stops) for text, row in zip(texts, ids, strict=True)]
        return {
            index: [
                replace(answer, probabilities=probabilities[line])
                for answer in answers[line * self.count : (line + 1) * self.count]
            ]
            for line, index in enumerate(batch.indices)
        }

    def names(self, indices: Sequence[int], questions: Questions) -> list[str]:
        """What the random numbers of each answer are drawn by; nothing is drawn where the likeliest token is taken."""
        if self.sampling.temperature == 0:
            return []
        assert isinstance(questions, QuestionDataset)
        asked = [questions.question(index).id for index in indices]
        return [f"{name}\0{number}" for name in asked for number in range(self.count)]

    def decode(
        self, state: DecodingState, ids: list[list[int]], choose: TokenChooser, answers: Sequence[int]
    ) -> list[int]:
        """Add tokens to each row of ``ids`` until it stops or is full.

        Args:
            answers: the number of each row's answer, as ``choose`` knows them.

        Returns:
            The rows that reached the length from which the long rotary factors hold, unfinished.
        """
        rows = list(range(len(ids)))  # the row of each line of the state
        going = set(rows)
        crossing: list[int] = []
        while True:
            chosen = choose(state.logits[:, -1], [answers[row] if row in going else None for row in rows])  # [lines]
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


class GraphAnswerer:
    """A model of graphs as an `Answerer`: one prompt after the other; a page that several are about is encoded once.

    Args:
        words: tokens of the candidate answers, each with its end.
    """

    def __init__(self, model: Runtime, max_new_tokens: int, words: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.words = words

    def computing(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def answer(self, batch: PromptBatch, questions: Questions) -> dict[int, list[Generated]]:
        pages = batch.pages()
        answers = {}
        for index, page, suffix in zip(batch.indices, batch.page_of_row, batch.suffixes, strict=True):
            answers[index] = [self._answer_one(batch.prefixes[page] + suffix, pages[page])]
        return answers

    def _answer_one(self, prompt: list[int], pages: Sequence[Pixels]) -> Generated:
        model = self.model
        probabilities = [self._log_probability(prompt, pages, word) for word in self.words]
        logits = model.start(prompt, pages)
        ids = [int(logits.argmax())]
        while ids[-1] not in model.stops and len(ids) < self.max_new_tokens:
            ids.append(int(model.step(ids[-1]).argmax()))
        weights = np.exp(np.array(probabilities) - max(probabilities, default=0.0))
        text = decode_answer(model.tokenizer, ids, model.stops)
        return Generated(text, (weights / weights.sum()).tolist() if probabilities else [], ids[-1] not in model.stops)

    def _log_probability(self, prompt: list[int], pages: Sequence[Pixels], word: Sequence[int]) -> float:
        """Of a word and its end after a prompt, by teacher forcing."""
        total, logits = 0.0, self.model.start(prompt, pages)
        for place, token in enumerate(word):
            exact = logits.astype(np.float64)
            total += exact[token] - exact.max() - np.log(np.exp(exact - exact.max()).sum())
            if place + 1 < len(word):
                logits = self.model.step(token)
        return float(total)
