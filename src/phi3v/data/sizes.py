"""The sizes of a table's images: out of an index, or of their headers, which are read once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from phi3v.data.cache import digest, keep_arrays, recall_arrays
from phi3v.data.image_store import THREADS
from phi3v.data.images import image_size
from phi3v.data.table import RecordTable
from phi3v.errors import UserError

Size = tuple[int, int]  # width and height

VERSION = 1  # of the kept file


def image_sizes(table: RecordTable, *, skip_unreadable: bool = False) -> dict[str, Size]:
    """Width and height of every image by its name, in the order of the file; kept where the cache can be written.

    Args:
        skip_unreadable: (0, 0) where the header cannot be read, in place of an error.

    Raises:
        UserError: the header of an image cannot be read; names the line and the field.
    """
    names, _ = table.distinct_images()
    known = table.images.sizes(names, exif_orientation=table.exif_orientation)
    if known is not None:
        usable = known.prod(axis=1, keepdims=True) <= table.max_pixels
        found = ((width, height) for width, height in np.where(usable, known, 0).tolist())
        return _all_usable(table, dict(zip(names, found, strict=True)), skip_unreadable)
    file = table.folder / f"sizes-{digest(VERSION, table.images.identity, table.exif_orientation)}.npz"
    stamps = table.images.stamps(names)
    kept = recall_arrays(file, {"stamps": len(names), "sizes": len(names)})
    if kept is not None and kept["sizes"].shape == stamps.shape and np.array_equal(kept["stamps"], stamps):
        sizes = [(width, height) for width, height in kept["sizes"].tolist()]
        if all(width * height <= table.max_pixels for width, height in sizes):
            return dict(zip(names, sizes, strict=True))
    with ThreadPoolExecutor(THREADS) as pool:
        read = dict(zip(names, pool.map(lambda name: _read_size(table, name), names), strict=True))
    if all(width for width, _ in read.values()):
        keep_arrays(file, {"stamps": stamps, "sizes": np.array(list(read.values()), dtype=np.int64).reshape(-1, 2)})
    return _all_usable(table, read, skip_unreadable)


def _all_usable(table: RecordTable, sizes: dict[str, Size], skip_unreadable: bool) -> dict[str, Size]:
    """``sizes``, in which (0, 0) is an image that cannot be used; that raises the error, unless it may be skipped."""
    unusable = {name for name, (width, _) in sizes.items() if not width}
    if unusable and not skip_unreadable:
        table.image_sizes(next(record for record in table if unusable.intersection(record.images)))
    return sizes


def _read_size(table: RecordTable, name: str) -> Size:
    try:
        return table.of_image(image_size, name)
    except UserError:
        return 0, 0
