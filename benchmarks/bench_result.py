"""What every benchmark writes down: where and with what it was measured."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def phi3v(*arguments: str) -> dict[str, Any]:
    """Run a command with ``--json`` and return its object."""
    command = [sys.executable, "-m", "phi3v", *arguments, "--json"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def cpu_name() -> str:
    """The processor as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def measured_on(environment: dict[str, Any]) -> dict[str, Any]:
    """Device, date and versions, from what ``run_folder.environment`` gives or a run folder holds."""
    device = environment["gpus"][0] if environment["gpus"] else f"{cpu_name()}, {environment['cpus']} cores"
    return {
        "device": device,
        "date": environment["date"],
        "python": environment["python"],
        "versions": environment["versions"],
    }


def write_result(figures: dict[str, Any], out: Path) -> None:
    """Write the figures and show them."""
    text = json.dumps(figures, indent=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")
    print(text)
