"""Which formats of images are read, and what to do with others that lie among them."""

from __future__ import annotations

import re
from typing import IO

# Pixel formats that Pillow reads by itself. Others stay out: EPS, for one, runs Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "JPEG2000", "PPM", "TGA")

RAW_HINT = "save it as JPEG or PNG in a program that develops your camera's files"
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
        RAW_HINT,
    ),
    "a PDF document": (rb".*?%PDF-", "make an image of each page, e.g. `pdftoppm -r 150 -png scan.pdf scan`"),
    "a web page": (rb"\s*<(?:!doctype html|html)", "a download that failed? Fetch the image itself"),
    "an SVG drawing": (rb".*?<svg", "render it, e.g. `rsvg-convert -w 1000 draw.svg -o draw.png`"),
    "a PostScript file": (rb"%!PS|\xc5\xd0\xd3\xc6", "render it as PNG"),
    "a Photoshop file": (rb"8BPS", "export it as PNG or JPEG"),
    "a JPEG XL image": (rb"\xff\x0a|\0\0\0\x0cJXL ", "save it as PNG or JPEG, e.g. `djxl image.jxl image.png`"),
}
_SNIFFED = 1024  # bytes

# How files of images end that no Pillow reads, or not every one: refused by name, not left out as something else.
UNREADABLE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("heic", "heif", "hif", "avif", "webp", "jp2", "jxl", "svg", "svgz", "pdf", "eps", "ps", "psd"),
        *("raw", "dng", "cr2", "cr3", "nef", "nrw", "arw", "srf", "raf", "rw2", "orf", "pef", "srw", "x3f"),
    )
)


def unreadable(file: IO[bytes]) -> tuple[str, str] | None:
    """(what it is, what to do) of a file in a known format that is not read here."""
    start = file.read(_SNIFFED)
    for what, (begins, hint) in _UNREADABLE.items():
        if re.match(begins, start, re.DOTALL | re.IGNORECASE):
            return what, hint
    return None
