"""Pages to normalised crops, and the tower's features to pages of tokens: in numpy, what the model does in torch.

Shapes: ``r`` x ``c`` rows and columns of crops, ``n`` crops, ``V`` width of the tower.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from phi3v.json_files import read_json
from phi3v.processing.hd_transform import CROP_SIZE, PREPROCESSOR_CONFIG

Floats = npt.NDArray[np.float32]

CUBIC = -0.75  # the coefficient of torch's bicubic interpolation
TOKENS = 12  # a side of a crop, in tokens of 2 x 2 patches


def image_statistics(folder: Path) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each channel, by which a model's images are normalised."""
    fields = read_json(folder / PREPROCESSOR_CONFIG)
    return np.array(fields["image_mean"], np.float32), np.array(fields["image_std"], np.float32)


def cut_page(page: npt.NDArray[np.uint8], mean: Floats, std: Floats) -> tuple[Floats, int, int]:
    """As `processing.hd_transform.cut_pages` and `num_distinct_crops`: a page of one crop is its own global view.

    Args:
        page: (r * 336, c * 336, 3).
        mean, std: of each channel, for values in 0..1.

    Returns:
        (n, 3, 336, 336), global view first, then the page's crops row by row; r; c.
    """
    rows, columns = page.shape[0] // CROP_SIZE, page.shape[1] // CROP_SIZE
    pixels = page.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    if rows * columns == 1:
        return pixels[None], 1, 1
    view = bicubic(page.shape[0]) @ pixels @ bicubic(page.shape[1]).T
    grid = pixels.reshape(3, rows, CROP_SIZE, columns, CROP_SIZE).transpose(1, 3, 0, 2, 4)
    return np.concatenate([view[None], grid.reshape(-1, 3, CROP_SIZE, CROP_SIZE)]), rows, columns


def bicubic(size: int) -> Floats:
    """The matrix (336, ``size``) that resizes a side as ``torch.nn.functional.interpolate(mode="bicubic")`` does.

    Without antialias or aligned corners; beyond the edge its pixels repeat. The kernel is Keys' (1981) with
    ``a`` = -0.75.
    """
    places = (np.arange(CROP_SIZE) + 0.5) * (size / CROP_SIZE) - 0.5
    first = np.floor(places).astype(np.int64)
    matrix = np.zeros((CROP_SIZE, size))
    for tap in range(-1, 3):
        distance = np.abs(places - first - tap)
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        far = ((CUBIC * distance - 5 * CUBIC) * distance + 8 * CUBIC) * distance - 4 * CUBIC
        np.add.at(matrix, (np.arange(CROP_SIZE), (first + tap).clip(0, size - 1)), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


def lay_out(features: Floats, rows: int, columns: int, row_end: Floats, separator: Floats) -> Floats:
    """The tower's features (n, 576, V) of a page as its tokens (t, 4 * V), before they are projected.

    As `model.vision.Phi3VImageEmbedding.project`: the page, ``separator``, the global view; ``row_end`` closes every
    row of patches.
    """

    def lines(crops: Floats, rows: int, columns: int) -> Floats:
        width = crops.shape[-1]
        merged = crops.reshape(rows, columns, TOKENS, 2, TOKENS, 2, width).transpose(0, 2, 1, 4, 3, 5, 6)
        page = merged.reshape(rows * TOKENS, columns * TOKENS, 4 * width)
        ends = np.broadcast_to(row_end, (len(page), 1, 4 * width))
        return np.concatenate([page, ends], axis=1).reshape(-1, 4 * width)

    page, view = lines(features[-rows * columns :], rows, columns), lines(features[:1], 1, 1)
    return np.concatenate([page, separator[None], view])
