"""Records to model inputs: what one sample is, and how several become a batch.

Shapes: ``B`` rows, ``T`` tokens, ``N`` images of the batch, ``P`` pixels of its distinct pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from phi3v.data.features import FeatureStore
from phi3v.data.pages import Page, PageReader
from phi3v.data.schema import Record
from phi3v.data.table import RecordTable
from phi3v.errors import UserError
from phi3v.processing.conversation import IGNORE_INDEX, ChatTurn, TokenStream, encode_conversation
from phi3v.processing.pages import flatten_pages
from phi3v.processing.processor import Phi3VProcessor, pad_rows

LossWeighting = Literal["sample", "token"]
OnBadSample = Literal["stop", "skip"]


@dataclass
class Sample:
    """One record, or one question of it, as the model sees it.

    Attributes:
        pages: of each picture, in order.
        index: of the record in its table.
        fault: why the record cannot be read; the sample is then another one, and weighs nothing.
    """

    input_ids: list[int]
    labels: list[int]
    pages: list[Page]
    num_questions: int = 1
    index: int = -1
    fault: str | None = None


class Counts(NamedTuple):
    """What a batch holds, as plain values that stay on the host.

    Attributes:
        weight: the sum of its loss weights.
        samples, questions, tokens: how many, padding left out.
        records: the index of every sample's record.
        skipped: index and reason of records that could not be read; other ones are in their place and weigh nothing.
    """

    weight: float
    samples: int
    questions: int
    tokens: int
    records: tuple[int, ...] = ()
    skipped: tuple[tuple[int, str], ...] = ()


def make_sample(
    reader: PageReader, record: Record, processor: Phi3VProcessor, *, question: int | None = None
) -> Sample:
    """The token stream and the pictures of a record.

    Args:
        question: make the prompt of this turn, after the turns before it with their answers; by default the whole
            record is made, with every answer.
    """
    record = upto_question(record, question)
    pages = reader.pages(record)
    counts = [processor.image_processor.num_tokens_of_page(page.size) for page in pages]
    stream = encode_record(record, processor, counts, question=question)
    return Sample(stream.input_ids, stream.labels, pages, record.num_questions)


def upto_question(record: Record, question: int | None) -> Record:
    """The record cut after the turn that is asked, if one is."""
    return record if question is None else replace(record, turns=record.turns[: question + 1])


def encode_record(
    record: Record, processor: Phi3VProcessor, num_img_tokens: Sequence[int], *, question: int | None = None
) -> TokenStream:
    """The token stream of a record, or of the prompt that ends with turn ``question``, its last.

    Args:
        num_img_tokens: tokens of every picture of the record, in order.
    """
    chat = [
        ChatTurn(
            turn.user,
            None if index == question else turn.assistant,
            len(turn.images),
            turn.image_offsets,
            turn.weight,
        )
        for index, turn in enumerate(record.turns)
    ]
    return encode_conversation(processor, chat, num_img_tokens, system=record.system)


class ConversationDataset(Dataset[Sample]):
    """Whole records, to learn from.

    Args:
        features: of their pictures, where a frozen vision part has made them already.
        on_bad: a record whose pictures cannot be read: raise that, or give the next one that can in its place, with
            ``fault`` set.
    """

    def __init__(
        self,
        table: RecordTable,
        processor: Phi3VProcessor,
        *,
        features: FeatureStore | None = None,
        on_bad: OnBadSample = "stop",
    ) -> None:
        self.table = table
        self.processor = processor
        self.reader = PageReader(table, processor.image_processor, features)
        self.on_bad = on_bad

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        try:
            return replace(make_sample(self.reader, self.table[index], self.processor), index=index)
        except UserError as error:
            if self.on_bad == "stop":
                raise
            other = first_readable(self.reader, self.table, self.processor, after=index, error=error)
            return replace(other, index=index, fault=str(error).splitlines()[0])


def first_readable(
    reader: PageReader, table: RecordTable, processor: Phi3VProcessor, *, after: int, error: UserError
) -> Sample:
    """The first record after one that cannot be read, going round.

    It takes the place of that one: every rank must run the same parts of the model, whatever it could read.

    Raises:
        UserError: ``error``, if no record can be read.
    """
    for step in range(1, len(table)):
        index = (after + step) % len(table)
        try:
            return replace(make_sample(reader, table[index], processor), index=index)
        except UserError:
            continue
    raise error


@dataclass(frozen=True)
class Question:
    """One question as it is scored: its text, its reference answers and the pictures it is about."""

    id: str
    text: str
    references: tuple[str, ...]
    images: tuple[str, ...]


class QuestionDataset(Dataset[Sample]):
    """Every question that is learnt from, as a prompt to answer.

    Args:
        limit: take so many questions, drawn by ``seed`` and kept in the order of the file.
    """

    def __init__(
        self, table: RecordTable, processor: Phi3VProcessor, *, limit: int | None = None, seed: int = 0
    ) -> None:
        self.table = table
        self.processor = processor
        self.reader = PageReader(table, processor.image_processor)
        self.index: npt.NDArray[np.int64] = table.questions()
        if limit is not None and limit < len(self.index):
            chosen = np.random.default_rng(seed).choice(len(self.index), size=limit, replace=False)
            self.index = self.index[np.sort(chosen)]

    def __len__(self) -> int:
        return len(self.index)

    def question(self, index: int) -> Question:
        """What is asked, without the pictures' content."""
        record_index, turn_index = self.index[index]
        return _question(self.table[int(record_index)], int(turn_index))

    def questions(self) -> Iterator[Question]:
        """All of them in order, read faster than one by one."""
        turns: dict[int, list[int]] = {}
        for record_index, turn_index in self.index.tolist():
            turns.setdefault(record_index, []).append(turn_index)
        for record_index, record in enumerate(self.table):
            for turn_index in turns.get(record_index, ()):
                yield _question(record, turn_index)

    def prompt(self, index: int, num_img_tokens: Sequence[int]) -> list[int]:
        """The token ids of a prompt whose pictures have so many tokens each."""
        record_index, turn_index = self.index[index]
        record = upto_question(self.table[int(record_index)], int(turn_index))
        return encode_record(record, self.processor, num_img_tokens, question=int(turn_index)).input_ids

    def num_img_tokens(self, index: int) -> list[int]:
        """The tokens of each picture of a prompt, from the headers of the files alone."""
        record_index, turn_index = self.index[index]
        record = upto_question(self.table[int(record_index)], int(turn_index))
        count = self.processor.image_processor.calc_num_image_tokens_from_image_size
        return [count(width, height) for width, height in self.table.image_sizes(record)]

    def __getitem__(self, index: int) -> Sample:
        record_index, turn_index = self.index[index]
        return make_sample(self.reader, self.table[int(record_index)], self.processor, question=int(turn_index))


