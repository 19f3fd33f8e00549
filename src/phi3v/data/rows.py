"""The rows of a plan, made of the records: padded, or packed; and a step's rows read ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from phi3v.data.batches import BatchPlan, Group, RowPlan, rows_of_rank
from phi3v.data.collate import (
    Collator,
    Counts,
    LossWeighting,
    OnBadSample,
    PageReader,
    Sample,
    check_placeholders,
    encode_record,
    pack_row,
)
from phi3v.data.features import FeatureStore
from phi3v.data.preferences import ANSWER_WEIGHTS, Preferences
from phi3v.data.readers import Readers
from phi3v.data.table import RecordTable
from phi3v.errors import UnavailableError, UserError
from phi3v.processing.conversation import IGNORE_INDEX
from phi3v.processing.processor import Phi3VProcessor


class RowDataset(Dataset[dict[str, Any]]):
    """Rows, made as a plan asks for them; the images of a group are decoded once.

    Args:
        packed: side by side, in place of padded.
        features: of the images, where a frozen vision part has made them already.
        on_bad: a group whose images cannot be read: raise that, or leave it out. A row that has no other is made of
            a record that can be read, and weighs nothing: every rank must run the same parts of the model.
        preferences: makes a record's samples of all its answers, in place of the record as it is.
    """

    def __init__(
        self,
        table: RecordTable,
        processor: Phi3VProcessor,
        loss_weighting: LossWeighting = "sample",
        *,
        packed: bool = False,
        features: FeatureStore | None = None,
        on_bad: OnBadSample = "stop",
        preferences: Preferences | None = None,
    ) -> None:
        self.table = table
        self.processor = processor
        self.reader = PageReader(table, processor.image_processor, features)
        self.loss_weighting = loss_weighting
        self.packed = packed
        self.on_bad = on_bad
        self.preferences = preferences

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, plan: RowPlan) -> dict[str, Any]:
        groups: list[list[Sample]] = []
        skipped: list[tuple[int, str]] = []
        for group in plan.row:
            try:
                groups.append(self.samples(group))
            except UserError as error:
                if self.on_bad == "stop" or isinstance(error, UnavailableError):
                    raise
                skipped += [(index, str(error).splitlines()[0]) for index in group]
                wrong = error
        weighs = bool(groups)
        if not groups:
            groups = [self._first_readable(plan.row[-1][-1], wrong)]
        row = self.collate(groups)
        if not weighs or plan.fills:
            row = without_weight(row)
        counts = Counts(0.0, 0, 0, 0) if plan.fills else row["counts"]._replace(skipped=tuple(skipped))
        return row | {"counts": counts, "ends_step": plan.ends_step}

    def collate(self, groups: list[list[Sample]]) -> dict[str, Any]:
        """The row of samples, as of `pack_row` or `Collator`."""
        if self.packed and self.preferences is not None:
            groups = [part for samples in groups for part in self.preferences.shareable(samples)]
        samples = [sample for group in groups for sample in group]
        if self.packed:
            row = pack_row(groups, self.loss_weighting)
        else:
            row = Collator(self.processor.tokenizer.pad_token_id, loss_weighting=self.loss_weighting)(samples)
        sources = self.table.sources_of(np.array([sample.index for sample in samples]))
        if self.preferences is not None:
            row = self.preferences.complete(row, samples)
        return with_sources(row, samples, sources, len(self.table.sources)) if sources else row

    def samples(self, group: Group) -> list[Sample]:
        """The samples of records about the same images.

        Raises:
            UserError: an image cannot be read, or the records have different images.
            ImageAlignmentError: placeholders and images do not fit together.
        """
        first = self.table[group[0]]
        pages = self.reader.pages(first)
        counts = [page.num_img_tokens for page in pages]
        samples: list[Sample] = []
        for index in group:
            record = self.table[index]
            if record.images != first.images:
                what = f"has other images than {self.table.where(first)}, though they are counted as the same"
                hint = "the token counts of its index are wrong: make it again with `phi3v data shard`"
                raise UserError(what, where=self.table.where(record), hint=hint)
            stream = encode_record(record, self.processor, counts)
            check_placeholders(stream.input_ids, pages, record, self.table.where(record))
            if self.preferences is not None:
                samples += self.preferences.samples(record, index, stream, pages, self.processor)
            else:
                samples.append(Sample(stream.input_ids, stream.labels, pages, record.num_questions, index))
        return samples

    def _first_readable(self, after: int, error: UserError) -> list[Sample]:
        """Those of the first record after one that cannot be read, going round; raises ``error`` if there is none."""
        for step in range(1, len(self.table)):
            try:
                return self.samples(((after + step) % len(self.table),))
            except UnavailableError:
                raise
            except UserError:
                continue
        raise error


def with_sources(row: dict[str, Any], samples: Sequence[Sample], sources: Sequence[int], count: int) -> dict[str, Any]:
    """A row of a mixture, which tells how much of it is of each source.

    Args:
        sources: of each sample.
        count: of sources.

    Returns:
        Also ``target_groups`` bool (sources, targets), or of answers ``answer_groups`` (sources, A) and ``pair_groups``
        (sources, P); and the counts of each source, where what samples share counts for the first of them.
    """
    all_sources, of_sample = torch.arange(count)[:, None], torch.tensor(sources)
    if "answer_tokens" in row:
        groups = {
            "answer_groups": of_sample == all_sources,
            "pair_groups": of_sample[row["pairs"][:, 0]] == all_sources,
        }
    else:
        # The first token of a row is no target.
        targets = torch.tensor([sum(label != IGNORE_INDEX for label in sample.labels[1:]) for sample in samples])
        groups = {"target_groups": of_sample.repeat_interleave(targets) == all_sources}
    layout = row.get("layout")
    if layout is None:
        tokens = [len(sample.input_ids) for sample in samples]
    else:
        tokens = [part + (prefix if place == 0 else 0) for prefix, *parts in layout for place, part in enumerate(parts)]
    records, total = [0] * count, [0] * count
    for sample, source, size in zip(samples, sources, tokens, strict=True):
        total[source] += size
        records[source] += getattr(sample, "place", 0) == 0
    return row | groups | {"counts": row["counts"]._replace(of_sources=(*records, *total))}


def without_weight(row: dict[str, Any]) -> dict[str, Any]:
    """A row that is computed as the others are and changes nothing, for ranks that must run one."""
    weights = {name: torch.zeros_like(row[name]) for name in ("loss_weights", *ANSWER_WEIGHTS) if name in row}
    return row | weights | {"counts": Counts(0.0, 0, 0, 0, row["counts"].records)}


def read_steps(
    plan: BatchPlan,
    rank: int,
    readers: Readers,
    epoch: int,
    *,
    first_step: int = 0,
    equal: bool = False,
    pin_memory: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """The steps of an epoch, each as the list of a rank's rows; nothing is read of those before ``first_step``.

    Args:
        readers: fetch the row of a `RowPlan`.
        equal: as of `rows_of_rank`.
        pin_memory: put tensors where a GPU copies from without waiting.
    """
    rows: list[dict[str, Any]] = []
    for row in readers.read(rows_of_rank(plan, rank, epoch, first_step=first_step, equal=equal)):
        ends_step = row.pop("ends_step")
        rows.append(_pinned(row) if pin_memory else row)
        if ends_step:
            yield rows
            rows = []


def _pinned(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in row.items()}
