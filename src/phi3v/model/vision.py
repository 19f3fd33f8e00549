"""Images to tokens: CLIP tower, 2x2 merge, page layout, projector.

Shapes: ``N`` images, ``C`` crops of an image (global crop not counted), ``h`` x ``w`` its rows and columns of
crops, ``V`` width of the tower, ``H`` width of the decoder. A crop is 336 x 336 pixels, 24 x 24 patches and,
after 2x2 neighbours are merged, 12 x 12 tokens.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPVisionEmbeddings

from phi3v.model.configuration import Phi3VConfig
from phi3v.processing.hd_transform import CROP_SIZE, num_distinct_crops

PATCHES = 24  # a side of a crop, in CLIP's patches
TOKENS = PATCHES // 2  # a side of a crop, in tokens


class ClipVisionModel(nn.Module):
    """CLIP's vision transformer as far as it is used: patch features after the last layer but one.

    The last layer and ``post_layernorm`` are part of every checkpoint but never run; ``unused_parameters`` of
    the model names them.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # CLIP's own spelling
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """Features (n, 576, V) of normalised crops (n, 3, 336, 336); the class token is dropped."""
        hidden_states = self.pre_layrnorm(self.embeddings(crops))  # [n, 1 + 576, V]
        for layer in self.encoder.layers[:-1]:
            hidden_states = layer(hidden_states, None)
        return hidden_states[:, 1:]  # [n, 576, V]


class ClipTower(nn.Module):
    """The tower under its official name, ``img_processor.vision_model``."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.vision_model = ClipVisionModel(config)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.vision_model(crops)
        return features


def real_crops(pixel_values: torch.Tensor, image_sizes: list[tuple[int, int]]) -> tuple[torch.Tensor, list[int]]:
    """What the tower has to see of ``pixel_values`` (N, C + 1, 3, 336, 336): no padding, nothing twice.

    A page of one crop that equals its global view, as the processor makes them, comes once, except in a graph, which
    cannot look. A caller's may differ.

    Returns:
        (n, 3, 336, 336) and how many of them each image has.
    """
    counts = [1 + (height // CROP_SIZE) * (width // CROP_SIZE) for height, width in image_sizes]
    if not torch.compiler.is_compiling():
        for index in _shown_twice(pixel_values, counts):
            counts[index] = 1
    return torch.cat([pixel_values[index, :count] for index, count in enumerate(counts)]), counts


def merge_patches(features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Merge 2x2 neighbours and lay the crops of one page side by side.

    Args:
        features: (rows * columns, 576, V), crops in reading order.

    Returns:
        (12 * rows, 12 * columns, 4 * V); as `reshape_hd_patches_2x2merge` of the official image embedding.
    """
    width = features.shape[-1]
    merged = features.view(rows, columns, TOKENS, 2, TOKENS, 2, width)
    merged = merged.permute(0, 2, 1, 4, 3, 5, 6)  # [rows, 12, columns, 12, 2, 2, V]
    return merged.reshape(rows * TOKENS, columns * TOKENS, 4 * width)


def _shown_twice(pixel_values: torch.Tensor, counts: list[int]) -> list[int]:
    """Images of one crop that is the global view too."""
    single = [index for index, count in enumerate(counts) if count == 2]
    if not single:
        return []
    same = (pixel_values[single, 0] == pixel_values[single, 1]).flatten(1).all(dim=1)
    return [index for index, twice in zip(single, same.tolist(), strict=True) if twice]


class Phi3VImageEmbedding(nn.Module):
    """``vision_embed_tokens``: everything between pixels and the decoder's embeddings."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        vision_config = config.vision_config()
        width = 4 * vision_config.hidden_size
        self.img_processor = ClipTower(vision_config)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, width))  # between the page and the global image
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))  # ends every row of patches
        self.img_projection = nn.Sequential(
            nn.Linear(width, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )

    def _rows_with_ends(self, page: torch.Tensor) -> torch.Tensor:
        """Append ``sub_GN`` to each row of a page (rows, columns, 4V) and flatten it to (tokens, 4V)."""
        ends = self.sub_GN[0].expand(page.shape[0], 1, -1)
        return torch.cat([page, ends.to(page.dtype)], dim=1).flatten(0, 1)

    def forward(
        self, crops: torch.Tensor, image_sizes: list[tuple[int, int]], counts: list[int] | None = None
    ) -> torch.Tensor:
        """Features of all images, one image after the other.

        Args:
            crops: (n, 3, 336, 336) float, normalised; of each image its global crop, then the crops of its page.
            image_sizes: padded (height, width) of each image in pixels, multiples of 336.
            counts: crops of each image; by default an image of one crop has that one, which is its global view too
                (``hd_transform.num_distinct_crops``).

        Returns:
            (total tokens, H). An image of h x w crops gives ``(h * w + 1) * 144 + 1 + (h + 1) * 12`` tokens: its
            page, ``glb_GN``, its global view (order ``sub_glb``).
        """
        return self.project(self.img_processor(crops), image_sizes, counts)

    def project(
        self, features: torch.Tensor, image_sizes: list[tuple[int, int]], counts: list[int] | None = None
    ) -> torch.Tensor:
        """The tower's features (n, 576, V) laid out as pages and projected; else as `forward`."""
        grids = [(height // CROP_SIZE, width // CROP_SIZE) for height, width in image_sizes]
        if counts is None:
            counts = [num_distinct_crops(rows, columns) for rows, columns in grids]
        tokens = []
        for (rows, columns), image in zip(grids, features.split(counts), strict=True):
            tokens += [
                self._rows_with_ends(merge_patches(image[-rows * columns :], rows, columns)),
                self.glb_GN[0].to(image.dtype),
                self._rows_with_ends(merge_patches(image[:1], 1, 1)),
            ]
        projected: torch.Tensor = self.img_projection(torch.cat(tokens))
        return projected
