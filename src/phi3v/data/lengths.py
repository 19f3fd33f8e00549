"""How long records are: the one place that counts tokens and crops, for everything that plans by them.

What does not depend on ``num_crops`` is counted once for each data file and tokenizer, in parallel, and kept beside the
file's table. Images are not decoded: their headers tell their sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from phi3v.data.cache import digest, keep_arrays, recall_arrays
from phi3v.data.progress import LateProgress
from phi3v.data.schema import Record
from phi3v.data.sizes import image_sizes
from phi3v.errors import UserError
from phi3v.machine import available_cores
from phi3v.processing.hd_transform import num_img_tokens, page_geometry

if TYPE_CHECKING:
    from phi3v.data.table import RecordTable
    from phi3v.processing.processor import Phi3VProcessor

Ints = npt.NDArray[np.int64]

VERSION = 1  # of the kept files: raise it whenever the same record would be counted otherwise
LONG_CONTEXT = 4096  # longer samples use LongRoPE's long factors, unless the model's configuration says otherwise
RELEASED_CONTEXT = 131_072  # max_position_embeddings of the released models
RELEASED_CROPS = (16, 4)  # what they advise for one image and for several
CHARACTERS_PER_TOKEN = 4  # of texts, where there is no tokenizer to ask
# Tokens at most of what a turn, and an image, have around them: role, line breaks, ends; BOS of each chunk of text.
_AROUND = 32
SHOWN_LINES = 5
LENGTH_HINT = "split the record, give it fewer images, lower model.num_crops, or leave it out"

CHUNK = 256  # records that a process counts at a time
PARALLEL = 4096  # records from which on processes are worth starting


class RecordCount(NamedTuple):
    """Of one record: its tokens that are no image, those that the loss is on; and for each turn the tokens of the
    prompt that ends with its question, those up to the last image (0 if there is none), and a key that is equal for
    prompts which are the same up to there; and the tokens of its last answer and of each rejected one.
    """

    text: int
    targets: int
    prompts: list[int]
    prefixes: list[int]
    keys: list[bytes]
    answers: list[int]


def _derived() -> Ints:
    """Of a field of `RecordLengths` that follows from the others where every record is one sample."""
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class RecordLengths:
    """``n`` records at one ``num_crops``.

    Attributes:
        tokens: (n,) of the whole record.
        image_tokens: (n,) those that are images.
        targets: (n,) those that the loss is on.
        crops: (n,) that run through the tower, global views included.
        prefix: (n,) tokens up to the last image, which records of the same page have in common; 0: shares nothing.
        page: (n,) equal for records that may share their prefix.
        answers: (n,) samples that a record is: 1, or of preferences one for each answer; they have the prompt in
            common, and ``tokens`` and ``image_tokens`` count it once.
        below: (n,) tokens that a record adds to a group of its page.
        own_prefix: (n,) tokens that its samples share where it is the only record of a group.
        longest: (n,) tokens of its longest sample.
        separate, squared: (n,) sums of the tokens of its samples, and of their squares, each by itself.
    """

    tokens: Ints
    image_tokens: Ints
    targets: Ints
    crops: Ints
    prefix: Ints
    page: Ints
    answers: Ints = field(default_factory=_derived)
    below: Ints = field(default_factory=_derived)
    own_prefix: Ints = field(default_factory=_derived)
    longest: Ints = field(default_factory=_derived)
    separate: Ints = field(default_factory=_derived)
    squared: Ints = field(default_factory=_derived)

    def __post_init__(self) -> None:
        if len(self.answers) != len(self.tokens):  # every record is one sample
            tokens, one = self.tokens, np.ones_like(self.tokens)
            derived = {"answers": one, "below": tokens - self.prefix, "own_prefix": 0 * one, "longest": tokens}
            self.__dict__.update(derived, separate=tokens, squared=tokens**2)

    def __len__(self) -> int:
        return len(self.tokens)

    def repeated(self, times: int) -> RecordLengths:
        """As if there were so many times as many records, about other images."""
        arrays = {each.name: np.tile(getattr(self, each.name), times) for each in fields(self)}
        pages = int(self.page.max()) + 1
        return RecordLengths(**arrays | {"page": arrays["page"] + pages * np.repeat(np.arange(times), len(self))})


@dataclass(frozen=True)
class TableLengths:
    """``n`` records of ``t`` turns with ``m`` images, at whatever ``num_crops``.

    Attributes:
        text, targets: (n,) as of `RecordCount`.
        turns: (n,) number of turns of each record.
        prompts, prefixes: (t,) as of `RecordCount`.
        pages: (t,) equal where the keys are.
        images: (t,) number of images of each turn.
        answers: tokens of each record's last answer and its rejected ones, one record after the other.
        alternatives: (n,) number of these.
        sizes: (m, 2) width and height of each image; 0 where its header cannot be read.
    """

    text: Ints
    targets: Ints
    turns: Ints
    prompts: Ints
    prefixes: Ints
    pages: Ints
    images: Ints
    answers: Ints
    alternatives: Ints
    sizes: Ints

    def __len__(self) -> int:
        return len(self.text)

    @cached_property
    def distinct_sizes(self) -> tuple[Ints, Ints]:
        """The sizes that occur, and the place of each image's size among them."""
        both = self.sizes[:, 0] << 32 | self.sizes[:, 1]  # which is sorted faster than pairs
        distinct, place = np.unique(both, return_inverse=True)
        return np.stack([distinct >> 32, distinct & 0xFFFFFFFF], axis=1), place

    @cached_property
    def first_turn(self) -> Ints:
        """(n,) place of each record's first turn."""
        return np.asarray(np.cumsum(self.turns) - self.turns)

    @cached_property
    def image_record(self) -> Ints:
        """(m,) the record of each image."""
        return np.repeat(np.repeat(np.arange(len(self)), self.turns), self.images)

    def at(self, num_crops: int, long_context_start: int = LONG_CONTEXT) -> RecordLengths:
        """All records at ``num_crops``.

        Args:
            long_context_start: longer samples use other rotary factors (LongRoPE), so records on both sides of it
                cannot share a prefix, even of the same page.
        """
        image_tokens, record_crops = self.of_images(num_crops)
        tokens = self.text + image_tokens
        first = self.first_turn
        # Only what is the same for all records of a page can be shared: no answer may stand before the last image.
        shares = (np.bincount(self.image_record, minlength=len(self)) == self.images[first]) & (self.images[first] > 0)
        alone = 2 * (int(self.pages.max()) + 1) + np.arange(len(self))
        return RecordLengths(
            tokens=tokens,
            image_tokens=image_tokens,
            targets=self.targets,
            crops=record_crops,
            prefix=np.where(shares, self.prefixes[first] + image_tokens, 0),
            page=np.where(shares, 2 * self.pages[first] + (tokens > long_context_start), alone),
        )

    def prompts_at(self, questions: Ints, num_crops: int, long_context_start: int) -> tuple[Ints, Ints, Ints]:
        """Tokens, prefix and page of prompts, as of `RecordLengths`.

        Args:
            questions: (q, 2) the record and the turn that each prompt ends with.
        """
        per_image, _ = self._of_images(num_crops)
        turn_of_image = np.repeat(np.arange(len(self.images)), self.images)
        of_turns = np.bincount(turn_of_image, per_image, len(self.images)).astype(np.int64)
        first = self.first_turn[questions[:, 0]]
        turn = first + questions[:, 1]
        upto = np.cumsum(of_turns)
        image_tokens = upto[turn] - upto[first] + of_turns[first]
        tokens = self.prompts[turn] + image_tokens
        prefix = np.where(self.prefixes[turn] > 0, self.prefixes[turn] + image_tokens, 0)
        prefix[(prefix > long_context_start) != (tokens > long_context_start)] = 0
        alone = int(self.pages.max(initial=0)) + 1 + np.arange(len(questions))
        return tokens, prefix, np.where(prefix > 0, self.pages[turn], alone)

    def of_images(self, num_crops: int) -> tuple[Ints, Ints]:
        """Tokens and crops of all images of each record."""
        of = self.image_record
        tokens, crops = (np.bincount(of, each, len(self)).astype(np.int64) for each in self._of_images(num_crops))
        return tokens, crops

    def _of_images(self, num_crops: int) -> tuple[Ints, Ints]:
        """Tokens and crops of each image."""
        sizes, place = self.distinct_sizes
        counts = np.zeros((2, len(sizes)), dtype=np.int64)
        for number, (width, height) in enumerate(sizes.tolist()):
            if width:
                page = page_geometry(width, height, num_crops)
                counts[:, number] = page.num_img_tokens, page.num_distinct_crops
        return counts[0, place], counts[1, place]


