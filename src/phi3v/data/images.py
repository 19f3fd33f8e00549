"""Is this image usable, and if so, its pixels."""

from __future__ import annotations

import difflib
import io
import os
import stat
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from PIL import Image

from phi3v.config import DEFAULT_MAX_PIXELS
from phi3v.data.faults import quote
from phi3v.data.schema import image_path_fault
from phi3v.errors import UserError

ImageLevel = Literal["decode", "header", "off"]
T = TypeVar("T")

# Pixel formats that Pillow reads by itself. Others stay out: EPS, for one, runs Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "JPEG2000", "PPM", "TGA")

_SAVE_AS = "save it again as PNG or JPEG"


class _ImageFaultError(Exception):
    """Carries (what, hint) from where an image is found wanting."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def check_image(
    path: str, *, root: Path, max_pixels: int = DEFAULT_MAX_PIXELS, level: ImageLevel = "decode"
) -> tuple[str, str] | None:
    """What is wrong with an image, and what to do about it.

    Args:
        path: relative to ``root``.
        root: the data folder's ``images/``.
        max_pixels: largest width x height; read from the header, before anything is decoded.
        level: ``decode`` reads all pixels (finds truncated files), ``header`` only format and size,
            ``off`` looks at the path alone and never at the disk.

    Returns:
        (what, hint), or None if the image is usable.
    """
    if wrong := image_path_fault(path):
        return wrong
    if level == "off":
        return None
    try:
        _read(path, root, max_pixels, _decode if level == "decode" else _size)
    except _ImageFaultError as fault:
        return fault.what, fault.hint
    return None


def load_image(path: str, *, root: Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """The image as RGB, 8 bits a channel; of an animation or a multi-page file the first picture.

    Like the reference, this is ``.convert("RGB")`` and nothing more: an EXIF rotation is **not** applied and
    transparency is dropped, not blended.

    Args:
        path: relative to ``root``.
        root: the data folder's ``images/``.
        max_pixels: largest width x height.

    Raises:
        UserError: the image cannot be used; the same words as `check_image`.
    """
    return _use(path, root, max_pixels, _decode)


def image_size(path: str, *, root: Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the picture that `load_image` would give, from its header alone; raises the same."""
    return _use(path, root, max_pixels, _size)


def _use(path: str, root: Path, max_pixels: int, take: Callable[[Image.Image, str], T]) -> T:
    try:
        if wrong := image_path_fault(path):
            raise _ImageFaultError(*wrong)
        return _read(path, root, max_pixels, take)
    except _ImageFaultError as fault:
        raise UserError(f"the image {fault.what}", where=str(root / path), hint=fault.hint) from None


def read_image(path: str, *, root: Path) -> bytes:
    """The bytes of an image file as they are, not decoded.

    Args:
        path: relative to ``root``; may not leave it.
        root: the folder that the image is looked up in.

    Raises:
        UserError: there is no such file, or it cannot be read; the same words as `check_image`.
    """
    try:
        if wrong := image_path_fault(path):
            raise _ImageFaultError(*wrong)
        _require_regular_file(path, root / path, root)
        return (root / path).read_bytes()
    except _ImageFaultError as fault:
        raise UserError(f"the image {fault.what}", where=str(root / path), hint=fault.hint) from None
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror or error}", where=str(root / path), hint="check its permissions"
        ) from None


