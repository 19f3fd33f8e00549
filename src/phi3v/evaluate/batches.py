"""Which questions are answered together, and on which rank.

Questions about the same page share everything up to their last image: that prefix is computed once and the rest of
each prompt, its suffix, branches from it. Batches hold prompts of similar length, so that little is padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from phi3v.data.balance import assign_to_ranks
from phi3v.data.collate import QuestionDataset, Sample, stack_images
from phi3v.data.mixture import measure
from phi3v.processing.hd_transform import image_runs


@dataclass(frozen=True)
class Prompt:
    """What is known of a prompt before its images are decoded.

    Attributes:
        index: of its question.
        page: a number that prompts with the same prefix have in common.
        prefix: tokens up to the last image; 0 where nothing may be shared.
        length: tokens in all.
    """

    index: int
    page: int
    prefix: int
    length: int


class PreparedQuestions:
    """Questions that are in no data file, as prompts with their images: for those who bring questions of their own.

    Args:
        samples: the prompts; images with the same name are the same.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.samples[index])  # whoever answers it may add to its tokens

    def prompt(self, index: int, num_img_tokens: Sequence[int]) -> list[int]:
        """The token ids of a prompt; its images have so many tokens each."""
        return self.samples[index].input_ids

    def prompts(self, long_context_start: int) -> list[Prompt]:
        """As of `list_prompts`."""
        pages: dict[tuple[object, ...], int] = {}
        prompts = []
        for index, sample in enumerate(self.samples):
            ids = sample.input_ids
            prefix = max((place + 1 for place, token in enumerate(ids) if token < 0), default=0)
            if (prefix > long_context_start) != (len(ids) > long_context_start):
                prefix = 0
            images = tuple(page.name for page in sample.pages)
            same = (images, tuple(ids[:prefix])) if prefix else (index,)
            prompts.append(Prompt(index, pages.setdefault(same, len(pages)), prefix, len(ids)))
        return prompts


Questions = QuestionDataset | PreparedQuestions


def list_prompts(questions: Questions, long_context_start: int) -> list[Prompt]:
    """The prompt of every question.

    Args:
        long_context_start: longer samples use other rotary factors (LongRoPE), so a prefix on one side of it is of no
            use to a prompt on the other.
    """
    if isinstance(questions, PreparedQuestions):
        return questions.prompts(long_context_start)
    num_crops = questions.processor.image_processor.num_crops
    lengths = measure(questions.table, questions.processor)
    tokens, prefixes, pages = lengths.prompts_at(questions.index, num_crops, long_context_start)
    values = zip(pages.tolist(), prefixes.tolist(), tokens.tolist(), strict=True)
    return [Prompt(index, *of_prompt) for index, of_prompt in enumerate(values)]


def prompts_of_ranks(prompts: Sequence[Prompt], ranks: int, batch_size: int) -> list[list[Prompt]]:
    """Every prompt on exactly one rank, pages together as far as a batch holds them.

    A rank's prompts are sorted by length, longest first, page by page.
    """
    longest: dict[int, int] = {}
    for prompt in prompts:
        longest[prompt.page] = max(longest.get(prompt.page, 0), prompt.length)
    ordered = sorted(prompts, key=lambda p: (-longest[p.page], p.page, -p.length, p.index))
    together = max(1, min(batch_size, math.ceil(len(prompts) / ranks)))
    parts: list[list[Prompt]] = []
    for _, group in groupby(ordered, key=lambda p: p.page):
        page = list(group)
        parts += [page[start : start + together] for start in range(0, len(page), together)]
    work = [part[0].prefix + sum(prompt.length - prompt.prefix for prompt in part) for part in parts]
    shares: list[list[Prompt]] = [[] for _ in range(ranks)]
    for part, rank in zip(parts, assign_to_ranks(work, ranks), strict=True):
        shares[rank] += part
    return shares


def cut_batches(prompts: Sequence[Prompt], batch_size: int, max_tokens: int) -> list[list[Prompt]]:
    """Consecutive prompts, at most ``batch_size`` and, padding included, ``max_tokens`` a batch (or one prompt)."""
    batches: list[list[Prompt]] = []
    for prompt in prompts:
        wider = [*batches[-1], prompt] if batches else []
        width = max((p.prefix for p in wider), default=0) + max((p.length - p.prefix for p in wider), default=0)
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
        prefixes: token ids of each page; whole prompts where no suffix is left.
        page_of_row: which prefix each row goes on from.
        suffixes: token ids of each row after its prefix; empty lists where the prefixes are whole prompts.
        images: pages of the prefixes, as `stack_images` gives them, or nothing.
    """

    indices: list[int]
    prefixes: list[list[int]]
    page_of_row: list[int]
    suffixes: list[list[int]]
    images: dict[str, Any] = field(default_factory=dict)

    def lengths(self) -> list[int]:
        """Tokens of each row's prompt."""
        rows = zip(self.page_of_row, self.suffixes, strict=True)
        return [len(self.prefixes[page]) + len(suffix) for page, suffix in rows]

    def pages(self) -> list[list[npt.NDArray[np.uint8]]]:
        """The pages of each prefix's images, (height, width, 3)."""
        sizes = self.images.get("image_sizes", ())
        flat = self.images["pages"].split([height * width for height, width in sizes]) if sizes else ()
        distinct = [pixels.view(*size, 3).numpy() for pixels, size in zip(flat, sizes, strict=True)]
        shown = iter(self.images.get("page_index", ()))
        return [[distinct[next(shown)] for _ in image_runs(prefix)] for prefix in self.prefixes]


def whole_prompts(indices: Sequence[int], samples: Sequence[Sample]) -> PromptBatch:
    """A batch in which nothing is shared."""
    rows = list(range(len(indices)))
    prompts = [sample.input_ids for sample in samples]
    return PromptBatch(list(indices), prompts, rows, [[] for _ in rows], stack_images(samples))


class PromptBatches(Dataset[PromptBatch]):
    """Batches with their images decoded, each image of a page once."""

    def __init__(self, questions: Questions, batches: Sequence[Sequence[Prompt]]) -> None:
        self.questions = questions
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> PromptBatch:
        prompts = self.batches[number]
        indices = [prompt.index for prompt in prompts]
        first = {prompt.page: prompt for prompt in reversed(prompts)}
        if len(first) == len(prompts) or not all(prompt.prefix for prompt in prompts):
            return whole_prompts(indices, [self.questions[index] for index in indices])
        samples = {page: self.questions[prompt.index] for page, prompt in first.items()}
        counts = {page: self._num_img_tokens(sample) for page, sample in samples.items()}
        place = {page: place for place, page in enumerate(samples)}
        return PromptBatch(
            indices,
            [samples[page].input_ids[: first[page].prefix] for page in samples],
            [place[prompt.page] for prompt in prompts],
            [self.questions.prompt(p.index, counts[p.page])[p.prefix :] for p in prompts],
            stack_images(list(samples.values())),
        )

    def _num_img_tokens(self, sample: Sample) -> list[int]:
        return [page.num_img_tokens for page in sample.pages]

    def __iter__(self) -> Iterator[PromptBatch]:
        return (self[number] for number in range(len(self)))
