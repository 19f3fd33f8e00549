"""Records to model inputs: what one sample is, and how several become a batch.

Shapes: ``B`` rows, ``T`` tokens, ``N`` images of the batch, ``P`` pixels of its distinct pages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from phi3v.data.features import FeatureStore
from phi3v.data.images import image_size, load_image
from phi3v.data.order import share_out
from phi3v.data.schema import Record
from phi3v.data.table import RecordTable
from phi3v.errors import UserError
from phi3v.model.loss import find_targets
from phi3v.processing.conversation import IGNORE_INDEX, ChatTurn, TokenStream, encode_conversation
from phi3v.processing.hd_transform import (
    CROP_SIZE,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageAlignmentError,
    check_image_runs,
    flatten_pages,
    image_runs,
    num_img_tokens,
    page_geometry,
    to_page,
)
from phi3v.processing.image_processor import Phi3VImageProcessor
from phi3v.processing.processor import Phi3VProcessor

LossWeighting = Literal["sample", "token"]
OnBadSample = Literal["stop", "skip"]
# Records that share an image come one after the other where they come together at all.
KEPT_PAGES = 4


@dataclass(frozen=True)
class Page:
    """An image as the model takes it.

    Attributes:
        name: of its file, relative to the data's ``images/``; pages of one data file with the same name are the same.
        size: height and width in pixels, both multiples of 336.
        content: uint8 (height, width, 3), or what a frozen vision part made of that (see `FeatureStore`).
    """

    name: str
    size: tuple[int, int]
    content: torch.Tensor

    @property
    def num_img_tokens(self) -> int:
        return num_img_tokens(self.size[0] // CROP_SIZE, self.size[1] // CROP_SIZE)


def require_clip_statistics(image_processor: Phi3VImageProcessor) -> None:
    """Refuse a processor that normalises otherwise than the model does with pages, as a `UserError`."""
    if (image_processor.image_mean, image_processor.image_std) != (list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)):
        raise UserError(
            "images are normalised with CLIP's mean and standard deviation, and this processor has others",
            where="preprocessor_config.json",
            hint="copy image_mean and image_std from the published model",
        )


class PageReader:
    """The pages of a table's records; the last few are kept, so that records which share one read it once.

    Args:
        features: take the images' features from here in place of their pixels.

    Raises:
        UserError: the processor normalises otherwise than the model, which will do it, with CLIP's statistics.
    """

    def __init__(
        self, table: RecordTable, image_processor: Phi3VImageProcessor, features: FeatureStore | None = None
    ) -> None:
        require_clip_statistics(image_processor)
        self.table = table
        self.image_processor = image_processor
        self.features = features
        self._kept: OrderedDict[str, Page] = OrderedDict()

    def pages(self, record: Record) -> list[Page]:
        """The pages of all turns of a record, in order.

        Raises:
            UserError: an image cannot be used; names the line and the field.
        """
        return self.table.read_images(record, self._page)

    def _page(self, name: str, **settings: Any) -> Page:
        page = self._kept.pop(name, None)
        if page is None:
            page = self._read(name, **settings)
            if len(self._kept) == KEPT_PAGES:
                self._kept.popitem(last=False)
        self._kept[name] = page
        return page

    def _read(self, name: str, **settings: Any) -> Page:
        if self.features is not None:
            size = image_size(name, **settings)
            return Page(name, page_geometry(*size, self.image_processor.num_crops).size, self.features.get(name))
        pixels = to_page(load_image(name, **settings), self.image_processor.num_crops)
        return Page(name, (pixels.shape[0], pixels.shape[1]), pixels)


@dataclass
class Sample:
    """One record, or one question of it, as the model sees it.

    Attributes:
        pages: of each image, in order.
        index: of the record in its table.
    """

    input_ids: list[int]
    labels: list[int]
    pages: list[Page]
    num_questions: int = 1
    index: int = -1


class Counts(NamedTuple):
    """What a batch holds, as plain values that stay on the host.

    Attributes:
        weight: the sum of its loss weights.
        samples, questions, tokens: how many, padding left out.
        records: the index of every sample's record.
        skipped: index and reason of records that could not be read.
        of_sources: of a mixture, the samples of each source, then the tokens of each.
    """

    weight: float
    samples: int
    questions: int
    tokens: int
    records: tuple[int, ...] = ()
    skipped: tuple[tuple[int, str], ...] = ()
    of_sources: tuple[int, ...] = ()


def make_sample(
    reader: PageReader, record: Record, processor: Phi3VProcessor, *, question: int | None = None
) -> Sample:
    """The token stream and the images of a record.

    Args:
        question: make the prompt of this turn, after the turns before it with their answers; by default the whole
            record is made, with every answer.

    Raises:
        ImageAlignmentError: placeholders and images do not fit together.
    """
    record = upto_question(record, question)
    pages = reader.pages(record)
    counts = [page.num_img_tokens for page in pages]
    stream = encode_record(record, processor, counts, question=question)
    check_placeholders(stream.input_ids, pages, record, reader.table.where(record))
    return Sample(stream.input_ids, stream.labels, pages, record.num_questions)


def check_placeholders(input_ids: Sequence[int], pages: Sequence[Page], record: Record, where: str) -> None:
    """Check that every image of a record has its placeholder tokens; the model would have to wait for its device.

    Raises:
        ImageAlignmentError: it has not; names the line and the record.
    """
    sizes = [page.size for page in pages]
    check_image_runs(image_runs(input_ids), sizes, f"{where} (record {record.id})")


def upto_question(record: Record, question: int | None) -> Record:
    """The record cut after the turn that is asked, if one is."""
    return record if question is None else replace(record, turns=record.turns[: question + 1])


def encode_record(
    record: Record, processor: Phi3VProcessor, num_img_tokens: Sequence[int], *, question: int | None = None
) -> TokenStream:
    """The token stream of a record, or of the prompt that ends with turn ``question``, its last.

    Args:
        num_img_tokens: tokens of every image of the record, in order.
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
    return encode_conversation(processor.backend_tokenizer, chat, num_img_tokens, system=record.system)


