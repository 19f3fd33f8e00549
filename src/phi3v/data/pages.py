"""Images of records as uint8 pages: decoded, resized and padded; all else is the model's device's work."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from phi3v.data.features import FeatureStore
from phi3v.data.images import image_size, load_image
from phi3v.data.schema import Record
from phi3v.data.table import RecordTable
from phi3v.errors import UserError
from phi3v.processing.hd_transform import page_geometry
from phi3v.processing.image_processor import Phi3VImageProcessor
from phi3v.processing.pages import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

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
        pixels = self.image_processor.page(load_image(name, **settings))
        return Page(name, (pixels.shape[0], pixels.shape[1]), pixels)
