"""Images to ``pixel_values`` and ``image_sizes``, equal to the official image processor.

Shapes: ``N`` images, ``C`` = ``num_crops``.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.processing_utils import ImagesKwargs

from phi3v.processing.hd_transform import (
    CROP_SIZE,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    TOKENS_PER_CROP,
    cut_pages,
    open_pixels,
    page_geometry,
    to_page,
    to_rgb,
)

Images = Image.Image | Sequence[Image.Image]
ImageSource = Image.Image | str | Path  # in memory, or a path, a URL or base64
LONGEST_PATH = 255  # the name of a file; asking the system for a longer one is an error


class Phi3VImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg] # as if it were no TypedDict
    """What may be given in place of the saved settings."""

    num_crops: int
    exif_orientation: bool


class Phi3VImageProcessor(BaseImageProcessor):
    """Cuts each image into at most ``num_crops`` crops plus one global view.

    Args:
        num_crops: maximum crops per image; recommended are 16 for one image, 4 for several.
        image_mean, image_std: of each channel, for values in 0..1.
        num_img_tokens: tokens per crop, 144; unused, but part of the official file.
        do_convert_rgb: convert images of other modes to RGB with `to_rgb`.
        exif_orientation: whether the model was tuned on images turned as their EXIF orientation says; read by whoever
            opens image files.

    Raises:
        ValueError: ``num_crops`` below 1.
    """

    valid_kwargs = Phi3VImagesKwargs
    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012 - as transformers defines it

    def __init__(
        self,
        num_crops: int = 16,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        num_img_tokens: int = TOKENS_PER_CROP,
        do_convert_rgb: bool = True,
        exif_orientation: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(num_crops, int) or num_crops < 1:
            raise ValueError(f"num_crops must be at least 1, got {num_crops!r}")
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
                raise ValueError(f"{name} must hold a number for each of three channels, got {values!r}")
        self.num_crops = num_crops
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.num_img_tokens = num_img_tokens
        self.do_convert_rgb = do_convert_rgb
        self.exif_orientation = exif_orientation

    def to_dict(self) -> dict[str, Any]:
        """What ``preprocessor_config.json`` holds: the official fields, and what differs from the official use."""
        fields: dict[str, Any] = super().to_dict()
        if self.exif_orientation:
            del fields["exif_orientation"]
        return fields

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """Tokens of a ``width`` x ``height`` image."""
        return page_geometry(width, height, self.num_crops).num_img_tokens

    def calc_num_image_tokens(self, images: Images) -> list[int]:
        """Tokens of each image."""
        return [self.calc_num_image_tokens_from_image_size(*image.size) for image in as_list(images)]

    def page(self, image: Image.Image) -> torch.Tensor:
        """An image resized and padded to its page, as training uses it.

        Returns:
            uint8 (height, width, 3), both multiples of 336.

        Raises:
            ValueError: the range of its grey values is unknown (`to_rgb`).
        """
        if self.do_convert_rgb:
            image = to_rgb(image)
        return to_page(image, self.num_crops)

    def crops(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """The crops of one image and the size of its page.

        Returns:
            float32 (1 + rows * columns, 3, 336, 336), global view first; (height, width) of the page.
        """
        page = self.page(image)
        return cut_pages(page[None], self.image_mean, self.image_std)[0], (page.shape[0], page.shape[1])

    def preprocess(self, images: Images, return_tensors: str | None = None) -> BatchFeature:
        """
        Returns:
            ``pixel_values`` float32 (N, C + 1, 3, 336, 336), global view first, zero-padded; ``image_sizes`` int64
            (N, 2), height and width of the page; ``num_img_tokens``, a list of N.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r}: only torch tensors ('pt') are supported")
        images = as_list(images)
        pixel_values = torch.zeros(len(images), self.num_crops + 1, 3, CROP_SIZE, CROP_SIZE)
        sizes = []
        for index, image in enumerate(images):
            crops, size = self.crops(image)
            pixel_values[index, : len(crops)] = crops
            sizes.append(size)
        return BatchFeature(
            {
                "pixel_values": pixel_values,
                "image_sizes": torch.tensor(sizes, dtype=torch.int64).view(-1, 2),
                "num_img_tokens": self.calc_num_image_tokens(images),
            }
        )

    def __call__(self, images: Images, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, return_tensors=return_tensors, **kwargs)


def open_image(
    source: ImageSource | np.ndarray[Any, Any] | torch.Tensor, *, exif_orientation: bool = True
) -> Image.Image:
    """An image as transformers' conventions name it: in memory, by path, by URL (fetched), as base64.

    Args:
        exif_orientation: turn one that is not yet in memory as its EXIF orientation says.

    Raises:
        OSError: it cannot be read, or is of another format than `FORMATS`; what is not fetched, raises as the hub's
            client does.
        ValueError: it is none of these.
    """
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str | Path):
        image: Image.Image = to_pil_image(source)
        return image
    text = str(source)
    content: Any = text
    if text.startswith(("http://", "https://")):
        content = io.BytesIO(get_session().get(text, follow_redirects=True).raise_for_status().content)
    elif text.startswith("data:") or len(text) > LONGEST_PATH or not Path(text).is_file():
        try:
            content = io.BytesIO(base64.b64decode(text.rpartition(",")[2], validate=True))
        except ValueError:
            raise ValueError(f"no image: neither a file, a URL nor base64: {text[:60]!r}") from None
    with open_pixels(content) as image:
        image.load()
        return ImageOps.exif_transpose(image) if exif_orientation else image


def group_images(
    images: ImageSource | Sequence[ImageSource | Sequence[ImageSource] | None] | None,
    places: Sequence[int],
    *,
    exif_orientation: bool = True,
) -> list[list[Image.Image]]:
    """The images of each prompt, opened.

    Args:
        images: a list for each prompt, or one after the other, to be dealt out by their ``places``.
        places: how many images each prompt has a place for.
        exif_orientation: as for `open_image`.

    Raises:
        ValueError: lists and prompts do not fit together.
    """
    if images is None:
        return [[] for _ in places]

    def is_list(item: object) -> bool:
        return isinstance(item, Sequence) and not isinstance(item, str)

    given: list[Any] = list(images) if is_list(images) else [images]  # type: ignore[arg-type]
    groups: list[Any] = [item or () for item in given if item is None or is_list(item)]
    if groups and len(groups) < len(given):
        raise ValueError("images are either one list, or a list for each prompt")
    if not groups:
        if len(places) > 1 and sum(places) != len(given):
            raise ValueError(f"the prompts have places for {sum(places)} images, but {len(given)} were given")
        rest = iter(given)
        groups = [[next(rest) for _ in range(count)] for count in places] if len(places) > 1 else [given]
    if len(groups) != len(places):
        raise ValueError(f"{len(places)} prompts but {len(groups)} lists of images")
    return [[open_image(image, exif_orientation=exif_orientation) for image in group] for group in groups]


def as_list(images: Images) -> list[Image.Image]:
    """One image or several, as a list."""
    return [images] if isinstance(images, Image.Image) else list(images)
