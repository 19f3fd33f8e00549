"""``phi3v bench preprocess``: what a page costs a core, as uint8 pages and as the official processor's float crops.

One page at a time, from the file's bytes; CPU time of one thread, medians over pages and rounds. The variants take
turns, so that a busy machine slows all of them, and are compared bit by bit first.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from phi3v.bench.counting import one_thread
from phi3v.errors import UserError
from phi3v.processing.hd_transform import CROP_SIZE, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, cut_pages, page_geometry
from phi3v.processing.image_processor import Phi3VImageProcessor


def decode(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def plain_crops(content: bytes, num_crops: int) -> torch.Tensor:
    """float32 (num_crops + 1, 3, 336, 336), step by step as ``processing_phi3_v.py``.

    Decode, turn a tall page over to resize it and back, pad, normalise in float32, shrink the global view, cut, and
    fill up to ``num_crops + 1`` crops.
    """
    image = decode(content)
    geometry = page_geometry(*image.size, num_crops)
    tall = image.width < image.height
    if tall:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    image = image.resize(geometry.resized[::-1] if tall else geometry.resized, Image.Resampling.BILINEAR)
    if tall:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    page = Image.new("RGB", geometry.size[::-1], (255, 255, 255))
    page.paste(image, geometry.offset)
    pixels = torch.from_numpy(np.array(page)).permute(2, 0, 1).float().div(255)  # [3, height, width]
    pixels = (pixels - torch.tensor(OPENAI_CLIP_MEAN)[:, None, None]) / torch.tensor(OPENAI_CLIP_STD)[:, None, None]
    view = functional.interpolate(pixels[None], size=(CROP_SIZE, CROP_SIZE), mode="bicubic")
    crops = pixels.view(3, geometry.rows, CROP_SIZE, geometry.columns, CROP_SIZE)
    crops = crops.permute(1, 3, 0, 2, 4).reshape(-1, 3, CROP_SIZE, CROP_SIZE)
    filled = torch.zeros(num_crops + 1, 3, CROP_SIZE, CROP_SIZE)
    filled[: len(crops) + 1] = torch.cat([view, crops])
    return filled


def milliseconds(
    variants: dict[str, Callable[[bytes], object]], pages: Sequence[bytes], repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of each variant for every page in every round but the first, which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for page in pages:
            for name, variant in variants.items():
                start = time.process_time()
                variant(page)
                if repeat:
                    seconds[name].append(1e3 * (time.process_time() - start))
    return seconds


def bench_preprocess(pages: Sequence[bytes], num_crops: int, repeats: int) -> dict[str, Any]:
    """Measure on one core.

    Args:
        pages: contents of image files.

    Returns:
        ``milliseconds_per_page``: ``plain_float``, as the official processor; ``processor_float``, our public
        processor, which makes the same; ``uint8_page``, as training ships it; ``decode_alone``;
        ``cut_on_this_core``, the model device's part, and with a GPU ``cut_on_the_gpu``, the way there included, in
        wall time. ``pages_per_second``: of the first and third.
        ``megabytes_per_page``; ``times_faster_than_plain``, of the same page in the same round, and its range.

    Raises:
        UserError: there is no page.
    """
    if not pages:
        raise UserError("there is no image to measure on", where="--images")
    with one_thread():
        return _measure(pages, num_crops, repeats)


def _on_the_gpu(pages: Sequence[torch.Tensor], repeats: int) -> float:
    """Milliseconds, in the median, to take a page there and cut it; the first round warms up."""
    times = []
    for _ in range(repeats + 1):
        for page in pages:
            began = time.perf_counter()
            cut_pages(page.pin_memory().cuda(non_blocking=True))
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(times[len(pages) :]), 2)


def _measure(pages: Sequence[bytes], num_crops: int, repeats: int) -> dict[str, Any]:
    processor = Phi3VImageProcessor(num_crops=num_crops)
    for content in pages:
        page, plain = processor.page(decode(content)), plain_crops(content, num_crops)
        cut = cut_pages(page[None])[0]
        if not torch.equal(cut, plain[: len(cut)]):
            raise RuntimeError("our crops differ from the plain ones")
        if not torch.equal(processor(decode(content))["pixel_values"][0], plain):
            raise RuntimeError("the processor's crops differ from the plain ones")
    cut_here = {content: processor.page(decode(content))[None] for content in pages}
    each = milliseconds(
        {
            "plain_float": lambda content: plain_crops(content, num_crops),
            "processor_float": lambda content: processor(decode(content)),
            "uint8_page": lambda content: processor.page(decode(content)),
            "decode_alone": decode,
            "cut_on_this_core": lambda content: cut_pages(cut_here[content]),
        },
        pages,
        repeats,
    )
    figures = {name: round(statistics.median(own), 2) for name, own in each.items()}
    if torch.cuda.is_available():
        figures["cut_on_the_gpu"] = _on_the_gpu(list(cut_here.values()), repeats)
    ratios = [plain / ours for plain, ours in zip(each["plain_float"], each["uint8_page"], strict=True)]
    with Image.open(io.BytesIO(pages[0])) as first:
        size = list(first.size)
    bytes_of = {"plain_float": plain.nbytes, "uint8_page": page.nbytes}
    return {
        "pages": len(pages),
        "size": size,
        "num_crops": num_crops,
        "cores": 1,
        "timed_by": "CPU time of one thread",
        "repeats": repeats,
        "milliseconds_per_page": figures,
        "pages_per_second": {name: round(1e3 / figures[name], 1) for name in bytes_of},
        "megabytes_per_page": {name: round(count / 1e6, 2) for name, count in bytes_of.items()},
        "times_faster_than_plain": round(statistics.median(ratios), 2),
        "times_faster_than_plain_range": [round(min(ratios), 2), round(max(ratios), 2)],
    }