def _question(record: Record, turn_index: int) -> Question:
    turn = record.turns[turn_index]
    name = record.id if len(record.turns) == 1 else f"{record.id}#{turn_index + 1}"
    images = upto_question(record, turn_index).images
    return Question(name, turn.user, turn.answers or (turn.assistant,), images)


@dataclass
class Collator:
    """Pads samples to a batch.

    Args:
        pad_token_id: fills ``input_ids``.
        padding_side: right to learn, left to generate.
        loss_weighting: ``sample`` weighs each label by one over its sample's number of labels, so that every sample
            weighs 1; ``token`` weighs every label 1.
    """

    pad_token_id: int
    padding_side: Literal["left", "right"] = "right"
    loss_weighting: LossWeighting = "sample"

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """
        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` int64 (B, T), ``loss_weights`` float32 (B, T), and with
            pictures what `stack_pictures` gives. Also ``counts``, see `Counts`. A sample with a fault weighs nothing
            and is not counted.
        """
        rows = [sample.input_ids for sample in samples]
        batch: dict[str, Any] = dict(pad_rows(rows, self.pad_token_id, self.padding_side))
        length = batch["input_ids"].shape[1]
        labels = torch.full((len(samples), length), IGNORE_INDEX, dtype=torch.int64)
        weights = torch.zeros(len(samples), length)
        for row, sample in enumerate(samples):
            own = torch.tensor(sample.labels, dtype=torch.int64)
            learnt = own != IGNORE_INDEX
            where = slice(length - len(own), length) if self.padding_side == "left" else slice(0, len(own))
            labels[row, where] = own
            weight = 1.0 / max(1, int(learnt.sum())) if self.loss_weighting == "sample" else 1.0
            weights[row, where] = learnt * weight * (sample.fault is None)
        good = [sample for sample in samples if sample.fault is None]
        batch |= {
            "labels": labels,
            "loss_weights": weights,
            "counts": Counts(
                float(weights.sum()),
                len(good),
                sum(sample.num_questions for sample in good),
                sum(len(sample.input_ids) for sample in good),
                tuple(sample.index for sample in samples),
                tuple((sample.index, sample.fault) for sample in samples if sample.fault is not None),
            ),
        }
        return batch | stack_pictures(samples)


def stack_pictures(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """The pages of all pictures, each page once; nothing where there is none.

    Returns:
        ``pages`` uint8 (P, 3), all pixels page after page, or ``image_features`` where these were kept;
        ``image_sizes`` int64 (pages, 2), height and width of each; ``page_index`` int64 (N,), the page of each picture
        in order.
    """
    pictures = [page for sample in samples for page in sample.pages]
    if not pictures:
        return {}
    distinct = {page.name: page for page in pictures}
    place = {name: index for index, name in enumerate(distinct)}
    contents = [page.content for page in distinct.values()]
    is_pixels = contents[0].dtype == torch.uint8
    return {
        **({"pages": flatten_pages(contents)} if is_pixels else {"image_features": torch.cat(contents)}),
        "image_sizes": torch.tensor([page.size for page in distinct.values()]),
        "page_index": torch.tensor([place[page.name] for page in pictures]),
    }
