"""What the benchmarks share: the real command line, and the form of a result, with device, versions and date."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from phi3v.train.run_folder import environment

ROOT = Path(__file__).parents[1]


def phi3v(*arguments: object) -> dict[str, Any]:
    """Run a command of the package from the repository's root with ``--json``, and return its object."""
    command = [sys.executable, "-m", "phi3v", *map(str, arguments), "--json"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def cpu_name() -> str:
    """The processor as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_result(name: str, figures: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write ``figures`` with where and with what they were measured to ``out``, and return the whole."""
    facts = environment()
    device = facts["gpus"][0] if facts["gpus"] else f"{cpu_name()}, {facts['cpus']} cores"
    result = {
        "benchmark": name,
        "device": device,
        "date": facts["date"],
        "python": facts["python"],
        "versions": facts["versions"],
        **figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result
