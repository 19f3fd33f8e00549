"""The sizes of a table's images: out of an index, or of their headers, which are read once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from phi3v.data.cache import digest, keep_arrays, recall_arrays
from phi3v.data.image_store import THREADS
from phi3v.data.images import image_size
from phi3v.data.table import RecordTable
from phi3v.errors import UserError

Ints = npt.NDArray[np.int64]

VERSION = 1  # of the kept file


def image_sizes(table: RecordTable, *, skip_unreadable: bool = False) -> Ints:
    """(images, 2) width and height of all images, in the order of `distinct_images`; kept where there can be a cache.

    Args:
        skip_unreadable: (0, 0) where the header cannot be read, in place of an error.

    Raises:
        UserError: the header of an image cannot be read; names the line and the field.
    """
    names, _ = table.distinct_images()
    known = table.images.sizes(names, exif_orientation=table.exif_orientation)
    if known is not None:
        usable = known.prod(axis=1, keepdims=True) <= table.max_pixels
        return _all_usable(table, names, np.where(usable, known, 0), skip_unreadable)
    file = table.folder / f"sizes-{digest(VERSION, table.images.identity, table.exif_orientation)}.npz"
    stamps = table.images.stamps(names)
    kept = recall_arrays(file, {"stamps": len(names), "sizes": len(names)})
    if kept is not None and kept["sizes"].shape == stamps.shape and np.array_equal(kept["stamps"], stamps):
        sizes = kept["sizes"]
        if (sizes.prod(axis=1) <= table.max_pixels).all():
            return sizes
    with ThreadPoolExecutor(THREADS) as pool:
        read = list(pool.map(lambda name: _read_size(table, name), names))
    sizes = np.array(read, dtype=np.int64).reshape(-1, 2)
    if sizes.all():
        keep_arrays(file, {"stamps": stamps, "sizes": sizes})
    return _all_usable(table, names, sizes, skip_unreadable)


def _all_usable(table: RecordTable, names: Sequence[str], sizes: Ints, skip_unreadable: bool) -> Ints:
    """``sizes``, in which (0, 0) is an image that cannot be used; that raises the error, unless it may be skipped."""
    unusable = {names[place] for place in np.flatnonzero(sizes[:, 0] == 0).tolist()}
    if unusable and not skip_unreadable:
        table.image_sizes(next(record for record in table if unusable.intersection(record.images)))
    return sizes


def _read_size(table: RecordTable, name: str) -> tuple[int, int]:
    try:
        return table.of_image(image_size, name)
    except UserError:
        return 0, 0
