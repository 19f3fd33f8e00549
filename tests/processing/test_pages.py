"""Cutting uint8 pages against the crops of the processor, which are held to the reference numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from PIL import Image

from phi3v import Phi3VImageProcessor
from phi3v.processing.hd_transform import cut_flat_pages, cut_pages, flatten_pages, num_distinct_crops


def test_pages_of_all_sizes_are_cut_as_the_processor_cuts_each(golden_images: Callable[[str], Image.Image]) -> None:
    """Equal to the bit, sub-crops and global views, together or alone: on the CPU the same kernels run."""
    processor = Phi3VImageProcessor(num_crops=4)
    images = [golden_images(name) for name in ("64x64", "300x900", "640x480", "1275x1650", "300x900")]
    pages = [processor.page(image) for image in images]
    sizes = [(page.shape[0], page.shape[1]) for page in pages]
    assert len(set(sizes)) < len(sizes)
    expected = processor(images)
    assert expected["image_sizes"].tolist() == [list(size) for size in sizes]
    crops = cut_flat_pages(flatten_pages(pages), sizes)
    counts = [num_distinct_crops(height // 336, width // 336) for height, width in sizes]
    assert crops.shape[0] == sum(counts)
    for pixel_values, own, count in zip(expected["pixel_values"], crops.split(counts), counts, strict=True):
        assert torch.equal(own, pixel_values[:count])


def test_a_page_of_one_crop_is_cut_once(golden_images: Callable[[str], Image.Image]) -> None:
    """Because its global view is that crop to the bit."""
    page = Phi3VImageProcessor(num_crops=1).page(golden_images("640x480"))
    view, crop = cut_pages(page[None])[0]
    assert torch.equal(view, crop)
    assert torch.equal(cut_flat_pages(flatten_pages([page]), [(336, 336)]), crop[None])


def test_own_mean_and_std() -> None:
    page = torch.full((1, 336, 672, 3), 51, dtype=torch.uint8)
    crops = cut_pages(page, mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25))
    assert crops.shape == (1, 3, 3, 336, 336)
    for channel, value in enumerate((0.1, 0.0, -0.4)):
        torch.testing.assert_close(crops[:, :, channel], torch.full_like(crops[:, :, channel], value))


def test_pixels_that_do_not_fit_the_sizes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"the pages have 112896 pixels, but their sizes \[\(336, 672\)\] have 225792"):
        cut_flat_pages(torch.zeros(336 * 336, 3, dtype=torch.uint8), [(336, 672)])


@pytest.mark.gpu
def test_the_device_changes_no_sub_crop() -> None:
    """Global views within 1e-5: sums of 16 products below 3, in another order."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    page = torch.randint(0, 256, (2, 672, 672, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    here, there = cut_pages(page), cut_pages(page.cuda()).cpu()
    assert torch.equal(here[:, 1:], there[:, 1:])
    torch.testing.assert_close(here[:, :1], there[:, :1], atol=1e-5, rtol=0)
