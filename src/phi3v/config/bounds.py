"""What the numbers of a configuration may be."""

from __future__ import annotations

from typing import Any

from phi3v.errors import UserError


def require_bounds(
    group: Any, name: str, *, above_0: str = "", at_least_0: str = "", at_least_1: str = "", **share: float
) -> None:
    """Refuse values of keys (several in one text) that are out of bounds; keys that are not set pass.

    Args:
        share: keys from 0 to this value.
    """
    bounds = [(key, 0.0, None) for key in at_least_0.split()] + [(key, 1.0, None) for key in at_least_1.split()]
    for key, low, high in [*bounds, *((key, 0.0, most) for key, most in share.items())]:
        value = getattr(group, key)
        if value is not None and value < low:
            raise UserError(f"must be at least {low:g}, got {value}", where=f"{name}.{key}")
        if value is not None and high is not None and value > high:
            raise UserError(f"must be at most {high:g}, got {value}", where=f"{name}.{key}")
    for key in above_0.split():
        value = getattr(group, key)
        if value is not None and value <= 0:
            raise UserError(f"must be above 0, got {value}", where=f"{name}.{key}")
