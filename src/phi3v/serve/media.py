"""Images and clips for a chat, within limits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from phi3v.data.images import decode_image
from phi3v.data.video import VIDEO_SUFFIXES, clip_size, sample_frames
from phi3v.errors import UserError
from phi3v.serve.limits import LIMITS, Limits, limit_option

DEFAULT_FRAMES = 8  # of a clip, as in the public recipe
# What an address becomes as a path, in which slashes are single.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Media:
    """A file as the model sees it: one image, or the chosen frames of a clip."""

    name: str
    images: tuple[Image.Image, ...]
    is_clip: bool = False


def read_media(
    files: Sequence[Path],
    *,
    frames: int = DEFAULT_FRAMES,
    limits: Limits = LIMITS,
    pixels_before: int = 0,
    exif_orientation: bool = True,
) -> list[Media]:
    """Decode files in their order; those with a video's suffix are clips.

    Args:
        frames: how many of a clip are taken, evenly spaced.
        pixels_before: of images that the conversation has already.
        exif_orientation: turn images as their EXIF orientation says.

    Raises:
        UserError: a file is missing, damaged or beyond a limit. Says its name, never its path.
    """
    limits.require_images(len(files))
    if not 1 <= frames <= limits.frames:
        hint = f"choose between 1 and {limits.frames}, or raise {limit_option('frames')}"
        raise UserError(f"{frames} frames of a clip cannot be taken", hint=hint)
    media, pixels = [], pixels_before
    for file in files:
        media.append(_read_one(file, frames, limits, exif_orientation))
        pixels += sum(image.width * image.height for image in media[-1].images)
        limits.require_pixels(pixels)
    return media


def _read_one(file: Path, frames: int, limits: Limits, exif_orientation: bool) -> Media:
    _require_no_address(file)
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise UserError("is not a file", where=file.name, hint="name an image or a clip")
        if size > limits.file_mb * 1024**2:
            hint = f"give a smaller file, or raise {limit_option('file_mb')}"
            raise UserError(f"is larger than {limits.file_mb:g} MB", where=file.name, hint=hint)
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=file.name, hint="check the name") from None
    if file.suffix.lower() not in VIDEO_SUFFIXES:
        image = decode_image(
            content,
            file.name,
            max_pixels=limits.pixels,
            exif_orientation=exif_orientation,
            limit_key=limit_option("pixels"),
        )
        return Media(file.name, (image,))
    clip = clip_size(content, name=file.name)
    if clip.frames > limits.clip_frames:
        what = f"is too long: {clip.frames:,} frames, and the limit is {limits.clip_frames:,}"
        raise UserError(
            what, where=file.name, hint=f"cut the part that matters, or raise {limit_option('clip_frames')}"
        )
    if clip.width * clip.height > limits.pixels:
        what = f"has frames of {clip.width}x{clip.height}, above the limit of {limits.pixels:,} pixels"
        raise UserError(what, where=file.name, hint=f"give a smaller clip, or raise {limit_option('pixels')}")
    return Media(file.name, tuple(sample_frames(content, frames, name=file.name)), is_clip=True)


def _require_no_address(file: Path) -> None:
    found = _ADDRESS.fullmatch(str(file))
    if found is None or file.exists():
        return
    scheme, rest = found[1].lower(), found[2]
    if scheme == "file":
        raise UserError("is an address, and a path is wanted", where=f"file:///{rest}", hint=f"name it as /{rest}")
    shown = f"{scheme}://{rest}" if scheme != "data" else f"data:{rest[:20]}…"
    hint = "download it and name the file" if scheme != "data" else "write its content to a file and name that"
    raise UserError("is an address, and nothing is fetched from the network here", where=shown, hint=hint)
