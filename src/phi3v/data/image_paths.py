"""What an image path of a data file may be, whatever the disk holds."""

from __future__ import annotations

import re

from phi3v.data.faults import quote


def image_path_fault(path: str) -> tuple[str, str] | None:
    """(what, hint) if ``path`` is no path inside the data folder's ``images/``, whatever the disk holds."""
    relative = "image paths are relative to the data folder's images/, e.g. 'train/0.png'"
    if not path.strip():
        return "is an empty path", 'name the file, or leave "images" out if the turn has none'
    if "\0" in path:
        return f"has a NUL character: {quote(path)}", relative
    if not path.isascii() and (half := lone_surrogate(path)):
        if "\udc80" <= half <= "\udcff":  # how Python reads such a name from the disk
            return f"has bytes that are not UTF-8: {quote(path)}", "rename the file"
        return f"has half of a surrogate pair: {quote(path)}", "correct the \\ud8… escape"
    if re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]+://|data:)", path):
        return f"is a URL, not a file: {quote(path)}", f"save the image in the data folder; {relative}"
    if path.startswith(("/", "\\\\")) or re.match(r"[A-Za-z]:[\\/]", path):
        return f"is an absolute path: {quote(path)}", relative
    if "\\" in path:
        return (
            f"has a backslash: {quote(path)}",
            f"separate folders with '/': {quote(path.replace(chr(92), '/'))}",
        )
    depth = 0
    for part in path.split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return f"leaves the data root: {quote(path)}", relative
    return None


def lone_surrogate(text: str) -> str | None:
    """The first half of a surrogate pair that stands alone."""
    return next((character for character in text if "\ud800" <= character <= "\udfff"), None)
