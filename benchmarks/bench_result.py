"""What the benchmarks share: the real command line, and the form of a result, with device, versions and date."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from phi3v.bench.result import with_environment, write_json

ROOT = Path(__file__).parents[1]


def phi3v(*arguments: object, threads: int | None = None) -> dict[str, Any]:
    """Run a command of the package from the repository's root with ``--json``, and return its object."""
    command = [sys.executable, "-m", "phi3v", *map(str, arguments), "--json"]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def peak_memory(*, reset: bool = False) -> int:
    """Bytes that this process had in memory at most, since the last reset (proc_pid_clear_refs(5))."""
    status = Path("/proc/self/status").read_text().split()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(status[status.index("VmHWM:") + 1])


def write_result(name: str, figures: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write ``figures`` with where and with what they were measured to ``out``, and return the whole."""
    result = with_environment(name, figures)
    write_json(result, out)
    return result


def write_between_marks(file: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks of a document."""
    begin, end = marks
    before, found, rest = file.read_text(encoding="utf-8").partition(begin)
    _, also_found, after = rest.partition(end)
    if not found or not also_found:
        raise SystemExit(f"{file} lacks the marks {begin} and {end}")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
