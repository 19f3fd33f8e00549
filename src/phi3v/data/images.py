"""Is this image usable, and if so, its pixels."""

from __future__ import annotations

import difflib
import errno
import functools
import io
import os
import stat
import unicodedata
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, BinaryIO, Literal, TypeVar

from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from phi3v.config import DEFAULT_MAX_PIXELS
from phi3v.data.faults import quote
from phi3v.data.image_formats import FORMATS, RAW_HINT, unreadable
from phi3v.data.schema import image_path_fault
from phi3v.errors import UserError
from phi3v.processing.rgb import GreyRangeError, as_transparent, is_deep_grey, to_rgb

ImageLevel = Literal["decode", "header", "off"]
T = TypeVar("T")

# What is done to an image beyond decoding it -> as a summary says it, after the number of such images.
IMAGE_KINDS = {
    "exif_orientation": "turned by the EXIF orientation",
    "exif_ignored": "with an EXIF orientation that is not applied",
    "transparent": "transparent, laid over white",
    "several_pages": "of several pages or frames, the first one used",
    "deep_grey": "of more than 8 bits a grey value, scaled to 8",
    "cmyk": "CMYK, converted to RGB",
}

_LIMIT_KEY = "data.max_image_pixels (`phi3v data …`: --max-pixels)"
_SAVE_AS = "save it again as PNG or JPEG"
_EXIF_ORIENTATION = 0x0112
_DNG_VERSION, _SUBFILE_TYPE = 50706, 254  # TIFF tags
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED_BACK = {6: 8, 8: 6}  # each of the others undoes itself
_ON_ITS_SIDE = (5, 6, 7, 8)