def count_record(record: Record, processor: Phi3VProcessor | None) -> RecordCount:
    """The tokens of a record by the model's tokenizer; without one, estimated."""
    if processor is None:
        return _estimate(record)
    from phi3v.data.collate import encode_record  # takes seconds to import, and a check may do without
    from phi3v.processing.conversation import IGNORE_INDEX, tokenize_answer

    # One token an image, and its own number added elsewhere: the runs of a page would cost the most.
    stream = encode_record(record, processor, [1] * len(record.images))
    prompts, prefixes = [], []
    images = prefix = 0
    for turn, end in zip(record.turns, stream.prompts, strict=True):
        images += len(turn.images)
        if turn.images:
            prefix = end - next(back for back in range(end) if stream.input_ids[end - 1 - back] < 0) - images
        prompts.append(end - images)
        prefixes.append(prefix)
    targets = sum(label != IGNORE_INDEX for label in stream.labels)
    rejected = [len(tokenize_answer(processor.backend_tokenizer, text)) for text in record.rejected]
    answers = [len(stream.input_ids) - stream.prompts[-1], *rejected]
    return RecordCount(len(stream.input_ids) - images, targets, prompts, prefixes, page_keys(record), answers)


def _estimate(record: Record) -> RecordCount:
    """By characters, and what a turn and an image have around them."""
    text = 2 + len(record.system or "") / CHARACTERS_PER_TOKEN
    answers, prefix = 0.0, 0
    prompts, prefixes = [], []
    for turn in record.turns:
        if turn.images:
            before = (turn.image_offsets or [0])[-1] / CHARACTERS_PER_TOKEN
            prefix = int(text + before) + 2 + 3 * (len(turn.images) - 1)
        text += 8 + 3 * len(turn.images) + len(turn.user) / CHARACTERS_PER_TOKEN
        prompts.append(int(text) - 3)
        prefixes.append(prefix)
        answer = len(turn.assistant) / CHARACTERS_PER_TOKEN
        text += answer
        answers += turn.weight * answer
    last = [3 + len(answer) // CHARACTERS_PER_TOKEN for answer in (record.turns[-1].assistant, *record.rejected)]
    targets = int(answers) + 2 * record.num_questions + 1
    return RecordCount(int(text), targets, prompts, prefixes, page_keys(record), last)


def page_keys(record: Record) -> list[bytes]:
    """For each turn a digest of all that its prompt holds up to its last image."""
    digest = hashlib.blake2b(repr(record.system).encode(), digest_size=16)
    keys, key = [], b""
    for turn in record.turns:
        if turn.images:
            before = turn.user[: turn.image_offsets[-1]] if turn.image_offsets else ""
            own = digest.copy()
            own.update(repr((turn.images, turn.image_offsets, before)).encode())
            key = own.digest()
        keys.append(key)
        digest.update(repr((turn.images, turn.image_offsets, turn.user, turn.assistant)).encode())
    return keys


def measure_table(
    table: RecordTable, processor: Phi3VProcessor | None, *, skip_unreadable: bool = False, progress: bool = False
) -> TableLengths:
    """The lengths of all records; kept in the cache, where that can be written.

    Args:
        processor: with the model's tokenizer; without one tokens are estimated.
        skip_unreadable: an image whose header cannot be read has no tokens, in place of an error.
        progress: show a bar if it takes long and standard error is a terminal.

    Raises:
        UserError: the header of an image cannot be read; names the line and the field.
    """
    sizes = image_sizes(table, skip_unreadable=skip_unreadable)
    turns, images = table.turn_counts(), table.turn_image_counts()
    file = table.folder / tokens_file(processor)
    rejected = table.rejected_counts().astype(np.int64)
    shapes = {"text": len(turns), "targets": len(turns)} | dict.fromkeys(("prompts", "prefixes", "pages"), len(images))
    shapes["answers"] = len(turns) + int(rejected.sum())
    kept = recall_arrays(file, shapes)
    if kept is None or any(array.ndim != 1 or (array < 0).any() for array in kept.values()):
        kept = dict(zip(shapes, _count_all(table, processor, progress), strict=True))
        keep_arrays(file, kept)
    _, image = table.distinct_images()
    return TableLengths(**kept, turns=turns, images=images, alternatives=1 + rejected, sizes=sizes[image])


def tokens_file(processor: Phi3VProcessor | None) -> str:
    """The name of the file with what `measure_table` counts by a tokenizer."""
    tokenizer = processor.backend_tokenizer.to_str() if processor is not None else ""
    return f"tokens-{digest(VERSION, tokenizer)}.npz"


def _count_all(table: RecordTable, processor: Phi3VProcessor | None, progress: bool) -> list[Ints]:
    """The fields of `RecordCount` for all records, one after the other, with a number in place of each key."""
    from phi3v.data.readers import reading  # which imports torch

    def count_chunk(start: int) -> tuple[list[Ints], list[bytes]]:
        counts = [count_record(record, processor) for record in table.records(start, start + CHUNK)]
        text, targets, *ragged = zip(*counts, strict=True)
        prompts, prefixes, keys, answers = (list(chain.from_iterable(values)) for values in ragged)
        return [np.array(values, dtype=np.int64) for values in (text, targets, prompts, prefixes, answers)], keys

    numbers: dict[bytes, int] = {}
    parts: list[list[Ints]] = []
    workers = available_cores() if processor is not None and len(table) >= PARALLEL else 0
    with (
        LateProgress("measuring records", len(table), enabled=progress) as bar,
        reading(count_chunk, range(0, len(table), CHUNK), workers) as chunks,
    ):
        for (*arrays, answers), keys in chunks:
            pages = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
            parts.append([*arrays, pages, answers])
            bar.advance(len(arrays[0]))
    return [np.concatenate(values) for values in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Context:
    """How many tokens of a record a model reads.

    Attributes:
        tokens: its ``max_position_embeddings``.
        processor: counts them; without one they are estimated.
    """

    tokens: int = RELEASED_CONTEXT
    processor: Phi3VProcessor | None = None

    def may_exceed(self, record: Record) -> bool:
        """Whether a record is perhaps too long; if not, it needs no counting."""
        crops = self.processor.image_processor.num_crops if self.processor is not None else max(RELEASED_CROPS)
        texts = [record.system or "", *(text for turn in record.turns for text in (turn.user, turn.assistant))]
        around = _AROUND * (1 + len(record.turns))
        # A page of one column has the most row ends. A token has a byte at least.
        images = len(record.images) * (num_img_tokens(crops, 1) + _AROUND)
        return sum(len(text.encode()) for text in texts) + around + images > self.tokens

    def count(self, record: Record, image_sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens of a record, from its texts and the sizes of its images."""
        crops = RELEASED_CROPS[len(image_sizes) > 1]
        if self.processor is not None:
            crops = self.processor.image_processor.num_crops
        pages = sum(page_geometry(width, height, crops).num_img_tokens for width, height in image_sizes)
        return count_record(record, self.processor).text + pages

    def too_long(self, tokens: int) -> str:
        """What is wrong with a record of so many tokens."""
        about, which = (f"about {round(tokens, -3):,}", "Phi-3.5-vision")
        if self.processor is not None:
            about, which = f"{tokens:,}", "the model"
        return f"the record has {about} tokens, and {which} reads {self.tokens:,} (max_position_embeddings)"


def require_context(table: RecordTable, context: Context, lengths: RecordLengths) -> None:
    """Check that the model can read every record whole.

    Raises:
        UserError: it cannot; names lines and lengths.
    """
    too_long = (lengths.longest > context.tokens).nonzero()[0].tolist()
    if not too_long:
        return
    records = [table[index] for index in too_long[: 1 + SHOWN_LINES]]
    what = context.too_long(int(lengths.longest[too_long[0]]))
    if len(too_long) > 1:
        shown = zip(
            map(table.line_of, records[1:]), lengths.longest[too_long[1 : 1 + SHOWN_LINES]].tolist(), strict=True
        )
        others = ", ".join(f"{line} ({tokens:,})" for line, tokens in shown)
        what += f"; {len(too_long) - 1} more are too long: {others}" + ", …" * (len(too_long) > 1 + SHOWN_LINES)
    raise UserError(what, where=table.where(records[0]), hint=LENGTH_HINT)