@dataclass(frozen=True)
class Question:
    """One question as it is scored: its text, its reference answers and the images it is about."""

    id: str
    text: str
    references: tuple[str, ...]
    images: tuple[str, ...]


class QuestionDataset(Dataset[Sample]):
    """Every question with a weight, as a prompt to answer.

    Args:
        limit: take so many questions, drawn by ``seed`` and kept in the order of the file; of the sources of a mixture
            in proportion, and at least one of each.
        records: take the questions of these alone.
    """

    def __init__(
        self,
        table: RecordTable,
        processor: Phi3VProcessor,
        *,
        limit: int | None = None,
        seed: int = 0,
        records: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.table = table
        self.processor = processor
        self.reader = PageReader(table, processor.image_processor)
        self.index: npt.NDArray[np.int64] = table.questions()
        if records is not None:
            self.index = self.index[np.isin(self.index[:, 0], records)]
        if limit is not None and limit < len(self.index):
            random = np.random.default_rng(seed)
            _, of_source, counts = np.unique(
                self.sources() or np.zeros(len(self.index)), return_inverse=True, return_counts=True
            )
            chosen = [
                np.flatnonzero(of_source == source)[random.choice(count, size=share, replace=False)]
                for source, (count, share) in enumerate(zip(counts, share_out(limit, counts.tolist()), strict=True))
            ]
            self.index = self.index[np.sort(np.concatenate(chosen))]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def by_source(self) -> str:
        """How many are of each source of a mixture, for a line that tells how many there are."""
        counts = np.bincount(np.array(self.sources(), dtype=np.int64), minlength=len(self.table.names))
        told = ", ".join(f"{count:,} of {name}" for name, count in zip(self.table.names, counts, strict=True))
        return f" ({told})" if told else ""

    def question(self, index: int) -> Question:
        """What is asked, without the images' content."""
        record_index, turn_index = self.index[index]
        return question_of(self.table.as_written(int(record_index)), int(turn_index))

    def questions(self) -> Iterator[Question]:
        """All of them in order, read faster than one by one."""
        turns: dict[int, list[int]] = {}
        for record_index, turn_index in self.index.tolist():
            turns.setdefault(record_index, []).append(turn_index)
        for record_index, record in enumerate(self.table.all_as_written()):
            for turn_index in turns.get(record_index, ()):
                yield question_of(record, turn_index)

    def sources(self) -> list[int]:
        """Of each question the number of its source, where the table is a mixture."""
        return self.table.sources_of(self.index[:, 0])

    def prompt(self, index: int, num_img_tokens: Sequence[int]) -> list[int]:
        """The token ids of a prompt whose images have so many tokens each."""
        record_index, turn_index = self.index[index]
        record = upto_question(self.table[int(record_index)], int(turn_index))
        return encode_record(record, self.processor, num_img_tokens, question=int(turn_index)).input_ids

    def __getitem__(self, index: int) -> Sample:
        record_index, turn_index = self.index[index]
        return make_sample(self.reader, self.table[int(record_index)], self.processor, question=int(turn_index))


def question_of(record: Record, turn_index: int) -> Question:
    """What a turn of a record asks."""
    turn = record.turns[turn_index]
    name = record.id if len(record.turns) == 1 else f"{record.id}#{turn_index + 1}"
    images = upto_question(record, turn_index).images
    return Question(name, turn.user, turn.answers or (turn.assistant,), images)


@dataclass
class Collator:
    """Pads samples on the right to a batch.

    Args:
        pad_token_id: fills ``input_ids``.
        loss_weighting: ``sample`` weighs each label by one over its sample's number of labels, so that every sample
            weighs 1; ``token`` weighs every label 1.
    """

    pad_token_id: int
    loss_weighting: LossWeighting = "sample"

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """
        Returns:
            ``input_ids``, ``labels`` int64 (B, T), ``loss_weights`` float32 (B, T), ``lengths`` of the rows, ``counts``
            (see `Counts`), what `positions_of` gives, and with images what `stack_images` does.
        """
        rows = [sample.input_ids for sample in samples]
        ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        weights = torch.zeros(input_ids.shape)
        for row, sample in enumerate(samples):
            own = slice(0, len(sample.labels))
            labels[row, own] = torch.tensor(sample.labels, dtype=torch.int64)
            weights[row, own] = torch.tensor(label_weights(sample.labels, self.loss_weighting))
        lengths = tuple(map(len, rows))
        return {
            "input_ids": input_ids,
            "labels": labels,
            "loss_weights": weights,
            "lengths": lengths,
            "counts": count_samples(samples, weights, sum(lengths)),
            **positions_of(input_ids, labels),
            **stack_images(samples),
        }


def shared_tokens(samples: Sequence[Sample]) -> int:
    """Tokens at the beginning that all samples have in common, short of the last one before an answer.

    The loss uses that one's output once for each sample, so it belongs to the branches.
    """
    if len(samples) == 1:
        return 0
    limits = [
        next((place for place, label in enumerate(sample.labels) if label != IGNORE_INDEX), len(sample.labels)) - 1
        for sample in samples
    ]
    shared = min(limits)
    first = samples[0].input_ids
    for sample in samples[1:]:
        pairs = enumerate(zip(first[:shared], sample.input_ids[:shared], strict=True))
        shared = next((place for place, (a, b) in pairs if a != b), shared)
    return shared


def pack_row(groups: Sequence[Sequence[Sample]], loss_weighting: LossWeighting = "sample") -> dict[str, Any]:
    """One row out of groups of samples; the images of a group are those of its first sample.

    Returns:
        ``input_ids``, ``labels`` int64 and ``loss_weights`` float32 (1, T); ``layout``, the prefix and the branches of
        each group in tokens (see ``model/attention.py``); ``counts`` as of `Collator`; what `positions_of` gives, and
        with images what `stack_images` does, a page of several groups once.

    Raises:
        ImageAlignmentError: samples of a group differ before the last of their images.
    """
    layout: list[tuple[int, ...]] = []
    ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    for samples in groups:
        prefix = shared_tokens(samples)
        layout.append((prefix, *(len(sample.input_ids) - prefix for sample in samples)))
        ids += samples[0].input_ids[:prefix]
        labels += [IGNORE_INDEX] * prefix
        weights += [0.0] * prefix
        if len(samples) > 1 and any(token < 0 for sample in samples for token in sample.input_ids[prefix:]):
            indices = [sample.index for sample in samples]
            raise ImageAlignmentError(f"records {indices} share images and differ before the last of them")
        for sample in samples:
            ids += sample.input_ids[prefix:]
            labels += sample.labels[prefix:]
            weights += label_weights(sample.labels[prefix:], loss_weighting)
    input_ids, all_labels, loss_weights = torch.tensor([ids]), torch.tensor([labels]), torch.tensor([weights])
    return {
        "input_ids": input_ids,
        "labels": all_labels,
        "loss_weights": loss_weights,
        "layout": tuple(layout),
        **positions_of(input_ids, all_labels),
        "counts": count_samples([sample for samples in groups for sample in samples], loss_weights, len(ids)),
        **stack_images([samples[0] for samples in groups]),
    }


def label_weights(labels: Sequence[int], loss_weighting: LossWeighting) -> list[float]:
    """The loss weight of each label of a sample; 0 of those that are masked."""
    is_target = [label != IGNORE_INDEX for label in labels]
    weight = 1.0 / max(1, sum(is_target)) if loss_weighting == "sample" else 1.0
    return [weight * target for target in is_target]


def count_samples(samples: Sequence[Sample], weights: torch.Tensor, tokens: int) -> Counts:
    """The `Counts` of a batch with these loss weights."""
    questions = sum(sample.num_questions for sample in samples)
    return Counts(float(weights.sum()), len(samples), questions, tokens, tuple(sample.index for sample in samples))


def positions_of(input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Places in (B, T) laid out flat: ``image_positions`` of placeholders, an int64 (n,); ``target_positions``."""
    return {
        "image_positions": (input_ids < 0).flatten().nonzero()[:, 0],
        "target_positions": tuple(find_targets(labels).tolist()),
    }


def stack_images(samples: Sequence[Sample]) -> dict[str, Any]:
    """The pages of all images, each page once; nothing where there is none.

    Returns:
        ``pages`` uint8 (P, 3), all pixels page after page, or ``image_features`` where these were kept;
        ``image_sizes``, (height, width) of each page; ``page_index``, the page of each image in order.
    """
    images = [page for sample in samples for page in sample.pages]
    if not images:
        return {}
    distinct = {page.name: page for page in images}
    place = {name: index for index, name in enumerate(distinct)}
    contents = [page.content for page in distinct.values()]
    is_pixels = contents[0].dtype == torch.uint8
    return {
        **({"pages": flatten_pages(contents)} if is_pixels else {"image_features": torch.cat(contents)}),
        "image_sizes": tuple(page.size for page in distinct.values()),
        "page_index": tuple(place[page.name] for page in images),
    }
