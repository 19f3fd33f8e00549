"""``pixel_values`` against the reference numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from phi3v import Phi3VImageProcessor
from phi3v.processing.hd_transform import CROP_SIZE

IMAGES = ("640x480", "300x900", "1275x1650", "64x64", "2000x250")


@pytest.mark.parametrize("num_crops", [1, 4, 16])
@pytest.mark.parametrize("name", IMAGES)
def test_equals_the_reference(
    name: str,
    num_crops: int,
    golden_cases: dict[str, Any],
    golden_arrays: dict[str, torch.Tensor],
    golden_images: Callable[[str], Image.Image],
) -> None:
    """Sub-crops within 1e-6 and the global crop within 1e-4, as asked; both are in fact equal here.

    Sub-crops are integers of PIL's, normalised: nothing to round but one division. The global crop comes from a
    bicubic kernel, whose order of summation may differ between builds of torch.
    """
    (case,) = [c for c in golden_cases["processor"] if (c["image"], c["num_crops"]) == (name, num_crops)]
    image = golden_images(name)
    processor = Phi3VImageProcessor(num_crops=num_crops)
    batch = processor(image)
    pixels = batch["pixel_values"]
    assert list(pixels.shape) == case["shape"]
    assert pixels.dtype == torch.float32
    assert batch["image_sizes"].dtype == torch.int64
    assert batch["image_sizes"].tolist() == [case["image_size"]]
    assert batch["num_img_tokens"] == [case["num_img_tokens"]]
    assert processor.calc_num_image_tokens(image) == [case["num_img_tokens"]]
    sample, reference = pixels[0, :, :, 5::24, 3::24], golden_arrays[case["sample"]]
    torch.testing.assert_close(sample[1:], reference[1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(sample[:1], reference[:1], atol=1e-4, rtol=0)
    # Over every pixel, not the sample alone. The only inexact part is the global crop: 3 * 336 * 336 values, of
    # which 1e-6 each on average is far beyond what another order of summation does.
    tolerance = 3 * CROP_SIZE**2 * 1e-6
    assert float(pixels.double().sum()) == pytest.approx(case["sum"], abs=tolerance)
    assert float(pixels.double().abs().sum()) == pytest.approx(case["abs_sum"], abs=tolerance)


def test_every_case_is_covered(golden_cases: dict[str, Any]) -> None:
    assert {(c["image"], c["num_crops"]) for c in golden_cases["processor"]} == {
        (name, num_crops) for name in IMAGES for num_crops in (1, 4, 16)
    }


def test_several_images_are_each_as_alone(golden_images: Callable[[str], Image.Image]) -> None:
    processor = Phi3VImageProcessor(num_crops=4)
    images = [golden_images(name) for name in ("64x64", "300x900", "640x480")]
    together = processor(images)
    for index, image in enumerate(images):
        alone = processor(image)
        assert torch.equal(together["pixel_values"][index], alone["pixel_values"][0])
        assert torch.equal(together["image_sizes"][index], alone["image_sizes"][0])
    assert processor.calc_num_image_tokens(images) == together["num_img_tokens"]


def test_crops_behind_the_real_ones_are_zero(golden_images: Callable[[str], Image.Image]) -> None:
    batch = Phi3VImageProcessor(num_crops=4)(golden_images("300x900"))
    real = 1 + int(batch["image_sizes"].prod()) // CROP_SIZE**2
    assert real == 4
    assert batch["pixel_values"][0, :real].abs().amax(dim=(1, 2, 3)).min() > 0
    assert (batch["pixel_values"][0, real:] == 0).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_every_mode(mode: str) -> None:
    batch = Phi3VImageProcessor(num_crops=1)(Image.new(mode, (50, 40)))
    assert batch["pixel_values"].isfinite().all()


@pytest.mark.parametrize("num_crops", [0, -3])
def test_no_crop_is_an_error(num_crops: int) -> None:
    with pytest.raises(ValueError, match=rf"num_crops must be at least 1, got {num_crops}"):
        Phi3VImageProcessor(num_crops=num_crops)


def test_other_tensor_kinds_are_an_error() -> None:
    with pytest.raises(ValueError, match="only torch tensors"):
        Phi3VImageProcessor()(Image.new("RGB", (8, 8)), return_tensors="np")
