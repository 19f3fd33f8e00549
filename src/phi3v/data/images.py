"""The image that a path of a record names: looked at, and decoded if it is usable."""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import IO, BinaryIO, Literal, NamedTuple

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from phi3v.config import DEFAULT_MAX_PIXELS
from phi3v.data.faults import quote
from phi3v.data.image_paths import image_path_fault
from phi3v.data.image_store import ImageFaultError, ImageStore, faults_of
from phi3v.processing.hd_transform import FORMATS, GreyRangeError, as_transparent, is_deep_grey, open_pixels, to_rgb

ImageLevel = Literal["decode", "header", "off"]

_RAW_HINT = "save it as JPEG or PNG in a program that develops your camera's files"
# What else is found among images -> (how its bytes begin, what to do).
_UNREADABLE = {
    "an AVIF image that this Pillow cannot read": (
        rb"....ftyp.{0,40}?avi[fs]",
        "`pip install --upgrade Pillow`, or save it as PNG or JPEG",
    ),
    "a HEIC or HEIF photo": (
        rb"....ftyp(?:hei[cmsx]|hev[cmsx]|m[is]f1)",
        "save it as JPEG, e.g. `heif-convert photo.heic photo.jpg` or `magick photo.heic photo.jpg`",
    ),
    "a camera's raw file": (
        rb"....ftypcrx|II\*\0....CR|IIR[OS]|IIU\0|MMOR|FUJIFILMCCD-RAW|FOVb|\0MRM",
        _RAW_HINT,
    ),
    "a PDF document": (rb".*?%PDF-", "make an image of each page, e.g. `pdftoppm -r 150 -png scan.pdf scan`"),
    "a web page": (rb"\s*<(?:!doctype html|html)", "a download that failed? Fetch the image itself"),
    "an SVG drawing": (rb".*?<svg", "render it, e.g. `rsvg-convert -w 1000 draw.svg -o draw.png`"),
    "a PostScript file": (rb"%!PS|\xc5\xd0\xd3\xc6", "render it as PNG"),
    "a Photoshop file": (rb"8BPS", "export it as PNG or JPEG"),
    "a JPEG XL image": (rb"\xff\x0a|\0\0\0\x0cJXL ", "save it as PNG or JPEG, e.g. `djxl image.jxl image.png`"),
}
# How files of images end that no Pillow reads, or not every one: refused by name, not left out as something else.
UNREADABLE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("heic", "heif", "hif", "avif", "webp", "jp2", "jxl", "svg", "svgz", "pdf", "eps", "ps", "psd"),
        *("raw", "dng", "cr2", "cr3", "nef", "nrw", "arw", "srf", "raf", "rw2", "orf", "pef", "srw", "x3f"),
    )
)

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
_TURNED_BACK = {6: 8, 8: 6}  # each of the others undoes itself
_ON_ITS_SIDE = (5, 6, 7, 8)

