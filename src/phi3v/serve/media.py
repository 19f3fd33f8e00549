"""Pictures and clips that a person gives to a chat, within limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from phi3v.config import DEFAULT_MAX_PIXELS
from phi3v.data.images import decode_image
from phi3v.data.video import VIDEO_SUFFIXES, clip_size, sample_frames
from phi3v.errors import UserError

DEFAULT_FRAMES = 8  # of a clip, as in the public recipe


@dataclass(frozen=True)
class Limits:
    """What a chat takes at most.

    Attributes:
        file_bytes: of one file.
        files: given with one question.
        pixels: of a picture, or of a clip's frame.
        clip_frames: frames of a clip before some are chosen; all of them are decoded.
        frames: chosen from one clip.
        pictures: in a conversation, frames included.
        conversation_pixels: of all of them; they are kept while it lasts, at 3 bytes a pixel.
        characters: of one question.
    """

    file_bytes: int = 100 * 1024**2
    files: int = 16
    pixels: int = DEFAULT_MAX_PIXELS
    clip_frames: int = 18_000  # ten minutes at 30 a second
    frames: int = 32
    pictures: int = 64
    conversation_pixels: int = 4 * DEFAULT_MAX_PIXELS
    characters: int = 20_000


LIMITS = Limits()


@dataclass(frozen=True)
class Media:
    """A file as the model sees it: one picture, or the chosen frames of a clip."""

    name: str
    images: tuple[Image.Image, ...]
    is_clip: bool = False


def read_media(files: Sequence[Path], *, frames: int = DEFAULT_FRAMES, limits: Limits = LIMITS) -> list[Media]:
    """Decode files in their order; those with a video's suffix are clips.

    Args:
        frames: how many of a clip are taken, evenly spaced.

    Raises:
        UserError: a file is missing, damaged or beyond a limit. Says its name, never its path.
    """
    if len(files) > limits.files:
        raise UserError(f"{len(files)} files are too many for one question", hint=f"give at most {limits.files}")
    if not 1 <= frames <= limits.frames:
        raise UserError(f"{frames} frames of a clip cannot be taken", hint=f"choose between 1 and {limits.frames}")
    return [_read_one(file, frames, limits) for file in files]


def _read_one(file: Path, frames: int, limits: Limits) -> Media:
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise UserError("is not a file", where=file.name, hint="name a picture or a clip")
        if size > limits.file_bytes:
            limit = f"{limits.file_bytes / 1024**2:.0f} MB"
            raise UserError(f"is larger than {limit}", where=file.name, hint="give a smaller file")
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=file.name, hint="check the name") from None
    if file.suffix.lower() not in VIDEO_SUFFIXES:
        return Media(file.name, (decode_image(content, file.name, max_pixels=limits.pixels),))
    clip = clip_size(content, name=file.name)
    if clip.frames > limits.clip_frames:
        what = f"is too long: {clip.frames:,} frames, and the limit is {limits.clip_frames:,}"
        raise UserError(what, where=file.name, hint="cut the part that matters")
    if clip.width * clip.height > limits.pixels:
        what = f"has frames of {clip.width}x{clip.height}, above the limit of {limits.pixels:,} pixels"
        raise UserError(what, where=file.name, hint="give a smaller clip")
    return Media(file.name, tuple(sample_frames(content, frames, name=file.name)), is_clip=True)
