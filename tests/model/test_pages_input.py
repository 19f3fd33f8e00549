"""uint8 pages through the model: as ``pixel_values``, and each page encoded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_inputs import Sample, pad_batch
from PIL import Image

from phi3v import Phi3VImageProcessor
from phi3v.processing.hd_transform import flatten_pages


def run(model: Any, given: dict[str, torch.Tensor], labels: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**given, labels=labels, logits_to_keep=None).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def page(golden_images: Callable[[str], Image.Image]) -> torch.Tensor:
    """The page of the case ``one_image``."""
    return Phi3VImageProcessor(num_crops=4).page(golden_images("640x480"))


def as_pages(sample: Sample, page: torch.Tensor) -> dict[str, torch.Tensor]:
    given = sample.inputs() | {"pages": flatten_pages([page])}
    del given["pixel_values"]
    return given


def test_pages_are_pixel_values(load_golden: Any, sample: Any, page: torch.Tensor) -> None:
    """To the bit: on the CPU the same numbers enter the tower."""
    model, given = load_golden(), sample("model", "one_image")
    assert given.image_sizes.tolist() == [[page.shape[0], page.shape[1]]]
    loss, gradients = run(model, given.inputs(), given.labels)
    own_loss, own = run(model, as_pages(given, page), given.labels)
    assert own_loss == loss
    assert own.keys() == gradients.keys()
    assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


def test_a_page_that_rows_share_is_encoded_once(load_golden: Any, sample: Any, page: torch.Tensor) -> None:
    """Loss and gradients as if each row had its own; 5e-6 of the largest entry, since sums go another way."""
    model, one = load_golden(), sample("model", "one_image")
    crops: list[int] = []
    tower = model.model.vision_embed_tokens.img_processor
    tower.register_forward_pre_hook(lambda _, args: crops.append(args[0].shape[0]))
    twice = pad_batch([one, one], "right")
    labels = torch.cat([one.labels, one.labels.roll(1)])
    labels[1, 0] = -100
    loss, gradients = run(model, twice, labels)
    shared = {name: value for name, value in twice.items() if name != "pixel_values"} | {
        "pages": flatten_pages([page]),
        "image_sizes": one.image_sizes,
        "page_index": torch.tensor([0, 0]),
    }
    own_loss, own = run(model, shared, labels)
    assert crops[0] == 2 * crops[1]
    assert own_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, atol=5e-6 * float(gradient.abs().max()) + 1e-9, rtol=0)


def test_pages_without_sizes_are_an_error(load_golden: Any, sample: Any, page: torch.Tensor) -> None:
    given = as_pages(sample("model", "one_image"), page)
    del given["image_sizes"]
    with pytest.raises(ValueError, match="pages came without image_sizes"):
        load_golden()(**given)
