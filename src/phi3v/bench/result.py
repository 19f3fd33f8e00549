"""The form of a result: the figures, with where, with what and when they were measured."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from phi3v.data.jsonl import replacing
from phi3v.train.run_folder import environment


def cpu_name() -> str:
    """The processor as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def with_environment(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """``figures`` of a benchmark with device, date and versions."""
    facts = environment()
    device = facts["gpus"][0] if facts["gpus"] else f"{cpu_name()}, {facts['cpus']} cores"
    return {
        "benchmark": name,
        "device": device,
        "date": facts["date"],
        "python": facts["python"],
        "versions": facts["versions"],
        **figures,
    }


def write_json(result: dict[str, Any], out: Path) -> None:
    """Write a result whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
