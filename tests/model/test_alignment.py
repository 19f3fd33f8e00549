"""Images and placeholders that do not fit together: an error with both counts and the row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_inputs import Sample, pad_batch

from phi3v.processing.hd_transform import ImageAlignmentError, check_image_alignment


def without_token(ids: torch.Tensor, position: int) -> torch.Tensor:
    return torch.cat([ids[:, :position], ids[:, position + 1 :]], 1)


def with_token(ids: torch.Tensor, position: int) -> torch.Tensor:
    return torch.cat([ids[:, : position + 1], ids[:, position:]], 1)


@pytest.mark.parametrize(("change", "found"), [(without_token, 756), (with_token, 758)])
@pytest.mark.parametrize("row", [0, 1])
def test_too_few_or_too_many_placeholders(
    change: Callable[[torch.Tensor, int], torch.Tensor], found: int, row: int, load_golden: Any, sample: Any
) -> None:
    good = sample("model", "one_image")
    inside = int((good.input_ids[0] == -1).nonzero()[5])
    bad = Sample(change(good.input_ids, inside), good.pixel_values, good.image_sizes)
    rows = [good, good]
    rows[row] = bad
    message = f"row {row}: image 1 has {found} placeholder tokens but 757 features \\(672 x 672 pixels\\)"
    for side in ("left", "right"):
        with pytest.raises(ImageAlignmentError, match=message):
            load_golden()(**pad_batch(rows, side))


def test_missing_and_extra_images(load_golden: Any, sample: Any) -> None:
    model = load_golden()
    two = sample("model", "two_images")
    given = pad_batch([sample("text"), two], "left")
    fewer = given | {"pixel_values": given["pixel_values"][:1], "image_sizes": given["image_sizes"][:1]}
    with pytest.raises(ImageAlignmentError, match=r"placeholders for 2 images but 1 images .*row: \{0: 0, 1: 2\}"):
        model(**fewer)
    more = given | {name: given[name][[0, 1, 1]] for name in ("pixel_values", "image_sizes")}
    with pytest.raises(ImageAlignmentError, match=r"placeholders for 2 images but 3 images .*row: \{0: 0, 1: 2\}"):
        model(**more)
    none = {name: given[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ImageAlignmentError, match=r"placeholders for 2 images but 0 images .*row: \{0: 0, 1: 2\}"):
        model(**none)
    text = sample("text").inputs() | {name: given[name] for name in ("pixel_values", "image_sizes")}
    with pytest.raises(ImageAlignmentError, match=r"placeholders for 0 images but 2 images .*row: \{0: 0\}"):
        model(**text)


def test_images_in_another_order(load_golden: Any, sample: Any) -> None:
    """300x900 (3 crops) and 1275x1650 (4): swapped, their counts do not fit."""
    given = sample("model", "two_images").inputs()
    swapped = given | {name: given[name].flip(0) for name in ("pixel_values", "image_sizes")}
    with pytest.raises(ImageAlignmentError, match="row 0: image 1 has 625 placeholder tokens but 757 features"):
        load_golden()(**swapped)


def test_pixels_without_sizes(load_golden: Any, sample: Any) -> None:
    given = sample("model", "one_image").inputs()
    del given["image_sizes"]
    with pytest.raises(ValueError, match="pixel_values came without image_sizes"):
        load_golden()(**given)


def test_generation_checks_too(load_golden: Any, sample: Any) -> None:
    given = sample("generate", "one_image").inputs()
    given["input_ids"] = without_token(given["input_ids"], 10)
    given["attention_mask"] = given["attention_mask"][:, 1:]
    with pytest.raises(ImageAlignmentError, match="row 0: image 1 has 756 placeholder tokens but 757 features"):
        load_golden().generate(**given, max_new_tokens=2)


def test_neighbouring_runs_are_told_apart() -> None:
    """Two images with no text between them, and one image cut in two."""
    crop = (336, 336)
    touching = torch.tensor([[1] + [-1] * 313 + [-2] * 313 + [2]])
    check_image_alignment(touching, [crop, crop])
    cut = torch.tensor([[1] + [-1] * 313 + [5] + [-1] * 313])
    check_image_alignment(cut, [crop, crop])  # the same number again is another image, as after packing
    with pytest.raises(ImageAlignmentError, match="placeholders for 2 images but 1 images"):
        check_image_alignment(torch.tensor([[-1] * 100 + [5] + [-1] * 213]), [crop])


def test_a_run_ends_with_its_row() -> None:
    rows = torch.tensor([[5] * 100 + [-1] * 313, [-1] * 313 + [5] * 100])
    check_image_alignment(rows, [(336, 336)] * 2)
