"""The first minutes on a GPU: what is wrong there, what is fast, and where the time goes. One command, one file.

    python benchmarks/gpu_first.py --minutes 12             # full size, random weights, made there
    python benchmarks/gpu_first.py --minutes 12 --resume    # go on where it stopped, or with what failed
    python benchmarks/gpu_first.py --cpu                    # a rehearsal: every stage, with the tiny model, on the CPU

The stages (``gpu_stages.py``) come in the order of what they tell. Each runs in a process of its own, for its share of
the minutes that are left; what one leaves over, the others get. The result is written after every part of a stage, so
this may be stopped at any moment. A part that fails or outlasts its time is recorded with its last lines, and the next
one begins, in a new process. What is not installed is not a failure: such a part is "not there".

``gpu_table.py`` makes the tables of docs/benchmarks.md of the results in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from gpu_stages import MACHINE, ROOT, STAGES, Stage

# Statuses of a part that is not tried again.
SETTLED = ("done", "not there")
WORST_FIRST = ("failed", "timed out", "no time left", "not run", "done")
LAST_LINES = 20
PATIENCE = 5.0  # seconds that a process has to end after a signal
# Facts of the machine without which figures do not belong into one file.
IDENTITY = ("device", "versions", "cuda", "driver", "memory_gb", "python")


class Process(Protocol):
    """Of `subprocess.Popen`, what is used here."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


# (stage, its parts, file of events, log) to a process of them.
Start = Callable[[Stage, Sequence[str], Path, Path], Process]


def run_stage(
    stage: Stage, seconds: float, start: Start, tell: Callable[[dict[str, Any]], None], earlier: dict[str, Any]
) -> dict[str, Any]:
    """Do the parts of a stage that are not settled.

    Args:
        seconds: for all of them.
        start: begins a process for some parts.
        tell: gets the stage's entry after every part.
        earlier: the parts of an earlier call.

    Returns:
        The entry of the result: ``about``, ``status``, ``seconds`` and the ``parts``, each with its ``status`` and
        ``date``, ``figures`` if it is done, else the ``reason`` or the ``last_lines``.
    """
    began = time.monotonic()
    parts = {name: earlier.get(name, {"status": "not run"}) for name in stage.parts}
    entry: dict[str, Any] = {"about": stage.about, "status": "", "seconds": 0.0, "parts": parts}

    def put(name: str, found: dict[str, Any]) -> None:
        parts[name] = found | {"date": _now()}
        entry["status"], entry["seconds"] = _status(parts), round(time.monotonic() - began, 1)
        tell(entry)

    left = [name for name in parts if parts[name]["status"] not in SETTLED]
    while left and (rest := seconds - (time.monotonic() - began)) > 1:
        with tempfile.TemporaryDirectory() as folder:
            settled = _run_parts(stage, left, rest, start, put, Path(folder))
        left = left[settled:]
    for name in left:
        put(name, {"status": "no time left"})
    return entry


def _run_parts(
    stage: Stage,
    left: list[str],
    seconds: float,
    start: Start,
    put: Callable[[str, dict[str, Any]], None],
    folder: Path,
) -> int:
    """Let one process do as many of the parts as it can; how many it came to an end with, the last perhaps a bad one.

    A part may take twice its share of the time, so that one that hangs leaves something to the others.
    """
    events, log = folder / "events.jsonl", folder / "log"
    events.touch()
    process = start(stage, left, events, log)
    done, part_began, end_of_all = 0, time.monotonic(), time.monotonic() + seconds
    try:
        while True:
            code = process.poll()  # before the events are read, which are then complete
            ended = _ended_parts(events)
            for found in ended[done:]:
                name = left[done]
                put(name, found | {"seconds": round(time.monotonic() - part_began, 1)})
                done, part_began = done + 1, time.monotonic()
                if done == len(left):
                    return done
            now = time.monotonic()
            rest = end_of_all - part_began
            if now > part_began + min(rest, 2 * rest / (len(left) - done)):
                problem = {"status": "timed out", "seconds": round(now - part_began, 1)}
            elif code is not None:
                problem = {"status": "failed", "reason": f"its process ended with {code}"}
            else:
                time.sleep(0.05)
                continue
            _end(process)
            put(left[done], problem | {"last_lines": _last_lines(log)})
            return done + 1
    finally:
        _end(process)


def _ended_parts(events: Path) -> list[dict[str, Any]]:
    """Of each part that ended, in order, its entry; a line that is none of ours ends the reading."""
    ended = []
    for line in events.read_bytes().split(b"\n")[:-1]:
        try:
            event = json.loads(line)
            if event["event"] == "end":
                ended.append({key: event[key] for key in ("status", "reason", "figures") if key in event})
                if event["status"] not in SETTLED:
                    raise ValueError(event["status"])
        except (ValueError, KeyError, TypeError):
            return ended
    return ended


def _end(process: Process) -> None:
    """End a process and all that it started, which have a process group of their own."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
        except (ProcessLookupError, PermissionError):
            break
        until = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    process.wait()


def _last_lines(log: Path) -> list[str]:
    text = log.read_bytes()[-20_000:].decode("utf-8", errors="replace") if log.is_file() else ""
    lines = ["".join(c if c.isprintable() else " " for c in line).rstrip()[:300] for line in text.splitlines()]
    return [line for line in lines if line][-LAST_LINES:]


def _status(parts: dict[str, Any]) -> str:
    """Of a stage: the worst of its parts; ``not there`` if all are."""
    found = {part["status"] for part in parts.values()}
    return next((status for status in WORST_FIRST if status in found), "not there")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write(result: dict[str, Any], out: Path) -> None:
    """Whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    part.replace(out)


