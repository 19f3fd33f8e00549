"""A folder has a checkpoint's name only while it is whole, wherever a crash comes."""

from __future__ import annotations

import errno
import functools
import os
import stat
from pathlib import Path

import pytest
import torch

from phi3v.paths import file_hash
from phi3v.train import checkpoint_folder
from phi3v.train.checkpoint_folder import (
    checkpoints,
    damage,
    find_checkpoint,
    publish,
    read_state,
    remove_older,
    remove_unfinished,
    unfinished_folder,
    write_state,
)
from phi3v.train.checkpoints.random_state import random_state, set_random_state


def save(run: Path, step: int, word: str = "weights") -> Path:
    unfinished = unfinished_folder(run, step, word)
    (unfinished / "optimizer").mkdir(parents=True)
    (unfinished / "optimizer" / "optimizer.pt").write_text(word)
    write_state(unfinished, {"step": step}, [random_state()])
    return publish(unfinished)


def test_it_appears_whole(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        folder = save(tmp_path, step)
        assert folder == tmp_path / f"checkpoint-{step}"
        assert damage(folder) is None
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-10", "checkpoint-9"]
    remove_older(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]


class Crash(BaseException):
    """What a killed process does next: nothing."""


@pytest.mark.parametrize("moment", range(1, 60))
def test_a_crash_at_any_system_call_leaves_a_valid_one(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save, a save of the same step again and the removal of an older one, ended at every call that changes files."""
    save(tmp_path, 1)
    calls = iter(range(1, 10_000))

    def ending(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            if next(calls) == moment:
                raise Crash
            return function(*args, **kwargs)

        return call

    for name in ("rename", "unlink", "rmdir", "mkdir", "open", "fsync"):
        monkeypatch.setattr(os, name, ending(getattr(os, name)))
    try:
        save(tmp_path, 2, "first")
        save(tmp_path, 2, "second")
        remove_older(tmp_path, 1)
    except Crash:
        pass
    monkeypatch.undo()
    remove_unfinished(tmp_path)
    found = find_checkpoint(tmp_path)
    assert found.folder is not None
    assert not found.skipped
    assert all(damage(folder) is None for folder in checkpoints(tmp_path))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("backwards", [False, True])
def test_a_folder_that_is_renamed_file_by_file_is_none_before_the_last(tmp_path: Path, backwards: bool) -> None:
    """As an object store does that is mounted as a disk; a kill comes in between."""
    whole = save(tmp_path / "whole", 3)
    files = sorted((path for path in whole.rglob("*") if path.is_file()), reverse=backwards)
    folder = tmp_path / "run" / whole.name
    for path in files:
        assert damage(folder) is not None
        target = folder / path.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    assert damage(folder) is None


def test_a_disk_that_flushes_no_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int, *, of_folders: int = errno.EINVAL, of_files: int = 0) -> None:
        number = of_folders if stat.S_ISDIR(os.fstat(descriptor).st_mode) else of_files
        if number:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    assert damage(save(tmp_path, 3)) is None
    for others in ({"of_folders": errno.EIO}, {"of_files": errno.EINVAL}):
        monkeypatch.setattr(os, "fsync", functools.partial(fsync, **others))
        with pytest.raises(OSError, match=os.strerror(next(iter(others.values())))):
            save(tmp_path, 4, next(iter(others)))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]


def test_damage_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    (folder / "optimizer" / "optimizer.pt").write_text("Weights")
    assert damage(folder) == "optimizer/optimizer.pt is not what was written (its SHA-256 differs)"
    (folder / "optimizer" / "optimizer.pt").unlink()
    assert damage(folder) == "optimizer/optimizer.pt is missing"
    (folder / "manifest.json").write_text("[1, 2")
    assert damage(folder) == "manifest.json or state.json is damaged"
    (folder / "manifest.json").unlink()
    assert damage(folder) == "manifest.json is missing"
    newer = save(tmp_path, 4)
    assert damage(newer) is None
    assert find_checkpoint(tmp_path).folder == newer


def test_what_others_wrote_is_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a disk that machines share does not list it yet."""
    unfinished = unfinished_folder(tmp_path, 3, "try")
    unfinished.mkdir()
    write_state(unfinished, {"step": 3}, [random_state()])
    (unfinished / "other").write_text("theirs")
    listed = checkpoint_folder._files
    monkeypatch.setattr(
        checkpoint_folder, "_files", lambda folder: (path for path in listed(folder) if path.name != "other")
    )
    folder = publish(unfinished, {"other": (file_hash(unfinished / "other"), 6)})
    assert damage(folder) is None
    (folder / "other").unlink()
    assert damage(folder) == "other is missing"


def test_another_format_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 3)
    monkeypatch.setattr(checkpoint_folder, "WHOLE_FORMAT", 3)
    assert damage(folder) == "is of format 1, and this version reads 3 and 2"


def test_random_numbers_go_on(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    expected = torch.rand(3)
    state, (own,) = read_state(folder)
    assert state["step"] == 5
    set_random_state(own)
    assert torch.equal(torch.rand(3), expected)
