"""What a page costs a CPU core: uint8 pages, as training ships them, beside the float crops of the official way.

    python benchmarks/preprocess.py [--images DIR] [--pages 8] [--repeats 9]

One core, one page at a time, from the file's bytes; the median over pages of each page's median. The three ways take
turns, so that a busy machine slows all of them. The plain way does on the core what the official processor does:
decode, turn a tall page over to resize it and back, pad, normalise in float32, shrink the global view, cut, and fill up
to ``num_crops + 1`` crops. ``processor`` is our public processor, which makes the same. Ours decodes, resizes and pads;
the rest is the model's device's work, whose time on this core is given too. All three are compared bit by bit first.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional

from bench_result import ROOT, write_result
from drawing import choose, font_files, load_font
from phi3v import Phi3VImageProcessor
from phi3v.processing.hd_transform import CROP_SIZE, page_geometry
from phi3v.processing.pages import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, cut_pages
from phi3v.processing.tiny_tokenizer import WORDS

SIZE = (1275, 1650)  # US letter at 150 dots per inch, as DocVQA's pages are on average


def draw_page(seed: int) -> bytes:
    """A grey scanned-looking page of text as PNG."""
    rng = np.random.default_rng(seed)
    page = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(page)
    font = load_font(choose(rng, font_files()), 26)
    for y in range(80, SIZE[1] - 80, 40):
        draw.text((90, y), " ".join(choose(rng, WORDS) for _ in range(int(rng.integers(3, 13)))), "black", font)
    grey = np.asarray(page.convert("L"), dtype=np.float32) + rng.normal(0, 2, SIZE[::-1])
    file = io.BytesIO()
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def decode(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def plain_crops(content: bytes, num_crops: int) -> torch.Tensor:
    """float32 (num_crops + 1, 3, 336, 336), step by step as ``processing_phi3_v.py``."""
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


def medians(ways: dict[str, Callable[[bytes], object]], pages: list[bytes], repeats: int) -> dict[str, float]:
    """Milliseconds a page of each way."""
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in pages] for name in ways}
    for repeat in range(repeats + 1):
        for index, page in enumerate(pages):
            for name, way in ways.items():
                start = time.perf_counter()
                way(page)
                if repeat:  # the first round warms up
                    seconds[name][index].append(time.perf_counter() - start)
    return {
        name: round(1e3 * statistics.median(statistics.median(page) for page in own), 2)
        for name, own in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of pictures in place of drawn pages of 1275x1650")
    parser.add_argument("--pages", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--num-crops", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "preprocess.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.images is not None:
        files = sorted(path for path in arguments.images.iterdir() if path.is_file())[: arguments.pages]
        pages = [path.read_bytes() for path in files]
    else:
        pages = [draw_page(seed) for seed in range(arguments.pages)]
    processor = Phi3VImageProcessor(num_crops=arguments.num_crops)
    for content in pages:
        page, plain = processor.page(decode(content)), plain_crops(content, arguments.num_crops)
        cut = cut_pages(page[None])[0]
        assert torch.equal(cut, plain[: len(cut)]), "our crops differ from the plain way's"
        assert torch.equal(processor(decode(content))["pixel_values"][0], plain), "the processor's crops differ"
    cut_here = {content: processor.page(decode(content))[None] for content in pages}
    figures = medians(
        {
            "plain_float": lambda content: plain_crops(content, arguments.num_crops),
            "processor_float": lambda content: processor(decode(content)),
            "uint8_page": lambda content: processor.page(decode(content)),
            "decode_alone": decode,
            "cut_on_this_core": lambda content: cut_pages(cut_here[content]),
        },
        pages,
        arguments.repeats,
    )
    with Image.open(io.BytesIO(pages[0])) as first:
        size = list(first.size)
    bytes_of = {"plain_float": plain.nbytes, "uint8_page": page.nbytes}
    result = {
        "pages": len(pages),
        "size": size,
        "num_crops": arguments.num_crops,
        "cores": 1,
        "milliseconds_per_page": figures,
        "megabytes_per_page": {name: round(count / 1e6, 2) for name, count in bytes_of.items()},
        "times_faster_than_plain": round(figures["plain_float"] / figures["uint8_page"], 2),
    }
    print(json.dumps(write_result("preprocess", result, arguments.out), indent=2))


if __name__ == "__main__":
    main()
