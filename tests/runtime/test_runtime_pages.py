"""Cutting pages and laying out features in numpy, against what the model does in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from phi3v.model.configuration import Phi3VConfig
from phi3v.model.vision import Phi3VImageEmbedding
from phi3v.processing.hd_transform import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, cut_flat_pages, flatten_pages
from phi3v.runtime.pages import cut_page, image_statistics, lay_out

GRIDS = [(1, 1), (1, 2), (2, 1), (3, 1), (4, 4), (1, 7)]


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_pages_are_cut_as_in_torch(rows: int, columns: int) -> None:
    """Sub-crops to the bit; the global view within 1e-5, the order of its sums (values reach 2.7)."""
    page = np.random.default_rng(0).integers(0, 256, (336 * rows, 336 * columns, 3), dtype=np.uint8)
    expected = cut_flat_pages(flatten_pages([torch.from_numpy(page)]), [page.shape[:2]]).numpy()
    mean, std = np.float32(OPENAI_CLIP_MEAN), np.float32(OPENAI_CLIP_STD)
    crops, *grid = cut_page(page, mean, std)
    assert grid == [rows, columns]
    assert crops.dtype == np.float32
    assert crops.shape == expected.shape
    assert np.array_equal(crops[1:], expected[1:])
    np.testing.assert_allclose(crops[0], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_features_are_laid_out_as_in_torch(rows: int, columns: int, tiny_model_dir: Path) -> None:
    """Rows and columns of a page that is not square must not be exchanged."""
    torch.manual_seed(0)
    config = Phi3VConfig.from_pretrained(tiny_model_dir)
    vision = Phi3VImageEmbedding(config)
    vision.img_projection = torch.nn.Identity()
    torch.nn.init.normal_(vision.sub_GN)
    torch.nn.init.normal_(vision.glb_GN)
    features = torch.randn(1 if rows * columns == 1 else 1 + rows * columns, 576, config.vision_config().hidden_size)
    with torch.no_grad():
        expected = vision.project(features, [(336 * rows, 336 * columns)]).numpy()
        separators = vision.sub_GN.numpy().ravel(), vision.glb_GN.numpy().ravel()
    assert np.array_equal(lay_out(features.numpy(), rows, columns, *separators), expected)


def test_statistics(tiny_model_dir: Path) -> None:
    mean, std = image_statistics(tiny_model_dir)
    assert np.array_equal(mean, np.float32(OPENAI_CLIP_MEAN))
    assert np.array_equal(std, np.float32(OPENAI_CLIP_STD))