# Between one and two times its limit Pillow warns; such images are refused here, with what to do.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def check_image(
    path: str,
    *,
    store: ImageStore,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    level: ImageLevel = "decode",
    kinds: list[str] | None = None,
) -> tuple[str, str] | None:
    """What is wrong with an image, and what to do about it.

    Args:
        path: as a record names it.
        store: that has it.
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
    try:
        with _open_file(path, store, max_pixels) as image:
            if level == "decode":
                _decode(image, path, exif_orientation=True, kinds=kinds)
            elif kinds is not None:
                kinds.extend(_header_kinds(image))
    except ImageFaultError as fault:
        return fault.what, fault.hint
    return None


def load_image(
    path: str, *, store: ImageStore, max_pixels: int = DEFAULT_MAX_PIXELS, exif_orientation: bool = True
) -> Image.Image:
    """The image as RGB, 8 bits a channel; of an animation or a multi-page file the first one.

    Deeper grey values are scaled to 8 bits and transparency is laid over white (`to_rgb`).

    Args:
        path: as a record names it.
        store: that has it.
        max_pixels: largest width x height.
        exif_orientation: turn a photograph as its EXIF orientation says.

    Raises:
        UserError: the image cannot be used; the same words as `check_image`.
    """
    with faults_of(store.where(path)), _open_file(path, store, max_pixels) as image:
        return _decode(image, path, exif_orientation=exif_orientation)


def image_size(
    path: str, *, store: ImageStore, max_pixels: int = DEFAULT_MAX_PIXELS, exif_orientation: bool = True
) -> tuple[int, int]:
    """Width and height of the image that `load_image` would give, from its header alone; raises the same."""
    known = store.sizes([path], exif_orientation=exif_orientation)
    if known is not None and 0 < int(known[0].prod()) <= max_pixels:
        return int(known[0, 0]), int(known[0, 1])
    with faults_of(store.where(path)), _open_file(path, store, max_pixels) as image:
        header = _read_header(image)
        turned = exif_orientation and header.turned
        return (header.height, header.width) if turned else (header.width, header.height)


class Header(NamedTuple):
    """What the header of an image says: its size as stored, whether its EXIF orientation exchanges width and height,
    and the name that Pillow has for its format.
    """

    width: int
    height: int
    turned: bool
    format: str


def read_header(data: bytes, name: str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Header:
    """The header of the image that ``data`` encodes.

    Raises:
        UserError: the image cannot be used.
    """
    with faults_of(), io.BytesIO(data) as file, _open(file, name, max_pixels) as image:
        return _read_header(image)


def _read_header(image: Image.Image) -> Header:
    width, height = image.size
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_EXIF_ORIENTATION) in _ON_ITS_SIDE:
        width, height = height, width  # Pillow has turned it already
    return Header(width, height, _orientation(image) in _ON_ITS_SIDE, image.format or "")


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
    with faults_of(), io.BytesIO(data) as file, _open(file, name, max_pixels, limit_key) as image:
        return _decode(image, name, exif_orientation=exif_orientation, kinds=kinds)


def image_kinds(data: bytes, name: str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> list[str]:
    """Those of `IMAGE_KINDS` that hold of an image; decoded only if its header leaves one open.

    Raises:
        UserError: the image cannot be used.
    """
    with faults_of(), io.BytesIO(data) as file, _open(file, name, max_pixels) as image:
        kinds = _header_kinds(image)
        if image.has_transparency_data:
            kinds.clear()
            _decode(image, name, exif_orientation=False, kinds=kinds)
        return kinds


def describe_kinds(counts: Mapping[str, int]) -> str:
    """A line on images that are more than decoded, by kind; empty if there are none."""
    return "; ".join(f"{counts[kind]:,} {what}" for kind, what in IMAGE_KINDS.items() if counts.get(kind))


@contextlib.contextmanager
def _open_file(path: str, store: ImageStore, max_pixels: int) -> Iterator[Image.Image]:
    """The image, of which only the header has been read."""
    with store.open(path) as file, _open(file, path, max_pixels) as image:
        yield image


def _open(file: BinaryIO, name: str, max_pixels: int, limit_key: str = _LIMIT_KEY) -> Image.Image:
    """`open_pixels` for images up to ``max_pixels``. Only the header is read here."""
    # Pillow's limit is one for the process: it is raised to ours, never lowered, and ours is checked below.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        image = open_pixels(file)
        _refuse_camera_file(image, name)
    except ImageFaultError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = max(map(int, re.findall(r"\d+", str(error))))
        raise _too_large(f"{pixels:,} pixels", name, max_pixels, limit_key) from None
    except Exception as error:  # a plugin may raise anything on bytes that are not its own
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the content
            raise
        raise _unreadable(file, name) from None
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageFaultError(f"has no pixels ({width}x{height}): {quote(name)}", _SAVE_AS)
    if width * height > max_pixels:
        raise _too_large(f"{width}x{height} = {width * height:,} pixels", name, max_pixels, limit_key)
    return image


def _too_large(pixels: str, name: str, max_pixels: int, limit_key: str) -> ImageFaultError:
    return ImageFaultError(
        f"has {pixels}, above the limit of {max_pixels:,}: {quote(name)}",
        f"make it smaller; or, if you trust the file, raise {limit_key}",
    )


def _unreadable(file: BinaryIO, name: str) -> ImageFaultError:
    if not file.seek(0, os.SEEK_END):
        return ImageFaultError(f"is an empty file: {quote(name)}", "copy or download it again")
    file.seek(0)
    start = file.read(1024)
    for what, (begins, hint) in _UNREADABLE.items():
        if re.match(begins, start, re.DOTALL | re.IGNORECASE):
            return ImageFaultError(f"is {what}, which is not read here: {quote(name)}", hint)
    return ImageFaultError(
        f"is not an image that can be read: {quote(name)}", f"{_SAVE_AS}; readable are {', '.join(FORMATS)}"
    )


def _refuse_camera_file(image: Image.Image, path: str) -> None:
    """Many raw files are TIFFs whose first image is a thumbnail."""
    if isinstance(image, TiffImageFile):
        is_preview = image.tag_v2.get(_SUBFILE_TYPE, 0) & 1
        if _DNG_VERSION in image.tag_v2 or is_preview:
            what = f"is a camera's raw file, of which only a small preview can be read: {quote(path)}"
            raise ImageFaultError(what, _RAW_HINT)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image that is not loaded, 1 to 8. Reads no pixels."""
    try:
        if isinstance(image, PngImageFile) and "exif" not in image.info and image.fp is not None:
            image.info |= _png_exif(image.fp)
        # Not the PNG reader's own, which decodes everything to look behind the pixels.
        value = Image.Image.getexif(image).get(_EXIF_ORIENTATION)
    except Exception:  # damaged EXIF data, of an image that is whole
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


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
        hint = "scale the values to 0–255 or 0–65535, and save it as PNG"
        raise ImageFaultError(f"{error}: {quote(path)}", hint) from None
    except Exception as error:  # what a codec raises on damaged bytes is not limited to OSError
        if isinstance(error, OSError) and error.errno is not None:
            raise
        ends_early = isinstance(error, EOFError) or "truncated" in str(error).lower()
        what = "is truncated" if ends_early else f"is damaged ({type(error).__name__}: {error})"
        raise ImageFaultError(f"{what}: {quote(path)}", "copy or download it again") from None
    turns = orientation if exif_orientation else 1
    if isinstance(image, TiffImageFile):  # which Pillow has turned
        turns = 1 if exif_orientation else _TURNED_BACK.get(orientation, orientation)
    if turns != 1:
        rgb.info["exif"] = _exif_of(turns)
        rgb = ImageOps.exif_transpose(rgb)
    rgb.info = {} if exif_orientation or orientation == 1 else {"exif": _exif_of(orientation)}
    return rgb


def _exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = orientation
    return exif.tobytes()


def read_image(path: str, *, store: ImageStore) -> bytes:
    """The bytes of an image file as they are, not decoded.

    Raises:
        UserError: there is no such file, or it cannot be read; the same words as `check_image`.
    """
    with faults_of(store.where(path)), store.open(path) as file:
        return file.read()
