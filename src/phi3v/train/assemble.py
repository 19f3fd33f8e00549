"""The whole model of a sharded checkpoint, for all that reads models from a folder; one process puts it together."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock
from rich.console import Console
from safetensors import SafetensorError

from phi3v.data.cache import cache_root, cannot_write
from phi3v.errors import UserError
from phi3v.json_files import content_of
from phi3v.model.checkpoint import model_content, stored_tensors
from phi3v.model.configuration import Phi3VConfig
from phi3v.paths import file_hash, find_model, free_space
from phi3v.processing.processor import Phi3VProcessor
from phi3v.terminal import say
from phi3v.train.checkpoint_folder import MANIFEST, SHARDS, damage, tensor_bytes
from phi3v.train.methods.loading import make_skeleton
from phi3v.train.methods.weights import save_final
from phi3v.train.pieces import WEIGHTS, Piece, PieceError, read_pieces, saved_sizes

# Models that the cache keeps, and more while processes use them.
KEPT = 3

_in_use: dict[Path, BinaryIO] = {}  # by this process; the locks end with it


def whole_model(checkpoint: Path, base: str) -> Path:
    """A folder with the model of a checkpoint, as ``model/`` of one that is not sharded.

    The cache keeps the few that were used last; this one stays while the process lives.

    Args:
        base: what it was tuned from, a folder or a hub id; what was not trained is taken from there.

    Raises:
        UserError: the checkpoint or the base is damaged or incomplete, or the cache has no room.
    """
    description, shards = checkpoint / "model", checkpoint / SHARDS
    with content_of(description / "config.json"):
        model = make_skeleton(Phi3VConfig.from_pretrained(str(description)))
    wanted = model.state_dict()
    try:
        saved = {name: dtype for name, (_, dtype) in saved_sizes(shards).items() if name.startswith(f"{WEIGHTS}/")}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _damaged(checkpoint, error) from None
    trained = {name.removeprefix(f"{WEIGHTS}/"): dtype for name, dtype in saved.items()}
    frozen = wanted.keys() - trained.keys()
    where = f"{base}, whose frozen weights {checkpoint} goes on"
    base_folder = find_model(base, where, hint="name the folder where it is now: --model MODEL") if frozen else None
    try:
        key = file_hash(checkpoint / MANIFEST)[:32]
    except OSError as error:
        raise _damaged(checkpoint, error) from None
    if base_folder is not None:
        key += f"-{model_content(base_folder)[:16]}"
    folder = cache_root() / "checkpoints" / key
    if _use(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{key}.lock")).acquire()  # ranks that evaluate ask for it at once
    except OSError as error:
        raise cannot_write(folder, error) from None
    with lock:
        if not _use(folder):
            _put_together(checkpoint, model, trained, base_folder, folder)
            _use(folder)
    return folder


def _put_together(
    checkpoint: Path, model: Any, trained: Mapping[str, torch.dtype], base_folder: str | None, folder: Path
) -> None:
    """Write the model to ``folder``.

    Args:
        trained: the tensors that the checkpoint holds, and their dtypes.
    """
    description, shards, wanted = checkpoint / "model", checkpoint / SHARDS, model.state_dict()
    # A tensor of which no file is left would be taken for one that was frozen.
    if (wrong := damage(checkpoint, within=(f"{SHARDS}/", "model/"))) is not None:
        raise _damaged(checkpoint, wrong)
    whole = {name: torch.empty(wanted[name].shape, dtype=dtype) for name, dtype in trained.items() if name in wanted}
    pieces = [Piece(f"{WEIGHTS}/{name}", value.view(-1), 0, value.numel()) for name, value in whole.items()]
    say(Console(stderr=True), f"putting the parts of {checkpoint} together in {folder}")
    try:
        read_pieces(shards, pieces)
        if base_folder is not None:
            whole |= {name: tensor for _, name, tensor in stored_tensors(Path(base_folder), wanted.keys() - trained)}
        model.load_state_dict(whole, assign=True)
    except (PieceError, RuntimeError, OSError, SafetensorError) as error:
        raise _damaged(checkpoint, error) from None
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed: the lock is ours
    try:
        _make_room(folder.parent, tensor_bytes(model.state_dict()))
        save_final(model, Phi3VProcessor.from_pretrained(str(description)), new, model.state_dict())
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error if isinstance(error, OSError) else OSError(str(error))) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _use(folder: Path) -> bool:
    """Whether a model is in the cache; then it stays there until this process ends."""
    manifest = folder / MANIFEST
    try:
        file = manifest.open("rb")
    except OSError:
        return False
    with suppress(OSError):  # not every file system has locks
        fcntl.flock(file, fcntl.LOCK_SH)  # while it is being removed, wait until it is gone
    with suppress(OSError):  # the cache may be another user's
        os.utime(manifest)
    _in_use[folder] = file
    return manifest.is_file()


def _make_room(cache: Path, needed: int) -> None:
    """Remove what killed processes left, and of the models that nobody uses those that were used longest ago."""
    for new in cache.glob(".*.new"):
        lock = FileLock(new.with_suffix(".lock"), blocking=False)
        with suppress(TimeoutError), lock:
            shutil.rmtree(new, ignore_errors=True)
    kept = sorted(cache.glob(f"[!.]*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns)
    for number, manifest in enumerate(kept):
        if len(kept) - number < KEPT and free_space(cache) >= needed:
            break
        with suppress(OSError), manifest.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            manifest.unlink()  # first: without it the rest is no model
            shutil.rmtree(manifest.parent)


def _damaged(checkpoint: Path, error: Exception | str) -> UserError:
    what = " ".join(str(error).split())[:300]
    return UserError(f"cannot be put together: {what}", where=str(checkpoint), hint="take another checkpoint")
