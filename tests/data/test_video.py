from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageChops
from sample_files import clip

from phi3v.data.video import frame_numbers, sample_frames
from phi3v.errors import UserError


def every_frame(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


@pytest.mark.parametrize(("total", "count"), [(8, 8), (100, 8), (251, 8), (29, 8), (13, 4), (9, 1)])
def test_frames_are_those_of_the_recipe(total: int, count: int) -> None:
    assert frame_numbers(total, count) == np.arange(0, total, total / count).astype(int).tolist()


@pytest.mark.parametrize("as_bytes", [False, True])
def test_the_frames_are_evenly_spaced_and_in_order(tmp_path: Path, as_bytes: bool) -> None:
    path = clip(tmp_path / "a.avi", length=20)
    frames = sample_frames(path.read_bytes() if as_bytes else path, 4)
    decoded = every_frame(path)
    assert len(decoded) == 20
    assert [frame.mode for frame in frames] == ["RGB"] * 4
    for frame, expected in zip(frames, (decoded[k] for k in (0, 5, 10, 15)), strict=True):
        assert ImageChops.difference(frame, expected).getbbox() is None
    assert ImageChops.difference(frames[0], frames[1]).getbbox() is not None


def test_a_clip_of_exactly_as_many_frames_gives_each_once(tmp_path: Path) -> None:
    assert len(sample_frames(clip(tmp_path / "a.avi", length=8), 8)) == 8


def test_a_short_clip_names_itself_and_both_counts(tmp_path: Path) -> None:
    path = clip(tmp_path / "short.avi", length=5)
    with pytest.raises(UserError, match="is too short: 5 frames, 8 are wanted") as caught:
        sample_frames(path, 8)
    assert caught.value.where == str(path)
    assert len(sample_frames(path, 5)) == 5


def test_a_clip_that_was_cut_off_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    whole = clip(tmp_path / "a.avi", length=40).read_bytes()
    with pytest.raises(UserError, match=r"cut: (ends early: \d+ of 40 frames|cannot be decoded)"):
        sample_frames(whole[: len(whole) // 2], 8, name="cut")


@pytest.mark.parametrize("content", [b"", b"no clip at all" * 100])
def test_what_is_no_clip(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "junk.avi"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"junk\.avi: cannot be decoded"):
        sample_frames(path, 8)


def test_a_clip_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.avi: no such clip"):
        sample_frames(tmp_path / "none.avi", 8)


def test_sound_alone_has_no_video_track(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(UserError, match=r"sound\.wav: has no video track"):
        sample_frames(path, 8)


def test_a_codec_that_nobody_knows(tmp_path: Path) -> None:
    content = clip(tmp_path / "a.avi", length=3).read_bytes()
    with pytest.raises(UserError, match=r"a\.avi: is of a codec that is unknown here"):
        sample_frames(content.replace(b"FMP4", b"XXXX"), 1, name="a.avi")
