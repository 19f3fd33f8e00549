"""Counts what a step reads back from the device, for which it would wait for all that was queued there; its samples."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phi3v.data.collate import Page, Sample

# Reads of one value, and operations whose result has as many elements as the values say.
READS = (
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.is_nonzero",
    "aten.masked_select",
    "aten.nonzero",
    "aten._unique2",
    "aten.unique_dim",
    "aten.repeat_interleave",
)


class DeviceReads(TorchDispatchMode):
    """Counts reads by the name of the operation while it is active; a mask as an index is one too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        indices = args[1] if name in ("aten.index", "aten.index_put", "aten._unsafe_index") else ()
        if name in READS or any(index is not None and index.dtype == torch.bool for index in indices):
            self.found[name] += 1
        return func(*args, **kwargs or {})


def sample(text: int, *pages: tuple[str, int]) -> Sample:
    """``text`` tokens after the pages, the last three with labels; a page is a name and a number of crops in a row."""
    ids, made = [1], []
    for number, (name, crops) in enumerate(pages, start=1):
        ids += [-number] * ((crops + 1) * 144 + 1 + 2 * 12)
        made.append(Page(name, (336, 336 * crops), torch.zeros(336, 336 * crops, 3, dtype=torch.uint8)))
    ids += range(5, 5 + text)
    return Sample(ids, [-100] * (len(ids) - 3) + ids[-3:], made)
