"""What the self-check finds of a fast path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

State = Literal["trying", "passed", "failed", "unchecked"]


@dataclass(frozen=True)
class Verdict:
    """What is known of one path.

    Attributes:
        path, value: as of `FastPaths`; or ``precision``, ``optimizer``, ``four_bit``, which have no plain way.
        what: where it is furthest off, or why it fails or could not be checked.
        off: how far from float32 there, relative to the size of what is compared.
        plain_off: how far the plain way is, in the run's precision.
        allowed: how far it may be.
    """

    path: str
    value: Any
    state: State
    what: str = ""
    off: float | None = None
    plain_off: float | None = None
    allowed: float | None = None

    @property
    def label(self) -> str:
        """The path in words."""
        return f"{self.path.replace('_', ' ')} {self.value}" if not isinstance(self.value, bool) else self.path

    def __str__(self) -> str:
        if self.off is None or self.allowed is None:
            return f"{self.label}: {self.what}"
        plain = f", the plain path's by {_percent(self.plain_off)}" if self.plain_off is not None else ""
        return f"{self.label}: {self.what} is off by {_percent(self.off)}{plain}; {_percent(self.allowed)} are allowed"

    @classmethod
    def of_json(cls, values: Any) -> Verdict:
        """What was written with ``vars``.

        Raises:
            TypeError: it is something else.
        """
        made = cls(**values)
        numbers = (made.off, made.plain_off, made.allowed)
        if not all(number is None or isinstance(number, int | float) for number in numbers):
            raise TypeError("not a verdict")
        if not all(isinstance(text, str) for text in (made.path, made.state, made.what)):
            raise TypeError("not a verdict")
        return made


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.2g} %"
