"""Real processes for the tests that need several ranks.

A rank is forked from a server that has imported what ranks run, so that it starts at once: importing it takes seconds
of a core. That ``torchrun`` starts our commands is tested with the recipes' scripts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["phi3v.train.run", "phi3v.train.evaluate_finetuned", "deepspeed"])


def run_ranks(
    ranks: int,
    target: Callable[..., int | None],
    *arguments: Any,
    folder: Path,
    timeout: float = 240,
    codes: Sequence[int] | None = None,
) -> str:
    """Call a function of a test module on so many processes and return what they printed on standard output.

    Args:
        ranks: how many; one is a plain process, of no group.
        target: gives the exit code.
        folder: holds what the ranks print.
        timeout: seconds until they count as hanging.
        codes: exit codes that the ranks must end with by themselves, where these are not all 0; what they printed on
            standard error is returned too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    group |= {"LOCAL_WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        environment = dict(os.environ)
        if ranks > 1:
            environment |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = folder / f"rank-{rank}"
        process = _CONTEXT.Process(target=_rank, args=(target, arguments, environment, str(log)), daemon=True)
        process.start()
        processes.append(process)
    end = time.monotonic() + timeout
    try:
        while any(process.exitcode is None for process in processes) and time.monotonic() < end:
            if codes is None and any(process.exitcode for process in processes):
                break  # the others wait for it
            time.sleep(0.05)
        ended = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    out, err = ("".join(file.read_text() for file in sorted(folder.glob(f"rank-*.{name}"))) for name in ("out", "err"))
    assert ended == list(codes or [0] * ranks), f"{ended}\n{out[-1000:]}\n{err[-3000:]}"
    return out if codes is None else out + err


def command(*arguments: object) -> int:
    """``phi3v`` with these arguments, as what a rank runs."""
    from phi3v.cli import main

    return main([str(argument) for argument in arguments])


def script(path: str, flags: Sequence[str], cwd: str) -> None:
    """A script, or a module by its name, with its flags in its working folder, as what a rank runs."""
    os.chdir(cwd)
    sys.argv = [path, *flags]
    if not path.endswith(".py"):
        runpy.run_module(path, run_name="__main__")
        return
    sys.path.insert(0, str(Path(path).resolve().parent))
    runpy.run_path(path, run_name="__main__")


def _rank(target: Callable[..., int | None], arguments: tuple[Any, ...], environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with (
        open(f"{log}.out", "w") as out,
        open(f"{log}.err", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        code = target(*arguments) or 0
    sys.exit(code)