def decode_image(data: bytes, name: str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """The image that ``data`` encodes, as `load_image` gives it.

    Args:
        data: the bytes of an image file.
        name: what to call it in a message.
        max_pixels: largest width x height.

    Raises:
        UserError: the image cannot be used; the same words as `check_image`.
    """
    try:
        if not data:
            raise _ImageFaultError(f"is an empty file: {quote(name)}", "copy or download it again")
        with io.BytesIO(data) as file, _open_without_bomb_check(file, name) as image:
            _require_size(image, name, max_pixels)
            return _decode(image, name)
    except _ImageFaultError as fault:
        raise UserError(f"the image {fault.what}", hint=fault.hint) from None


def near_name(name: str, folder: Path) -> str | None:
    """A name in ``folder`` that ``name`` may have meant: other case, other extension, or a slip."""
    try:
        # Bounded, so that a million images with one missing do not make a check slow.
        names = [entry.name for entry in islice(os.scandir(folder), 20_000)]
    except OSError:
        return None
    for same in (str.lower, lambda text: Path(text).stem, lambda text: Path(text).stem.lower()):
        for candidate in sorted(names):
            if same(candidate) == same(name):
                return candidate
    near = difflib.get_close_matches(name, names[:2_000], n=1, cutoff=0.8)
    return near[0] if near else None


def _read(path: str, root: Path, max_pixels: int, take: Callable[[Image.Image, str], T]) -> T:
    """What ``take`` makes of the opened image, of which only the header has been read."""
    full = root / path
    _require_regular_file(path, full, root)
    try:
        with full.open("rb") as file, _open_without_bomb_check(file, path) as image:
            _require_size(image, path, max_pixels)
            return take(image, path)
    except OSError as error:
        raise _ImageFaultError(
            f"cannot be read ({error.strerror or error}): {quote(path)}", "check its permissions and the disk"
        ) from None


def _require_regular_file(path: str, full: Path, root: Path) -> None:
    try:
        real, real_root = os.path.realpath(full), os.path.realpath(root)
        status = os.stat(full)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path, root) from None
    except OSError as error:
        raise _ImageFaultError(
            f"cannot be read ({error.strerror}): {quote(path)}", "check the path and its permissions"
        ) from None
    if os.path.commonpath([real, real_root]) != real_root:
        raise _ImageFaultError(
            f"leaves the data root through a link: {quote(path)} is {quote(real)}",
            f"copy the image below {root}, or let that folder itself be the link",
        )
    if stat.S_ISDIR(status.st_mode):
        raise _ImageFaultError(f"is a folder, not an image: {quote(path)}", "name the files in it, one by one")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise _ImageFaultError(f"is not a regular file: {quote(path)}", "name an image file")
    if status.st_size == 0:
        raise _ImageFaultError(f"is an empty file: {quote(path)}", "copy or download it again")


def _missing(path: str, root: Path) -> _ImageFaultError:
    """Names the first part of the path that is not there, and what may have been meant."""
    what = f"does not exist: {quote(path)}"
    if not root.is_dir():
        return _ImageFaultError(what, f"images are looked up in {root}, and there is no such folder")
    inner = path.removeprefix("images/")
    if inner != path and (root / inner).is_file():
        return _ImageFaultError(what, f"paths are relative to images/: write {quote(inner)}")
    folder = root
    for part in Path(path).parts:
        if not (folder / part).exists():
            if near := near_name(part, folder):
                found = (folder / near).relative_to(root).as_posix()
                return _ImageFaultError(what, f"did you mean {quote(found)}?")
            break
        folder /= part
    return _ImageFaultError(what, f"it is looked up in {root}")


def _open_without_bomb_check(file: BinaryIO, path: str) -> Image.Image:
    """`Image.open` for `FORMATS`, without its fixed pixel limit.

    That limit warns or raises at sizes of Pillow's own, and can only be moved for the whole process; ours is
    checked right after this. Only the header is read here.
    """
    Image.init()
    prefix = file.read(16)
    for name in FORMATS:
        if name not in Image.OPEN:  # a Pillow built without that codec
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if not accepted or isinstance(accepted, str):
            continue
        file.seek(0)
        try:
            return factory(file, path)
        except OSError as error:
            if error.errno is not None:  # the disk, not the content
                raise
        except Exception:  # a plugin may raise anything on bytes that are not its own
            continue
    raise _ImageFaultError(
        f"is not an image that can be read: {quote(path)}", f"{_SAVE_AS}; readable are {', '.join(FORMATS)}"
    )


def _require_size(image: Image.Image, path: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise _ImageFaultError(f"has no pixels ({width}x{height}): {quote(path)}", _SAVE_AS)
    if width * height > max_pixels:
        pixels = f"{width}x{height} = {width * height:,} pixels"
        raise _ImageFaultError(
            f"has {pixels}, above the limit of {max_pixels:,}: {quote(path)}",
            "make it smaller, or raise max_pixels if you trust the file",
        )


def _size(image: Image.Image, path: str) -> tuple[int, int]:
    return image.size


def _decode(image: Image.Image, path: str) -> Image.Image:
    try:
        image.load()
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # what a codec raises on damaged bytes is not limited to OSError
        if isinstance(error, OSError) and error.errno is not None:
            raise
        ends_early = isinstance(error, EOFError) or "truncated" in str(error).lower()
        what = "is truncated" if ends_early else f"is damaged ({type(error).__name__}: {error})"
        raise _ImageFaultError(f"{what}: {quote(path)}", "copy or download it again") from None
