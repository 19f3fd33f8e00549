"""The folder of a run: what it holds, and that nothing in it is lost by accident."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from phi3v.config import RunConfig
from phi3v.data.jsonl import replacing
from phi3v.errors import UserError
from phi3v.json_files import read_json
from phi3v.machine import available_cores
from phi3v.paths import absolute, cannot_write
from phi3v.train.checkpoint_folder import checkpoints, remove_unfinished
from phi3v.train.device import library_versions

# Everything that a run writes; `overwrite` removes these and nothing else.
RUN_FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "eval_before.json",
    "eval_after.json",
    "predictions_before.jsonl",
    "predictions_after.jsonl",
    "report.html",
    "log.txt",
)
RUN_FOLDERS = ("best", "final", "runs")


# Any of these says that a run got somewhere.
RESULTS = ("metrics.jsonl", "eval_before.json", "eval_after.json", "best", "final")


HINT = "choose another --training.output_dir"
LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system that has none
_held: list[int] = []


def _leave_to_parent() -> None:
    """A forked reader outlives a parent that was killed by some seconds, and must not hold its lock meanwhile."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_leave_to_parent)


@contextlib.contextmanager
def hold_run_folder(folder: Path) -> Iterator[None]:
    """Make a run folder, and keep other runs out of it as long as this one is there.

    The lock is the kernel's: it ends with the process, however that ends, so there is none to clear away. What was made
    and holds nothing at the end goes again.

    Raises:
        UserError: another run is there, or the folder cannot be written.
    """
    where = f"training.output_dir {folder}"
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder / LOCK, where)
        about = {"pid": os.getpid(), "host": platform.node(), "since": _now()}
        os.ftruncate(lock, 0)
        os.write(lock, json.dumps(about).encode())
    except OSError as error:
        _let_go(folder, lock, made)
        raise cannot_write(error, where, HINT) from None
    _held.append(lock)
    try:
        yield
    finally:
        if lock in _held:  # else this is a forked process
            _held.remove(lock)
            _let_go(folder, lock, made)


def _lock(path: Path, where: str) -> int:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                holder = os.read(lock, 4096)
                os.close(lock)
                raise _held_by(holder, where) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        os.close(lock)  # whoever held it has removed it meanwhile


def _held_by(holder: bytes, where: str) -> UserError:
    try:
        about = json.loads(holder)
        who = f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        who = "it has just begun"
    return UserError(f"another run is writing there ({who})", where=where, hint=f"wait until it ends, or {HINT}")


def _let_go(folder: Path, lock: int | None, made: list[Path]) -> None:
    if lock is not None:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(lock)
    with contextlib.suppress(OSError):  # what holds something stays
        for path in made:
            path.rmdir()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_run_folder(config: RunConfig, *, resume: bool = False) -> Path:
    """Look whether a run may write to ``training.output_dir``; nothing is written or removed yet.

    Args:
        resume: what it holds is gone on with, or replaced if there is nothing to go on from.

    Raises:
        UserError: it holds a run and ``training.overwrite`` is not set; or what would be replaced is needed by this
            very run.
    """
    folder = Path(config.training.output_dir)
    in_the_way = [name for name in RUN_FILES if (folder / name).is_dir()]
    in_the_way += [name for name in RUN_FOLDERS if (folder / name).is_file()]
    if in_the_way:
        kind = "folder" if in_the_way[0] in RUN_FILES else "file"
        raise UserError(f"{in_the_way[0]} is a {kind}, which is in the way of a run", where=str(folder), hint=HINT)
    held = [name for name in RESULTS if (folder / name).exists()]
    saved = [path.name for path in checkpoints(folder)]
    if (held or saved) and not config.training.overwrite and not resume:
        raise UserError(
            f"holds a run already ({', '.join([*held, *saved])})",
            where=str(folder),
            hint=("add --resume to go on with it, " if saved else "")
            + "choose another --training.output_dir, or add --training.overwrite true to replace it",
        )
    for key, needed in (
        ("model.path", config.model.path),
        *config.data.paths,
    ):
        for name in (*RUN_FILES, *RUN_FOLDERS, *saved):
            replaced = (folder / name).resolve()
            if replaced.exists() and Path(needed).resolve().is_relative_to(replaced):
                raise UserError(
                    f"{key} is {needed}, which this run would replace",
                    where=str(folder),
                    hint=HINT,
                )
    return folder


def claim_run_folder(config: RunConfig, about: Mapping[str, Any] | None = None) -> Path:
    """Make the folder, remove what an earlier run left there, write ``config.yaml`` and ``environment.json``.

    Args:
        about: what ``environment.json`` tells besides.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(config.training.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
        remove_unfinished(folder)
        for path in (*(folder / name for name in RUN_FOLDERS), *checkpoints(folder)):
            if path.is_dir():
                shutil.rmtree(path)
        _describe(folder, config, environment() | dict(about or {}))
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(folder)) from None
    return folder


def describe_again(config: RunConfig, about: Mapping[str, Any] | None = None) -> None:
    """The configuration that a resumed run goes on with, and its environment beside the first one.

    Args:
        about: as of `claim_run_folder`.

    Raises:
        UserError: it cannot be written, or ``environment.json`` is damaged.
    """
    folder = Path(config.training.output_dir)
    hint = "copy it back, or write {} into it: it tells versions and hardware, and no step depends on it"
    facts = read_json(folder / "environment.json", hint=hint)
    now = environment() | dict(about or {})
    try:
        _describe(folder, config, facts | {"resumed": [*facts.get("resumed", []), now]})
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(folder)) from None


def _describe(folder: Path, config: RunConfig, facts: dict[str, Any]) -> None:
    # As a place that is the same from any folder; what is in it is found from there even if both are moved.
    named = replace(config, training=replace(config.training, output_dir=str(absolute(folder))))
    for name, text in (("config.yaml", named.to_yaml()), ("environment.json", json.dumps(facts, indent=2) + "\n")):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def environment() -> dict[str, Any]:
    """Versions, hardware and command of this process."""
    return {
        "date": _now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": library_versions(),
        "cpu_threads": torch.get_num_threads(),
        "cpus": available_cores(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }
