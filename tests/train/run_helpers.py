"""What the tests of runs share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Runs `phi3v train` with `name, value, name, value, …` over small defaults; gives the exit code and the run folder.
Train = Callable[..., tuple[int, Path]]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