def measure(result: dict[str, Any], stages: Sequence[Stage], seconds: float, start: Start, out: Path) -> None:
    """Do the stages that are not settled, in order, within so many seconds; after every part ``out`` is written."""
    until = time.monotonic() + seconds

    def is_open(stage: Stage) -> bool:
        return result["stages"][stage.name]["status"] not in SETTLED

    todo = [stage for stage in stages if is_open(stage)]
    for position, stage in enumerate(todo):
        share = stage.seconds / sum(other.seconds for other in todo[position:])

        def tell(entry: dict[str, Any], stage: Stage = stage) -> None:
            result["stages"][stage.name] = entry
            write(result, out)

        earlier = result["stages"][stage.name]["parts"]
        entry = run_stage(stage, share * (until - time.monotonic()), start, tell, earlier)
        tell(entry)
        print(f"{stage.name}: {entry['status']}, {entry['seconds']} s", file=sys.stderr)


def not_run(stage: Stage) -> dict[str, Any]:
    return {"about": stage.about, "status": "not run", "seconds": 0.0, "parts": {}}


def begin(out: Path, facts: dict[str, Any], about: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """A new result, or the one in ``out`` to go on with where it is of the same machine and settings.

    Raises:
        SystemExit: there is one, and it is not to be gone on with.
    """
    result = facts | about | {"stages": {stage.name: not_run(stage) for stage in STAGES}}
    if not out.is_file():
        return result
    if not resume:
        raise SystemExit(f"{out} holds a result: go on with it by --resume, or choose another --out")
    held = json.loads(out.read_text(encoding="utf-8"))
    changed = [name for name in (*IDENTITY, *about) if held.get(name) != result.get(name) and name != "minutes"]
    if changed:
        print(f"{out} is of another {', '.join(changed)}: everything is measured anew", file=sys.stderr)
        return result
    return result | {"date": held["date"], "stages": result["stages"] | held["stages"]}


def starter(given: argparse.Namespace, folder: Path) -> Start:
    """Processes of ``gpu_stages.py``."""
    options = ["--folder", folder, "--preset", given.preset, "--parent", os.getpid()]
    options += ["--model", given.model] if given.model is not None else []
    options += ["--small"] if given.cpu or given.preset == "tiny" else []
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if given.cpu else {}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | hidden

    def start(stage: Stage, parts: Sequence[str], events: Path, log: Path) -> Process:
        command = [sys.executable, Path(__file__).with_name("gpu_stages.py"), stage.name, "--events", events]
        with log.open("wb") as file:
            return subprocess.Popen(
                [str(word) for word in (*command, *options, "--parts", *parts)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )

    return start


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0, help="for everything (default: 12)")
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/gpu_first_CARD.json)")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds already")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="only these stages")
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU, with the tiny model")
    parser.add_argument("--preset", choices=("phi-3.5-vision", "phi-3-vision", "tiny"))
    parser.add_argument("--model", type=Path, help="a model folder in place of random weights")
    parser.add_argument("--folder", type=Path, help="for what the stages share (default: in phi3v's cache)")
    given = parser.parse_args(argv)
    given.preset = given.preset or ("tiny" if given.cpu else "phi-3.5-vision")
    if given.cpu and given.out is None:
        parser.error("--cpu needs --out: a rehearsal is no result")
    return given


def main(argv: list[str] | None = None, starting: Callable[[argparse.Namespace, Path], Start] = starter) -> int:
    """0 if every stage is done or not there, 1 if not, 2 if it cannot begin."""
    given = parse(argv)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as Ctrl-C, so that nothing is left
    if given.folder is None:
        from phi3v.data.cache import cache_root

        given.folder = cache_root() / "gpu-first"
    given.folder.mkdir(parents=True, exist_ok=True)
    start = starting(given, given.folder.resolve())
    known = run_stage(MACHINE, 60 * given.minutes, start, lambda entry: None, {})["parts"]["facts"]
    if known["status"] != "done":
        print("\n".join(known.get("last_lines", [known["status"]])), file=sys.stderr)
        return 2
    facts = known["figures"]
    if not facts["is_gpu"] and not given.cpu:
        print("torch sees no GPU here; --cpu rehearses on the CPU", file=sys.stderr)
        return 2
    card = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    out = given.out or ROOT / "benchmarks" / "results" / f"gpu_first_{card}.json"
    model = str(given.model) if given.model is not None else f"{given.preset}, random weights"
    about = {"is_rehearsal": given.cpu or given.preset == "tiny", "model": model, "minutes": given.minutes}
    result = begin(out, facts, about, resume=given.resume)
    write(result, out)
    stages = [stage for stage in STAGES if given.only is None or stage.name in given.only]
    measure(result, stages, 60 * given.minutes - (time.monotonic() - began), start, out)
    states = [result["stages"][stage.name]["status"] for stage in stages]
    print(f"{out}: {sum(state in SETTLED for state in states)} of {len(states)} stages done", file=sys.stderr)
    return 0 if all(state in SETTLED for state in states) else 1


if __name__ == "__main__":
    sys.exit(main())
