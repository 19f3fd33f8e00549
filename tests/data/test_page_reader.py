"""Images of records as uint8 pages, each of a batch once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from phi3v.data import collate
from phi3v.data.collate import KEPT_PAGES, PageReader, Sample, stack_images
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.processing.hd_transform import flatten_pages
from phi3v.processing.image_processor import Phi3VImageProcessor


@pytest.fixture
def images(root: Path) -> list[str]:
    """Names of six images of different shape."""
    names = [f"{index}.png" for index in range(6)]
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 256, (200, 100 + 90 * index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    return names


def test_a_batch_holds_each_page_once_and_in_order(
    images: list[str], write: Callable[..., Path], record: Callable[..., dict[str, Any]]
) -> None:
    shown = [[0, 1], [1], [], [2, 0, 2]]
    lines = [record(str(n), images=[images[i] for i in group]) for n, group in enumerate(shown)]
    processor = Phi3VImageProcessor(num_crops=4)
    table = open_table(write(*lines))
    reader = PageReader(table, processor)
    samples = [Sample([], [], reader.pages(table[index])) for index in range(len(table))]
    batch = stack_images(samples)
    assert batch["page_index"] == (0, 1, 1, 2, 0, 2)
    expected = [processor.page(Image.open(table.images.where(name))) for name in images[:3]]
    assert batch["image_sizes"] == tuple((page.shape[0], page.shape[1]) for page in expected)
    assert batch["pages"].dtype == torch.uint8
    assert torch.equal(batch["pages"], flatten_pages(expected))
    assert stack_images([samples[2]]) == {}


def test_the_last_pages_are_kept_and_no_more(
    images: list[str],
    write: Callable[..., Path],
    record: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []
    load = collate.load_image

    def spy(name: str, **kwargs: Any) -> Image.Image:
        read.append(name)
        return load(name, **kwargs)

    monkeypatch.setattr(collate, "load_image", spy)
    table = open_table(write(*(record(name, images=[name]) for name in images)))
    reader = PageReader(table, Phi3VImageProcessor(num_crops=1))
    for index in (0, 0, 1, 0, 2, 3, 4, 0):  # 0 was used last but four
        reader.pages(table[index])
    assert read == [images[index] for index in (0, 1, 2, 3, 4)]
    reader.pages(table[1])
    assert read[-1] == images[1]
    assert len(reader._kept) == KEPT_PAGES == 4


def test_a_processor_with_other_statistics_is_refused(
    write: Callable[..., Path], record: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(UserError, match="this processor has others"):
        PageReader(open_table(write(record())), Phi3VImageProcessor(image_mean=(0.5, 0.5, 0.5)))
