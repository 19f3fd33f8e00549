"""The ``images/`` of a data folder while it is filled: each file complete or absent, none made twice."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path

from PIL import Image, PngImagePlugin

from phi3v.config import DEFAULT_MAX_PIXELS
from phi3v.data.image_paths import image_path_fault
from phi3v.data.image_store import FolderStore
from phi3v.data.images import decode_image, image_kinds, read_image
from phi3v.data.jsonl import replacing
from phi3v.data.video import sample_frames
from phi3v.errors import UserError

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_SOURCE = "source"  # key of the text in a PNG that says what it was made from
_FRAME_QUALITY = 95


class OutputError(UserError):
    """The output folder, not the source, is in the way: no other unit would fare better."""


class ImageFolder:
    """Adds images under names that the caller chooses, from any number of threads.

    JPEG and PNG files are taken over byte by byte once they have been decoded without fault; any other format
    becomes PNG. What is made anew (a PNG, a frame of a clip) carries a hash of what it was made from, so that a
    later run knows it without decoding anything.

    An image may be added again under the same name, as often as records name it.

    Args:
        root: the folder; need not exist.
        max_pixels: largest width x height of an image.
    """

    def __init__(self, root: Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        self.root = root
        self.max_pixels = max_pixels
        self._added: set[Path] = set()
        self._made: set[Path] = set()
        self._kinds: dict[Path, list[str]] = {}

    @property
    def total(self) -> int:
        """Files added so far."""
        return len(self._added)

    @property
    def kept(self) -> int:
        """Those among them that were there before, complete and from the same source."""
        return len(self._added - self._made)

    @property
    def kinds(self) -> dict[str, int]:
        """How many of the images are more than decoded where they are read, by kind (`IMAGE_KINDS`)."""
        return dict(Counter(kind for kinds in self._kinds.values() for kind in kinds))

    def add(self, stem: str, data: bytes, *, name: str | None = None) -> str:
        """Add the image that ``data`` encodes.

        Args:
            stem: its path below ``root`` without extension, with ``/``.
            data: the bytes of an image file.
            name: what to call the image in a message; default ``stem``.

        Returns:
            Its path below ``root``, as a record names it.

        Raises:
            UserError: the image cannot be used.
            OutputError: there is another image of that name, or the folder cannot be written.
        """
        path = self._path(f"{stem}.{'jpg' if data.startswith(_JPEG) else 'png'}")
        self._put(path, data, name or stem, verbatim=data.startswith((_JPEG, _PNG)))
        return path.relative_to(self.root).as_posix()

    def add_file(self, stem: str, path: str, *, root: Path) -> str:
        """Add an image file; arguments and results as `add`.

        Args:
            stem: its new path below the folder without extension.
            path: the file's path as the dataset names it, with ``/`` or ``\\``, relative to ``root``; may not leave it.
            root: the folder of the dataset's images.
        """
        return self.add(stem, read_image(path.replace("\\", "/"), store=FolderStore(root)), name=path)

    def copy_file(self, path: str, *, root: Path) -> str:
        """Add an image file under its own name, byte by byte whatever its format is.

        Args:
            path: relative to ``root``, below which it may not be left; its name here, too.
            root: the folder of the images.

        Returns:
            Its path below ``root``, as a record names it.

        Raises:
            UserError: the image cannot be used.
            OutputError: there is another image of that name, or the folder cannot be written.
        """
        self._put(self._path(path), read_image(path, store=FolderStore(root)), path, verbatim=True)
        return path

    def add_frames(self, stem: str, clip: Path | bytes, count: int, *, name: str | None = None) -> list[str]:
        """Add evenly spaced frames of a clip as ``STEM.0.jpg``, ``STEM.1.jpg`` …

        Args:
            stem: path below ``root``.
            clip: the file or its bytes.
            count: frames to take.
            name: what to call the clip in a message; default its path.

        Returns:
            The paths of the frames below ``root``, in order.

        Raises:
            UserError: the clip cannot be used (`sample_frames`).
            OutputError: there are other images of that name, or the folder cannot be written.
        """
        if isinstance(clip, Path):
            name = name or str(clip)
            try:
                data = clip.read_bytes()
            except OSError as error:
                what = f"cannot be read: {error.strerror}"
                raise UserError(what, where=name, hint="is the source complete?") from None
        else:
            data = clip
        origins = [f"{_digest(data)} {k}/{count}" for k in range(count)]
        paths = [self._path(f"{stem}.{k}.jpg") for k in range(count)]
        missing = []
        for path, origin in zip(paths, origins, strict=True):
            if not path.exists():
                missing.append(path)
            elif _origin(path) != origin:
                raise _other_content(path)
            else:
                self._added.add(path)
        if missing:
            frames = sample_frames(data, count, name=name or stem)
            for path, frame, origin in zip(paths, frames, origins, strict=True):
                if path in missing:
                    self._write(path, _as_jpeg(frame, origin))
        return [path.relative_to(self.root).as_posix() for path in paths]

    def _put(self, path: Path, data: bytes, name: str, *, verbatim: bool) -> None:
        if not path.exists():
            kinds: list[str] = []
            # As it is stored, not turned: whether it is to be turned is a setting of those who read it.
            image = decode_image(data, name, max_pixels=self.max_pixels, exif_orientation=False, kinds=kinds)
            self._kinds[path] = kinds
            self._write(path, data if verbatim else _as_png(image, _digest(data)))
            return
        if verbatim:
            same = path.stat().st_size == len(data) and path.read_bytes() == data
        else:
            same = _origin(path) == _digest(data)
        if not same:
            raise _other_content(path)
        if path not in self._kinds:
            self._kinds[path] = image_kinds(data, name, max_pixels=self.max_pixels)
        self._added.add(path)

    def _path(self, name: str) -> Path:
        if wrong := image_path_fault(name):
            raise UserError(f"the image's name {wrong[0]}", hint=wrong[1])
        return self.root / name

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            what = f"cannot be written: {error.strerror or error}"
            raise OutputError(what, where=str(path), hint="is there room, and the permission to write?") from None
        self._made.add(path)
        self._added.add(path)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _as_png(image: Image.Image, origin: str) -> bytes:
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text(_SOURCE, origin)
    image.save(buffer, "PNG", pnginfo=info, exif=image.info.get("exif"))
    return buffer.getvalue()


def _as_jpeg(image: Image.Image, origin: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_FRAME_QUALITY, comment=origin)
    return buffer.getvalue()


def _origin(path: Path) -> str | None:
    """What the file says it was made from; reads the header only."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            comment = image.info.get("comment", image.info.get(_SOURCE))
    except (OSError, Image.DecompressionBombError):
        return None
    return comment.decode("ascii", "replace") if isinstance(comment, bytes) else comment


def _other_content(path: Path) -> OutputError:
    return OutputError("exists with other content", where=str(path), hint="convert into another folder")
