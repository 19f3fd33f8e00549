"""Checkpoints on the disk: what one holds, how it appears whole or not at all, and which is the newest valid one.

``RUN/checkpoint-N/`` holds, after optimizer step N::

    model/         what final/ would hold, with the trained tensors in the dtype they train in
    optimizer/     the engine's files: optimizer, schedule, gradient scaler
    shards/        of a sharded one: the trained weights and their moments, a file or more of each rank; ``model/`` has
                   no weights then, and there is no ``optimizer/``
    best/          the weights with the best score so far, if they are kept
    state.json     where the run is: step, data, counts, losses that are not logged yet, configuration, ranks, engine
    random.safetensors   the random generators of every rank
    manifest.json  the SHA-256 of every file; written last

All of it is written under another name in the run folder, flushed to the disk, and only then renamed, by rank 0.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from phi3v.paths import file_hash

MANIFEST = "manifest.json"
STATE = "state.json"
RANDOM = "random.safetensors"
SHARDS = "shards"
# Of ``state.json``.
WHOLE_FORMAT = 1
SHARDED_FORMAT = 2

_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = re.compile(r"\.checkpoint-\d+(\.\w+)?\.(new|old)")


@dataclass(frozen=True)
class Found:
    """What a search for a checkpoint came to.

    Attributes:
        folder: the newest valid one, if there is any.
        skipped: newer ones and why they were not taken.
    """

    folder: Path | None
    skipped: tuple[tuple[Path, str], ...] = ()


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its folder's name; -1 if it is none."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def is_sharded(folder: Path) -> bool:
    """Whether each rank wrote its own part of a checkpoint."""
    return (folder / SHARDS).is_dir()


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first; whether they are valid is not looked at."""
    if not run_folder.is_dir():
        return []
    folders = [path for path in run_folder.iterdir() if step_of(path) >= 0 and path.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def newest_checkpoint(run_folder: Path) -> str:
    """The newest checkpoint, in words."""
    saved = checkpoints(run_folder)
    return f"the newest checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"


def find_checkpoint(
    run_folder: Path, folders: Iterable[Path] | None = None, judge: Callable[[Path], str | None] | None = None
) -> Found:
    """The newest checkpoint whose files are all there and unchanged.

    Args:
        folders: look at these, in this order; default: all of the run.
        judge: what is wrong with one; default: `damage`.
    """
    skipped: list[tuple[Path, str]] = []
    for folder in checkpoints(run_folder) if folders is None else folders:
        wrong = (judge or damage)(folder)
        if wrong is None:
            return Found(folder, tuple(skipped))
        skipped.append((folder, wrong))
    return Found(None, tuple(skipped))


def damage(folder: Path, rank: int = 0, ranks: int = 1, within: tuple[str, ...] = ("",)) -> str | None:
    """What is wrong with a checkpoint, or None.

    Args:
        rank, ranks: look at one share of the files in so many.
        within: look at files whose names begin so.
    """
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name in [name for name in hashes if name.startswith(within)][rank::ranks]:
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if file_hash(path) != hashes[name]:
                return f"{name} is not what was written (its SHA-256 differs)"
        if unproven := [name for name in (STATE, RANDOM) if name not in hashes]:
            return f"manifest.json does not name {unproven[0]}"
        kind = json.loads((folder / STATE).read_text(encoding="utf-8"))["format"]
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json or state.json is damaged"
    known = (WHOLE_FORMAT, SHARDED_FORMAT)
    return None if kind in known else f"is of format {kind}, and this version reads {known[0]} and {known[1]}"


def remove_unfinished(run_folder: Path) -> list[Path]:
    """Delete what a killed process left half-written, and say what that was.

    A checkpoint that was being replaced by one of the same step gets its name back.
    """
    removed = []
    if run_folder.is_dir():
        for path in sorted(run_folder.iterdir(), key=lambda path: path.suffix, reverse=True):  # .old before .new
            if not _UNFINISHED.fullmatch(path.name):
                continue
            wanted = path.with_name(path.name.removeprefix(".").rsplit(".", 1)[0])
            if path.suffix == ".old" and not wanted.exists():
                path.rename(wanted)
                continue
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def unfinished_folder(run_folder: Path, step: int, attempt: str) -> Path:
    """Where a checkpoint is written before it is whole.

    Args:
        attempt: a name that no other try has, since a process of an earlier one may be writing still.
    """
    return run_folder / f".{checkpoint_name(step)}.{attempt}.new"


def publish(unfinished: Path, known: Mapping[str, tuple[str, int]] | None = None) -> Path:
    """Give a checkpoint that is written its name, and return it with that; a crash leaves it or what was before it.

    Args:
        known: SHA-256 and size of files that others wrote and flushed, by their names in the folder.

    Raises:
        OSError: one of these is not there as it was written.
    """
    known = known or {}
    for name, (_, size) in known.items():
        if (unfinished / name).stat().st_size != size:
            raise OSError(errno.EIO, "another rank's file is not as it was written", str(unfinished / name))
    # Those of other machines are named by what these said: a list of names may be older than the files.
    own = {name: path for path in _files(unfinished) if (name := path.relative_to(unfinished).as_posix()) not in known}
    hashes = {name: sha256 for name, (sha256, _) in known.items()}
    hashes |= {name: file_hash(path) for name, path in own.items()}
    (unfinished / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2) + "\n", encoding="utf-8")
    for path in [*own.values(), unfinished / MANIFEST]:
        _flush(path)
    for folder in [*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished]:
        _flush(folder)
    final = unfinished.with_name(unfinished.name.split(".")[1])
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    unfinished.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    return final


def remove_older(run_folder: Path, keep: int) -> None:
    """Leave the newest ``keep`` checkpoints."""
    for folder in checkpoints(run_folder)[keep:]:
        # Renamed first: what is half deleted must not look like a checkpoint.
        old = folder.with_name(f".{folder.name}.new")
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def write_state(folder: Path, state: dict[str, Any], randoms: list[dict[str, Any]]) -> None:
    """``state.json`` and the random generators of all ranks; of the whole format, unless the state says another."""
    plain = [rank["plain"] for rank in randoms]
    text = json.dumps({"format": WHOLE_FORMAT, **state, "random": plain}, indent=2)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")
    tensors = {
        f"rank-{rank}.{name}": tensor for rank, own in enumerate(randoms) for name, tensor in own["tensors"].items()
    }
    save_file(tensors, folder / RANDOM)


def read_state(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `write_state` wrote."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    randoms: list[dict[str, Any]] = [{"tensors": {}, "plain": plain} for plain in state.pop("random")]
    for name, tensor in load_file(folder / RANDOM).items():
        rank, own = name.removeprefix("rank-").split(".", 1)
        randoms[int(rank)]["tensors"][own] = tensor
    return state, randoms


def link_tree(source: Path, target: Path) -> None:
    """``target`` becomes what ``source`` is, without taking room for it where the file system has hard links."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(item) for item in value)
    return 0


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _flush(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # not every network disk flushes a folder
            raise
    finally:
        os.close(descriptor)
