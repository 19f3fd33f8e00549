"""The examination in a process of its own, for GPUs.

A kernel that reads where it must not leaves its process without a usable CUDA context, some die of it altogether, and
what it left in the allocator stays: the run itself must not be the one to try. Run as a module this file is that
process: ``python -m phi3v.train.selfcheck.process FOLDER``. It writes a line of JSON for each verdict. Where it dies
or says nothing for too long, what it was trying has failed, and another process goes on with the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from phi3v.config import load_config
from phi3v.machine import accelerator_of
from phi3v.model.configuration import Phi3VConfig
from phi3v.train.compute.fast_paths import FastPaths
from phi3v.train.device import LAUNCHER, RuntimeDevice
from phi3v.train.selfcheck.examine import CheckCase, examine
from phi3v.train.selfcheck.verdict import Verdict

SECONDS = 300.0  # without a verdict: torch.compile takes a minute or two
SECONDS_IN_ALL = 900.0  # the other ranks wait
# What does not come from a kernel: someone ended it, or the machine ran out of memory.
ENDED = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
COMMAND = (sys.executable, "-m", "phi3v.train.selfcheck.process")


def examine_apart(case: CheckCase, *, seconds: float = SECONDS, command: Sequence[str] = COMMAND) -> Iterator[Verdict]:
    """As `examine`, in other processes.

    Args:
        seconds: how long to wait for a verdict.
        command: starts the process, given a folder.
    """
    known: dict[tuple[str, Any], Verdict] = {}
    with tempfile.TemporaryDirectory(prefix="phi3v-selfcheck-") as name:
        folder = Path(name)
        _write(case, folder)
        end = time.monotonic() + SECONDS_IN_ALL
        while True:
            if (left := end - time.monotonic()) <= 0:
                what = f"the rest was left out after {SECONDS_IN_ALL / 60:g} minutes"
                yield Verdict("precision", case.runtime.precision, "unchecked", what)
                return
            (folder / "known.json").write_text(json.dumps([asdict(verdict) for verdict in known.values()]))
            trying: Verdict | None = None
            why, before = "", len(known)
            for answer in _answers([*command, str(folder)], folder, min(seconds, left)):
                if isinstance(answer, str):
                    why = answer
                    break
                trying = answer if answer.state == "trying" else None
                if trying is None and (answer.path, answer.value) not in known:
                    known[answer.path, answer.value] = answer
                    yield answer
            else:
                return
            if trying is None and len(known) > before:
                continue  # a kernel that raised has broken its context
            if trying is None or (trying.path, trying.value) in known:
                trying = Verdict("precision", case.runtime.precision, "trying")
            is_kernel = trying.path != "precision" and not why.startswith("was ended")
            lost = Verdict(trying.path, trying.value, "failed" if is_kernel else "unchecked", f"its process {why}")
            known[lost.path, lost.value] = lost
            yield lost
            if lost.path == "precision":
                return  # without the plain path nothing can be said of the others


def _write(case: CheckCase, folder: Path) -> None:
    case.model.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(case.config.to_yaml(), encoding="utf-8")
    facts = {
        "paths": asdict(case.paths),
        "stored": str(case.stored).removeprefix("torch."),
        "device": str(case.runtime.device),
        "precision": case.runtime.precision,
    }
    (folder / "case.json").write_text(json.dumps(facts))
    torch.save(dict(case.row), folder / "row.pt")


def _read(folder: Path) -> CheckCase:
    facts = json.loads((folder / "case.json").read_text())
    device = torch.device(facts["device"])
    return CheckCase(
        load_config(folder / "recipe.yaml"),
        Phi3VConfig.from_pretrained(folder),
        getattr(torch, facts["stored"]),
        RuntimeDevice(device, facts["precision"], "self-check", 0, 1, gpu=accelerator_of(device)),
        FastPaths(**facts["paths"] | {"recomputing": tuple(facts["paths"]["recomputing"])}),
        torch.load(folder / "row.pt", weights_only=True),
    )


def _answers(command: list[str], folder: Path, seconds: float) -> Iterator[Verdict | str]:
    """The verdicts of one process; last, if it did not come to its end, why."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for the run, which ends it below
        )
    assert process.stdout is not None
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            pending, until = b"", time.monotonic() + seconds
            while True:
                if not selector.select(max(0.0, until - time.monotonic())):
                    yield f"gave no answer within {seconds:g} s"
                    return
                read = os.read(process.stdout.fileno(), 65536)
                if not read:
                    break
                *lines, pending = (pending + read).split(b"\n")
                for line in lines:
                    with contextlib.suppress(ValueError, TypeError):  # what a library prints
                        yield Verdict.of_json(json.loads(line))
                        until = time.monotonic() + seconds
        code = process.wait()
        if code:
            said = (folder / "errors.txt").read_text(errors="replace").strip().splitlines()
            last = f": {said[-1][:200]}" if said else ""
            yield f"was ended by signal {-code}" if code in ENDED else f"ended with code {code}{last}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # those that compile for it too
        process.wait()
        process.stdout.close()


def main(folder: Path) -> int:
    """The process: verdicts on standard output."""
    case = _read(folder)
    known = [Verdict.of_json(values) for values in json.loads((folder / "known.json").read_text())]
    for verdict in examine(case, {(verdict.path, verdict.value): verdict for verdict in known}):
        print(json.dumps(asdict(verdict)), flush=True)
        if case.runtime.device.type == "cuda" and verdict.state != "trying":
            torch.cuda.synchronize()  # raises where a kernel broke the context, and another process goes on
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
