"""Which questions are answered together, and on which rank.

Questions about the same page share everything up to their last picture: that head is computed once and the rest of
each prompt, its tail, branches from it. Batches hold prompts of similar length, so that little is padded.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch.utils.data import Dataset

from phi3v.data.collate import QuestionDataset, Sample, stack_pictures


@dataclass(frozen=True)
class Prompt:
    """What is known of a prompt before its pictures are decoded.

    Attributes:
        index: of its question.
        page: a number that prompts with the same head have in common.
        head: tokens up to the last picture; 0 where nothing may be shared.
        length: tokens in all.
    """

    index: int
    page: int
    head: int
    length: int


def measure_prompts(questions: QuestionDataset, long_context_start: int) -> list[Prompt]:
    """Every prompt's length and page, from the texts and the headers of the picture files.

    Args:
        long_context_start: longer samples use other rotary factors (LongRoPE), so a head on one side of it is of no
            use to a prompt on the other.
    """
    counts: dict[tuple[str, ...], list[int]] = {}
    pages: dict[Any, int] = {}
    prompts = []
    for index in range(len(questions)):
        images = questions.question(index).images
        if images not in counts:
            counts[images] = questions.num_img_tokens(index)
        ids = questions.prompt(index, counts[images])
        head = len(ids) - next((back for back, token in enumerate(reversed(ids)) if token < 0), len(ids))
        if (head > long_context_start) != (len(ids) > long_context_start):
            head = 0
        # The pictures' own tokens are left out: their names stand for them.
        key = (images, tuple(token for token in ids[:head] if token >= 0)) if head else index
        prompts.append(Prompt(index, pages.setdefault(key, len(pages)), head, len(ids)))
    return prompts


def deal(prompts: Sequence[Prompt], ranks: int, batch_size: int) -> list[list[Prompt]]:
    """Every prompt to exactly one rank: pages stay together, and each next one goes to the rank with least to do.

    A rank's prompts are sorted by length, longest first, page by page.
    """
    longest: dict[int, int] = {}
    for prompt in prompts:
        longest[prompt.page] = max(longest.get(prompt.page, 0), prompt.length)
    ordered = sorted(prompts, key=lambda p: (-longest[p.page], p.page, -p.length, p.index))
    together = max(1, min(batch_size, math.ceil(len(prompts) / ranks)))
    shares: list[list[Prompt]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for _, group in groupby(ordered, key=lambda p: p.page):
        page = list(group)
        for start in range(0, len(page), together):
            part = page[start : start + together]
            load, rank = heapq.heappop(loads)
            shares[rank] += part
            cost = part[0].head + sum(prompt.length - prompt.head for prompt in part)
            heapq.heappush(loads, (load + cost, rank))
    return shares


def cut_batches(prompts: Sequence[Prompt], batch_size: int, max_tokens: int) -> list[list[Prompt]]:
    """Consecutive prompts, at most ``batch_size`` and, padding included, ``max_tokens`` a batch (or one prompt)."""
    batches: list[list[Prompt]] = []
    for prompt in prompts:
        wider = [*batches[-1], prompt] if batches else []
        width = max((p.head for p in wider), default=0) + max((p.length - p.head for p in wider), default=0)
        if wider and len(wider) <= batch_size and len(wider) * width <= max_tokens:
            batches[-1] = wider
        else:
            batches.append([prompt])
    return batches


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are answered together.

    Attributes:
        indices: the question of each row.
        heads: token ids of each page; whole prompts where no tail is left.
        page_of_row: which head each row goes on from.
        tails: token ids of each row after its head; empty lists where the heads are whole prompts.
        pictures: pages of the heads, as `stack_pictures` gives them, or nothing.
    """

    indices: list[int]
    heads: list[list[int]]
    page_of_row: list[int]
    tails: list[list[int]]
    pictures: dict[str, torch.Tensor] = field(default_factory=dict)

    def lengths(self) -> list[int]:
        """Tokens of each row's prompt."""
        return [len(self.heads[page]) + len(tail) for page, tail in zip(self.page_of_row, self.tails, strict=True)]


def whole_prompts(indices: Sequence[int], samples: Sequence[Sample]) -> PromptBatch:
    """A batch in which nothing is shared."""
    rows = list(range(len(indices)))
    heads = [sample.input_ids for sample in samples]
    return PromptBatch(list(indices), heads, rows, [[] for _ in rows], stack_pictures(samples))


class PromptBatches(Dataset[PromptBatch]):
    """Batches with their pictures decoded, each picture of a page once."""

    def __init__(self, questions: QuestionDataset, batches: Sequence[Sequence[Prompt]]) -> None:
        self.questions = questions
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> PromptBatch:
        prompts = self.batches[number]
        indices = [prompt.index for prompt in prompts]
        first = {prompt.page: prompt for prompt in reversed(prompts)}
        if len(first) == len(prompts) or not all(prompt.head for prompt in prompts):
            return whole_prompts(indices, [self.questions[index] for index in indices])
        samples = {page: self.questions[prompt.index] for page, prompt in first.items()}
        counts = {page: self._num_img_tokens(sample) for page, sample in samples.items()}
        place = {page: place for place, page in enumerate(samples)}
        return PromptBatch(
            indices,
            [samples[page].input_ids[: first[page].head] for page in samples],
            [place[prompt.page] for prompt in prompts],
            [self.questions.prompt(p.index, counts[p.page])[p.head :] for p in prompts],
            stack_pictures(list(samples.values())),
        )

    def _num_img_tokens(self, sample: Sample) -> list[int]:
        return [self.questions.processor.image_processor.num_tokens_of_page(page.size) for page in sample.pages]

    def __iter__(self) -> Iterator[PromptBatch]:
        return (self[number] for number in range(len(self)))
