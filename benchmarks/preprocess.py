"""What a page costs a CPU core: uint8 pages, as training ships them, beside the float crops of the official way.

    python benchmarks/preprocess.py [--images DIR] [--pages 8] [--repeats 9]

``phi3v bench preprocess`` does the measuring (see there); the pages drawn here have many fonts.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from bench_result import ROOT, write_result
from drawing import choose, font_files, load_font
from phi3v.bench.pages import LETTER
from phi3v.bench.preprocess import bench_preprocess
from phi3v.processing.tiny_tokenizer import WORDS


def draw_page(seed: int) -> bytes:
    """A grey scanned-looking page of text as PNG."""
    rng = np.random.default_rng(seed)
    page = Image.new("RGB", LETTER, "white")
    draw = ImageDraw.Draw(page)
    font = load_font(choose(rng, font_files()), 26)
    for y in range(80, LETTER[1] - 80, 40):
        draw.text((90, y), " ".join(choose(rng, WORDS) for _ in range(int(rng.integers(3, 13)))), "black", font)
    grey = np.asarray(page.convert("L"), dtype=np.float32) + rng.normal(0, 2, LETTER[::-1])
    file = io.BytesIO()
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of pictures in place of drawn pages of 1275x1650")
    parser.add_argument("--pages", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--num-crops", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "preprocess.json")
    arguments = parser.parse_args()
    if arguments.images is not None:
        files = sorted(path for path in arguments.images.iterdir() if path.is_file())[: arguments.pages]
        pages = [path.read_bytes() for path in files]
    else:
        pages = [draw_page(seed) for seed in range(arguments.pages)]
    result = bench_preprocess(pages, arguments.num_crops, arguments.repeats)
    print(json.dumps(write_result("preprocess", result, arguments.out), indent=2))


if __name__ == "__main__":
    main()
