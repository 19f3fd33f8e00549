"""The state of every generator of random numbers that training may draw from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of this process: tensors by generator, and what is no tensor as plain values."""
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, own_words, own_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(words).astype(np.int64)),
        "python": torch.tensor(own_words, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        # Of this rank's device; the others' would cost memory there. Needs a card: the generator is the driver's.
        tensors["cuda"] = torch.cuda.get_rng_state()
    plain = {"numpy": [name, position, has_gauss, gauss], "python": [version, own_gauss]}
    return {"tensors": tensors, "plain": plain}


def set_random_state(state: dict[str, Any]) -> None:
    """Go on drawing as the process that `random_state` describes."""
    tensors, plain = state["tensors"], state["plain"]
    torch.set_rng_state(tensors["torch"])
    name, position, has_gauss, gauss = plain["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, own_gauss = plain["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), own_gauss))
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])
