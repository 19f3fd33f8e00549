"""How the next token is chosen from logits: the likeliest one, or one that is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from phi3v.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest (greedy); higher ones draw more freely.
        top_p: draw from the likeliest tokens that have this probability together.
        seed: of the draws; the same seed gives the same answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


class TokenChooser:
    """Takes the next token of each answer.

    Each answer has random numbers of its own, one a token, so what is drawn for it does not depend on which others are
    in its batch, up to the rounding of the logits.

    Args:
        names: one an answer; with the seed they decide its random numbers.
    """

    def __init__(self, sampling: Sampling, names: Sequence[str]) -> None:
        self._warpers: list[Callable[[Any, torch.Tensor], torch.Tensor]] = []
        self._streams: list[np.random.Generator] = []
        if sampling.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
            self._streams = [np.random.Generator(np.random.Philox(key=_key(sampling.seed, name))) for name in names]

    def __call__(self, logits: torch.Tensor, answers: Sequence[int | None]) -> torch.Tensor:
        """The next token (R,) of some of the answers, by their numbers, from their logits (R, V).

        A row without an answer gets some token; no random number is taken for it.

        Raises:
            UserError: there are logits to draw from that are not finite.
        """
        if not self._warpers:
            return logits.argmax(dim=-1)
        scores = logits.float()
        for warp in self._warpers:
            scores = warp(None, scores)
        # By inversion: the first token up to which the probabilities sum to more than the number drawn.
        sums = scores.softmax(dim=-1).double().cumsum(dim=-1)  # [R, V]
        numbers = [0.5 if answer is None else self._streams[answer].random() for answer in answers]
        drawn = torch.tensor(numbers, dtype=torch.float64)
        total = sums[:, -1:]
        if not total.isfinite().all():
            what = "the model's predictions are not finite numbers, so no answer can be drawn"
            raise UserError(what, hint="try another precision, or look at the run that made the model")
        level = torch.minimum(drawn[:, None].to(sums) * total, total.nextafter(torch.zeros_like(total)))
        return torch.searchsorted(sums, level, right=True)[:, 0]


def _key(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest, "big")
