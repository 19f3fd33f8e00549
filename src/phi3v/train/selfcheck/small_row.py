"""One small row of the run's data, with two groups, so that what sees too much is seen."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from phi3v.config import Packing, RunConfig
from phi3v.data.batches import Row, RowPlan
from phi3v.data.collate import Collator, Page, Sample, pack_row
from phi3v.data.lengths import RecordLengths
from phi3v.data.preferences import Preferences
from phi3v.data.rows import RowDataset
from phi3v.data.table import RecordTable
from phi3v.processing.conversation import IGNORE_INDEX
from phi3v.processing.hd_transform import CROP_SIZE
from phi3v.processing.processor import Phi3VProcessor


def small_row(
    config: RunConfig,
    lengths: RecordLengths,
    table: RecordTable,
    processor: Phi3VProcessor,
    preferences: Preferences | None,
) -> dict[str, Any]:
    """The smallest records side by side, as the run lays them, with one crop an image.

    Raises:
        UserError: an image cannot be read.
    """
    processor = copy.copy(processor)
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.num_crops = 1
    is_packed = config.data.packing != "none"
    weighting = config.training.loss_weighting
    dataset = RowDataset(table, processor, weighting, packed=is_packed, preferences=preferences)
    row = dataset[RowPlan(smallest_groups(lengths, shared=config.data.packing == "shared-image"), ends_step=True)]
    return {name: value for name, value in row.items() if name not in ("counts", "ends_step")}


def smallest_groups(lengths: RecordLengths, *, shared: bool) -> Row:
    """The records with the fewest tokens, of those with images if there are any: two of one page, and one of another.

    Args:
        shared: records of a page share it; otherwise two records by themselves.
    """
    with_images = lengths.crops > 0
    sizes = np.where(with_images == with_images.any(), lengths.tokens, np.iinfo(np.int64).max)
    order = np.argsort(sizes, kind="stable")
    first: tuple[int, ...] = (int(order[0]),)
    pages = lengths.page[order]
    if shared:
        _, inverse, counts = np.unique(pages, return_inverse=True, return_counts=True)
        several = np.flatnonzero((counts[inverse] > 1) & (lengths.prefix[order] > 0))
        if len(several):
            first = tuple(int(index) for index in order[pages == pages[several[0]]][:2])
    others = order[lengths.page[order] != lengths.page[first[0]]]
    if not len(others):  # all are about one page
        others = order[~np.isin(order, first)]
    return (first, (int(others[0]),)) if len(others) else (first,)


def drawn_row(vocabulary: int, packing: Packing) -> dict[str, Any]:
    """As `small_row` where there is no data: drawn tokens about two drawn images of one crop, two questions about one.

    Args:
        vocabulary: tokens are from its first 1,000.
    """
    generator = torch.Generator().manual_seed(0)
    side = (CROP_SIZE, CROP_SIZE)
    pages = [
        Page(f"drawn {number}", side, torch.randint(256, (*side, 3), generator=generator, dtype=torch.uint8))
        for number in range(2)
    ]

    def sample(page: Page, length: int) -> Sample:
        text: list[int] = torch.randint(3, min(vocabulary, 1000), (length,), generator=generator).tolist()
        prompt = [1, *[-1] * page.num_img_tokens, *text]
        return Sample([*prompt, *text[:8]], [IGNORE_INDEX] * len(prompt) + text[:8], [page])

    first, second, third = (sample(page, length) for page, length in zip((*pages, pages[0]), (50, 81, 37), strict=True))
    if packing == "none":
        row = Collator(0)([first, second])
    else:
        row = pack_row([[first, third], [second]] if packing == "shared-image" else [[first], [second]])
    return {name: value for name, value in row.items() if name != "counts"}
