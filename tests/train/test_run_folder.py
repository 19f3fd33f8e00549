"""One run at a time writes to a run folder, and what it cannot write is said before any work."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from run_helpers import Train

from phi3v.errors import UserError
from phi3v.train import prepare as preparation
from phi3v.train import run as training
from phi3v.train import run_folder
from phi3v.train.run_folder import LOCK, hold_run_folder


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was looked at")

    monkeypatch.setattr(preparation, "inspect_model", refuse)


def test_a_second_run_is_kept_out_and_told_by_whom(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with hold_run_folder(tmp_path / "run"):
        for how in ({"out": "run"}, {"out": "link"}, {"out": "run", "resume": "auto"}):
            assert train("training.overwrite", "true", **how)[0] == 2
            message = capsys.readouterr().err
            assert f"process {os.getpid()} on " in message
            assert "another --training.output_dir" in message
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    assert not (tmp_path / "run").exists()


def test_nothing_is_left_of_the_lock(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    real = training.print_header
    monkeypatch.setattr(training, "print_header", lambda *a: (held.append((folder / LOCK).read_text()), real(*a)))
    folder = train("training.max_steps", 0, out="run")[1]  # refused: nothing is made
    assert not folder.exists()
    code, folder = train("training.max_steps", 1, "data.eval", "null")
    assert code == 0
    assert json.loads(held[0])["pid"] == os.getpid()
    assert not (folder / LOCK).exists()


def test_the_lock_of_a_killed_run_is_taken_over_while_its_readers_still_live(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "run"
    holder = hold_run_folder(folder)
    holder.__enter__()
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()

    def read() -> None:
        begun.set()
        time.sleep(60)

    reader = fork.Process(target=read, daemon=True)
    reader.start()
    try:
        assert begun.wait(30)
        with pytest.raises(UserError, match="another run is writing there"), hold_run_folder(folder):
            pass
        os.close(run_folder._held.pop())  # what the kernel does with a process that is killed
        assert (folder / LOCK).is_file()
        with hold_run_folder(folder):
            assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
            (folder / "kept").touch()
        assert [path.name for path in folder.iterdir()] == ["kept"]
    finally:
        reader.kill()
        reader.join()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", none)
    with hold_run_folder(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).is_file()


@pytest.mark.parametrize("kind", ["file", "below a file", "folder in the way", "file in the way", "full", "read-only"])
def test_what_cannot_be_written_is_found_first(
    kind: str,
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_model: None,
) -> None:
    out, words = tmp_path / "out", "cannot be written"
    if kind in ("file", "below a file"):
        out.write_text("mine")
        words = "is a file"
    elif kind == "folder in the way":
        (out / "metrics.jsonl" / "mine").mkdir(parents=True)
        words = "metrics.jsonl is a folder"
    elif kind == "file in the way":
        out.mkdir()
        (out / "runs").write_text("mine")
        words = "runs is a file"
    else:
        number = errno.ENOSPC if kind == "full" else errno.EROFS
        name = "write" if kind == "full" else "mkdir"
        real = getattr(os, name)

        def fail(what: Any, *args: Any) -> Any:
            if name == "write" or str(what) == str(out):
                raise OSError(number, os.strerror(number))
            return real(what, *args)

        monkeypatch.setattr(run_folder.os, name, fail)
        words = os.strerror(number)
    before = sorted(tmp_path.rglob("*"))
    code, _ = train(out="out/run" if kind == "below a file" else "out")
    assert code == 2
    message = capsys.readouterr().err
    assert words in message
    assert "training.output_dir" in message
    assert "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_feature_cache_that_cannot_be_written_is_found_first(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    """As one of another user."""
    real = tempfile.TemporaryFile

    def refuse(*args: Any, dir: Any, **kwargs: Any) -> Any:
        if Path(dir).name == "features":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(*args, dir=dir, **kwargs)

    (tmp_path / "cache" / "features").mkdir(parents=True)
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert train("training.feature_cache", "disk", "method.name", "frozen-vision")[0] == 2
    message = capsys.readouterr().err
    assert "training.feature_cache: cannot be written: Permission denied" in message
    assert "PHI3V_CACHE" in message
