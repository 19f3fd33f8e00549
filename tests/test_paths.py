"""What is taken for a path, what for a hub id, and where the files of a moved run are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phi3v.errors import UserError
from phi3v.paths import absolute, find_model, is_hub_id, now_at


@pytest.mark.parametrize("name", ["microsoft/Phi-3.5-vision-instruct", "owner/name.v1.0", "o-1/n_2"])
def test_owner_and_name_are_a_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name)
    (tmp_path / name.split("/")[0]).mkdir()
    assert not is_hub_id(name)  # a folder of that name is here, so a path is meant


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "tiny", "./a/b", "../a", "~/a/b", "~a/b", "/a/b", "a/b/", "a//b", "a/b/c", "a/../b"),
        *("a\\b", "a\\b/c", "C:/a", "a b/c", "größe/c", "-a/b", "models/tiny", "Output/mine", "runs/x", "x/final"),
        *("x/best", "x/checkpoint-20", "a/b.jsonl", "a/b.safetensors", "a/b.YAML", "a\0/b", "a/" + "b" * 300),
    ],
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(name)
    if name not in (".", ".."):
        with pytest.raises(UserError, match="no such folder"):
            find_model(name, "here")


def test_a_path_is_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    monkeypatch.chdir(tmp_path)
    assert absolute("a/") == tmp_path / "a"
    assert absolute("link/x") == tmp_path / "link" / "x"  # as it is named
    assert absolute("link/../x") == tmp_path / "far" / "x"  # not beside the link
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute("~/x") == Path("/home/me/x")


@pytest.mark.parametrize(("path", "output_dir"), [("/p/models/a", "/p/out/run"), ("models/a", "out/run")])
def test_what_moved_with_a_run_is_found(path: str, output_dir: str, tmp_path: Path) -> None:
    """Absolute paths, and those relative to where the run was started, which older versions wrote."""
    folder = tmp_path / "out" / "run"
    assert now_at(path, output_dir, folder) == path
    (tmp_path / "models" / "a").mkdir(parents=True)
    assert now_at(path, output_dir, folder) == str(tmp_path / "models" / "a")
    assert now_at("owner/name", output_dir, folder) == "owner/name"
    there = os.fspath(tmp_path)
    assert now_at(there, output_dir, folder) == there