class _ImageFaultError(Exception):
    """Carries (what, hint) from where an image is found wanting."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def check_image(
    path: str,
    *,
    root: Path,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    level: ImageLevel = "decode",
    kinds: list[str] | None = None,
) -> tuple[str, str] | None:
    """What is wrong with an image, and what to do about it.

    Args:
        path: relative to ``root``.
        root: the data folder's ``images/``.
        max_pixels: largest width x height; read from the header, before anything is decoded.
        level: ``decode`` reads all pixels (finds truncated files), ``header`` only format and size,
            ``off`` looks at the path alone and never at the disk.
        kinds: takes those of `IMAGE_KINDS` that hold of the image, as far as ``level`` can tell.

    Returns:
        (what, hint), or None if the image is usable.
    """
    if wrong := image_path_fault(path):
        return wrong
    if level == "off":
        return None

    def look(image: Image.Image, name: str) -> None:
        if level == "decode":
            _decode(image, name, exif_orientation=True, kinds=kinds)
        elif kinds is not None:
            kinds.extend(_header_kinds(image))

    try:
        _read(path, root, max_pixels, look)
    except _ImageFaultError as fault:
        return fault.what, fault.hint
    return None


def load_image(
    path: str, *, root: Path, max_pixels: int = DEFAULT_MAX_PIXELS, exif_orientation: bool = True
) -> Image.Image:
    """The image as RGB, 8 bits a channel; of an animation or a multi-page file the first one.

    Deeper grey values are scaled to 8 bits and transparency is laid over white (`to_rgb`).

    Args:
        path: relative to ``root``.
        root: the data folder's ``images/``.
        max_pixels: largest width x height.
        exif_orientation: turn a photograph as its EXIF orientation says.

    Raises:
        UserError: the image cannot be used; the same words as `check_image`.
    """
    return _use(path, root, max_pixels, functools.partial(_decode, exif_orientation=exif_orientation))


def image_size(
    path: str, *, root: Path, max_pixels: int = DEFAULT_MAX_PIXELS, exif_orientation: bool = True
) -> tuple[int, int]:
    """Width and height of the image that `load_image` would give, from its header alone; raises the same."""
    return _use(path, root, max_pixels, functools.partial(_size, exif_orientation=exif_orientation))


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
    full = find_file(path, root)
    try:
        if wrong := image_path_fault(path):
            raise _ImageFaultError(*wrong)
        _require_regular_file(path, full, root)
        return full.read_bytes()
    except _ImageFaultError as fault:
        raise UserError(f"the image {fault.what}", where=str(full), hint=fault.hint) from None
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror or error}", where=str(full), hint="check its permissions"
        ) from None


def decode_image(
    data: bytes,
    name: str,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    exif_orientation: bool = True,
    kinds: list[str] | None = None,
    limit_key: str = _LIMIT_KEY,
) -> Image.Image:
    """The image that ``data`` encodes, as `load_image` gives it.

    Args:
        data: the bytes of an image file.
        name: what to call it in a message.
        max_pixels: largest width x height.
        exif_orientation: turn it as its EXIF orientation says; otherwise ``info["exif"]`` of the result still says it.
        kinds: takes those of `IMAGE_KINDS` that hold of the image.
        limit_key: what raises ``max_pixels``, for a message.

    Raises:
        UserError: the image cannot be used; the same words as `check_image`.
    """
    take = functools.partial(_decode, exif_orientation=exif_orientation, kinds=kinds)
    return _of_bytes(data, name, max_pixels, take, limit_key)


def image_kinds(data: bytes, name: str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> list[str]:
    """Those of `IMAGE_KINDS` that hold of an image; decoded only if its header leaves one open.

    Raises:
        UserError: the image cannot be used.
    """

    def look(image: Image.Image, name: str) -> list[str]:
        kinds = _header_kinds(image)
        if image.has_transparency_data:
            kinds.clear()
            _decode(image, name, exif_orientation=False, kinds=kinds)
        return kinds

    return _of_bytes(data, name, max_pixels, look)


def describe_kinds(counts: Mapping[str, int]) -> str:
    """A line on images that are more than decoded, by kind; empty if there are none."""
    return "; ".join(f"{counts[kind]:,} {what}" for kind, what in IMAGE_KINDS.items() if counts.get(kind))


def _of_bytes(
    data: bytes, name: str, max_pixels: int, take: Callable[[Image.Image, str], T], limit_key: str = _LIMIT_KEY
) -> T:
    try:
        if not data:
            raise _ImageFaultError(f"is an empty file: {quote(name)}", "copy or download it again")
        with io.BytesIO(data) as file, _open_without_bomb_check(file, name) as image:
            _require_size(image, name, max_pixels, limit_key)
            return take(image, name)
    except _ImageFaultError as fault:
        raise UserError(f"the image {fault.what}", hint=fault.hint) from None


def find_file(path: str, root: Path) -> Path:
    """``root / path``; where that is not there, the file whose name is the same in another Unicode normal form.

    ``ü`` is one character or two (NFC, NFD). macOS, archives and file servers change between them, and a person sees
    no difference.
    """
    full = root / path
    if path.isascii() or os.path.lexists(full):
        return full
    found = root
    for part in Path(path).parts:
        if not os.path.lexists(found / part):
            try:
                names = _names_by_form(str(found), os.stat(found).st_mtime_ns)
            except OSError:
                return full
            part = names.get(unicodedata.normalize("NFC", part), part)
        found /= part
    return found if os.path.lexists(found) else full


@functools.lru_cache(maxsize=256)
def _names_by_form(folder: str, _changed: int) -> dict[str, str]:
    return {unicodedata.normalize("NFC", name): name for name in sorted(os.listdir(folder)) if not name.isascii()}


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
    full = find_file(path, root)
    _require_regular_file(path, full, root)
    try:
        with full.open("rb") as file, _open_without_bomb_check(file, path) as image:
            _require_size(image, path, max_pixels)
            return take(image, path)
    except OSError as error:
        raise _ImageFaultError(
            f"cannot be read ({error.strerror or error}): {quote(path)}",
            "raise the limit of open files: ulimit -n 4096"
            if error.errno in (errno.EMFILE, errno.ENFILE)
            else "check its permissions and the disk",
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
            image = factory(file, path)
            _refuse_camera_file(image, path)
            return image
        except _ImageFaultError:
            raise
        except OSError as error:
            if error.errno is not None:  # the disk, not the content
                raise
        except Exception:  # a plugin may raise anything on bytes that are not its own
            continue
    file.seek(0)
    if known := unreadable(file):
        raise _ImageFaultError(f"is {known[0]}, which is not read here: {quote(path)}", known[1])
    raise _ImageFaultError(
        f"is not an image that can be read: {quote(path)}", f"{_SAVE_AS}; readable are {', '.join(FORMATS)}"
    )


def _require_size(image: Image.Image, path: str, max_pixels: int, limit_key: str = _LIMIT_KEY) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise _ImageFaultError(f"has no pixels ({width}x{height}): {quote(path)}", _SAVE_AS)
    if width * height > max_pixels:
        pixels = f"{width}x{height} = {width * height:,} pixels"
        raise _ImageFaultError(
            f"has {pixels}, above the limit of {max_pixels:,}: {quote(path)}",
            f"make it smaller; or, if you trust the file, raise {limit_key}",
        )


def _refuse_camera_file(image: Image.Image, path: str) -> None:
    """Many raw files are TIFFs whose first image is a thumbnail."""
    if isinstance(image, TiffImageFile):
        is_preview = image.tag_v2.get(_SUBFILE_TYPE, 0) & 1
        if _DNG_VERSION in image.tag_v2 or is_preview:
            what = f"is a camera's raw file, of which only a small preview can be read: {quote(path)}"
            raise _ImageFaultError(what, RAW_HINT)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image that is not loaded, 1 to 8. Reads no pixels."""
    try:
        if isinstance(image, PngImageFile) and "exif" not in image.info and image.fp is not None:
            image.info |= _png_exif(image.fp)
        # Not the PNG reader's own, which decodes everything to look behind the pixels.
        value = Image.Image.getexif(image).get(_EXIF_ORIENTATION)
    except Exception:  # damaged EXIF data, of an image that is whole
        return 1
    return value if value in _TURNS else 1


