"""Images out of a clip: a few frames, evenly spaced."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image

from phi3v.errors import UserError

# A header that promises a frame or two more than the decoder gives is common and harmless: codecs with
# B-frames swallow some at the end. A clip that was cut off lacks far more.
_SHORTFALL = 0.1

VIDEO_SUFFIXES = (".avi", ".mp4", ".m4v", ".mkv", ".mov", ".webm")

_ANOTHER_COPY = "copy or download the clip again, or leave it out"


def sample_frames(clip: Path | bytes, count: int, *, name: str | None = None) -> list[Image.Image]:
    """``count`` frames of a clip, evenly spaced, as RGB.

    Decoding runs outside of Python's lock, so that threads decode clips side by side.

    Args:
        clip: the file, or its bytes.
        count: how many, at least 1.
        name: what to call the clip in a message; default its path.

    Returns:
        The frames in order; frame k is number ``frame_numbers(N, count)[k]`` of the clip's N frames.

    Raises:
        UserError: the clip cannot be decoded, ends before its header says so, has no video track, or has fewer
            than ``count`` frames. Names the clip.
    """
    where = name or (str(clip) if isinstance(clip, Path) else "the clip")
    promised, packets = _lengths(clip, where)
    # As many packets as frames is the rule; where it does not hold, the clip is counted and decoded again.
    frames, total = _decode_numbers(clip, frame_numbers(packets, count), where)
    if total < promised * (1 - _SHORTFALL):
        raise UserError(f"ends early: {total} of {promised} frames can be read", where=where, hint=_ANOTHER_COPY)
    if total < count:
        raise UserError(
            f"is too short: {total} frame{'s' if total != 1 else ''}, {count} are wanted",
            where=where,
            hint="take fewer frames a clip (--frames), or leave it out",
        )
    if total != packets:
        frames, _ = _decode_numbers(clip, frame_numbers(total, count), where)
    return frames


@dataclass(frozen=True)
class ClipSize:
    """How much there is to decode: frames that are there, whatever the header promises, and their size in pixels."""

    frames: int
    width: int
    height: int


def clip_size(clip: Path | bytes, *, name: str | None = None) -> ClipSize:
    """The size of a clip; decodes nothing.

    Raises:
        UserError: the clip cannot be read, or has no video track.
    """
    where = name or (str(clip) if isinstance(clip, Path) else "the clip")
    _, packets = _lengths(clip, where)
    with _open(clip, where) as container:
        codec = container.streams.video[0].codec_context
        return ClipSize(packets, codec.width, codec.height)


def frame_numbers(total: int, count: int) -> list[int]:
    """The 0-based numbers of ``count`` evenly spaced frames out of ``total``: the first of ``count`` equal parts each.

    As the recipe's ``np.arange(0, total, total / count).astype(int)``, in whole numbers.
    """
    return [k * total // count for k in range(count)]


def _lengths(clip: Path | bytes, where: str) -> tuple[int, int]:
    """(frames that the header promises, 0 if it is silent; frames' packets that are there). Decodes nothing."""
    with _open(clip, where) as container:
        stream = container.streams.video[0]
        return stream.frames, sum(packet.size > 0 for packet in container.demux(stream))


def _decode_numbers(clip: Path | bytes, numbers: Sequence[int], where: str) -> tuple[list[Image.Image], int]:
    """(the frames of these ascending numbers, as far as they exist; how many frames the clip has)."""
    wanted, images, total = set(numbers), {}, 0
    with _open(clip, where) as container:
        for frame in container.decode(container.streams.video[0]):
            if total in wanted:
                images[total] = frame.to_image()
            total += 1
    return [images[number] for number in numbers if number in images], total


@contextlib.contextmanager
def _open(clip: Path | bytes, where: str) -> Iterator[av.container.InputContainer]:
    """The opened clip; what the library raises while it is open becomes a `UserError`."""
    try:
        file = str(clip) if isinstance(clip, Path) else io.BytesIO(clip)
        with av.open(file, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise UserError("has no video track", where=where, hint="leave it out, or name a video file")
            codec: av.VideoCodecContext | None = container.streams.video[0].codec_context
            if codec is None:
                what = "is of a codec that is unknown here"
                raise UserError(what, where=where, hint="encode it as H.264 or MPEG-4")
            codec.thread_count = 1  # the cores are shared among clips already
            yield container
    except FileNotFoundError:
        raise UserError("no such clip", where=where, hint="is the source complete?") from None
    except (av.FFmpegError, OSError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"cannot be decoded ({said})", where=where, hint=_ANOTHER_COPY) from None