def _png_exif(file: IO[bytes]) -> dict[str | tuple[int, int], bytes]:
    """The EXIF data of a PNG, which may stand behind the pixels."""
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            size = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                return {"exif": b"Exif\0\0" + file.read(size)}
            file.seek(size + 4, os.SEEK_CUR)
        return {}
    finally:
        file.seek(position)


def _header_kinds(image: Image.Image) -> list[str]:
    """Those of `IMAGE_KINDS` that the header tells, of an image that is not loaded."""
    holds = {
        "exif_orientation": _orientation(image) != 1,
        "several_pages": image.format != "MPO" and _has_pages(image),  # an MPO's others are previews of the photograph
        "deep_grey": is_deep_grey(image),
        "cmyk": image.mode == "CMYK",
    }
    return [kind for kind, is_so in holds.items() if is_so]


def _has_pages(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # damage behind the first page, which is all that is used
        return False


def _size(image: Image.Image, path: str, *, exif_orientation: bool) -> tuple[int, int]:
    width, height = image.size
    turned = exif_orientation and _orientation(image) in _ON_ITS_SIDE
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_EXIF_ORIENTATION) in _ON_ITS_SIDE:
        width, height = height, width  # Pillow has turned it already
    return (height, width) if turned else (width, height)


def _decode(image: Image.Image, path: str, *, exif_orientation: bool, kinds: list[str] | None = None) -> Image.Image:
    try:
        orientation = _orientation(image)
        found = [] if kinds is None else _header_kinds(image)
        image.load()
        if kinds is not None:
            kinds.extend(found + ["transparent"] * (as_transparent(image) is not None))
        rgb = to_rgb(image)
        rgb = rgb.copy() if rgb is image else rgb
    except GreyRangeError as error:
        raise _ImageFaultError(
            f"{error}: {quote(path)}", "scale the values to 0–255 or 0–65535, and save it as PNG"
        ) from None
    except Exception as error:  # what a codec raises on damaged bytes is not limited to OSError
        if isinstance(error, OSError) and error.errno is not None:
            raise
        ends_early = isinstance(error, EOFError) or "truncated" in str(error).lower()
        what = "is truncated" if ends_early else f"is damaged ({type(error).__name__}: {error})"
        raise _ImageFaultError(f"{what}: {quote(path)}", "copy or download it again") from None
    rgb.info = {}
    if isinstance(image, TiffImageFile):  # which Pillow has turned
        turns = 1 if exif_orientation else _TURNED_BACK.get(orientation, orientation)
    else:
        turns = orientation if exif_orientation else 1
    if not exif_orientation and orientation != 1:
        exif = Image.Exif()
        exif[_EXIF_ORIENTATION] = orientation
        rgb.info["exif"] = exif.tobytes()
    return rgb.transpose(_TURNS[turns]) if turns in _TURNS else rgb
