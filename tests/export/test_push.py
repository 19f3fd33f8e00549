"""Uploads through the hub's own client, to a stand-in for the hub; and everything that may go wrong with one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from stand_in_hub import StandInHub

from phi3v import Phi3VForCausalLM
from phi3v.cli import main
from phi3v.export import push

NAME = "me/mine"
REWRITTEN = {"README.md", "manifest.json"}  # they name the folder, and what it was tuned from


def pushed(hub: StandInHub, folder: Path, name: str = NAME) -> None:
    """Every byte arrived that should, and no path of this machine did."""
    there = hub.repos[name]
    assert set(there) == {path.name for path in folder.iterdir()} | {".gitattributes"}
    for path in folder.iterdir():
        if path.name not in REWRITTEN:
            assert hashlib.sha256(there[path.name]).digest() == hashlib.sha256(path.read_bytes()).digest(), path.name
    hashes = json.loads(there["manifest.json"])["sha256"]
    assert hashes == json.loads((folder / "manifest.json").read_text())["sha256"]
    for digest in hashes.items():
        assert hashlib.sha256(there[digest[0]]).hexdigest() == digest[1]
    assert "tuned_from" not in json.loads(there["manifest.json"])
    for name, content in there.items():
        assert str(folder.anchor + folder.parts[1]).encode() not in content, name


def test_a_run_is_exported_verified_and_uploaded(
    run: Path, tmp_path: Path, hub: StandInHub, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    arguments = ["export", str(run), "--out", str(tmp_path / "out"), "--samples", "1", "--max-shard-size", "300KB"]
    assert main([*arguments, "--push", NAME, "--private", "--yes", "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert told["pushed"] == f"{hub.url}/{NAME}"
    assert told["files"]["equal_texts"] == 1
    assert f"upload to {hub.url}/{NAME} (private)" in printed.err
    assert "model.safetensors.index.json" in printed.err
    assert hub.private == {NAME}
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert sum(request.startswith("PUT /upload/") for request in hub.asked) == len(shards) > 1
    assert sum("/commit/" in request for request in hub.asked) == 1
    pushed(hub, tmp_path / "out")


def test_what_was_uploaded_is_loaded_by_its_card(
    exports: dict[str, Path], tmp_path: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """In a process of its own, as its user would: ``HF_ENDPOINT`` leads the client there."""
    folder = tmp_path / "mine"
    shutil.copytree(exports["merged"], folder)
    assert main(["export", "--verify", str(folder), "--push", NAME, "--yes"]) == 0
    assert hub.private == set()
    pushed(hub, folder)
    card = ModelCard(hub.repos[NAME]["README.md"].decode())
    assert f"vllm serve {NAME} " in card.text
    snippet = card.text.split("```python\n")[1].split("```")[0]
    assert f'name = "{NAME}"' in snippet
    shutil.rmtree(folder)
    Image.new("RGB", (400, 340), (200, 40, 40)).save(tmp_path / "image.png")
    code = f"{snippet}\nmodel.save_pretrained('got')"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    theirs = Phi3VForCausalLM.from_pretrained(tmp_path / "got").state_dict()
    for key, tensor in Phi3VForCausalLM.from_pretrained(exports["merged"]).state_dict().items():
        assert torch.equal(theirs[key], tensor), key


def test_it_asks_first(
    exports: dict[str, Path], hub: StandInHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "--verify", str(exports["merged"]), "--push", NAME]
    assert main(arguments) == 2
    assert "there is no terminal to confirm it on" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda *prompt: "n")
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"in {len(list(exports['merged'].iterdir()))} files" in said
    assert f"not uploaded; later: phi3v export --verify {exports['merged']} --push {NAME}" in said
    assert hub.asked == []
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    assert main(arguments) == 0
    pushed(hub, exports["merged"])


def test_a_folder_that_is_not_sound_is_not_uploaded(
    exports: dict[str, Path], tmp_path: Path, hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exports["merged"], tmp_path / "mine")
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert main(["export", "--verify", str(tmp_path / "mine"), "--push", NAME, "--yes"]) == 2
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine", "does not say whose it is"),
        ("me/my model", "is no name on the hub"),
        ("me/mine/too", "is no name on the hub"),
        ("me/-mine", "is no name on the hub"),
    ],
)
def test_names_that_are_none(name: str, said: str, tmp_path: Path, hub: StandInHub, capsys: Any) -> None:
    assert main(["export", "nowhere", "--out", str(tmp_path / "out"), "--push", name, "--yes"]) == 2
    assert f"--push {name}: {said}" in capsys.readouterr().err
    assert hub.asked == []


def test_what_is_missing_is_said_before_the_export(
    run: Path, tmp_path: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(run), "--out", str(tmp_path / "out"), "--push", NAME, "--yes"]
    assert main([*arguments, "--adapter"]) == 2
    assert "which is on this machine only" in (said := capsys.readouterr().err)
    assert "--base-id OWNER/NAME" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(arguments) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    assert main(arguments) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--private"]) == 2
    assert "--private" in capsys.readouterr().err
    assert hub.asked == []
    assert not list(tmp_path.iterdir())


def test_an_adapter(
    run: Path,
    exports: dict[str, Path],
    small_model_dir: Path,
    tmp_path: Path,
    hub: StandInHub,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", "--verify", str(exports["adapter"]), "--push", NAME, "--yes"]) == 2
    assert "which is on this machine only" in capsys.readouterr().err
    assert main(["export", "--verify", str(exports["adapter"]), "--base-id", "me/base"]) == 2
    assert "export it again with it" in capsys.readouterr().err
    assert hub.asked == []
    base = "microsoft/Phi-3.5-vision-instruct"
    arguments = ["export", str(run), "--out", str(tmp_path / "out"), "--adapter", "--samples", "1"]
    assert main([*arguments, "--base-id", base, "--push", NAME, "--yes"]) == 0
    pushed(hub, tmp_path / "out")
    assert json.loads(hub.repos[NAME]["adapter_config.json"])["base_model_name_or_path"] == base
    assert ModelCard(hub.repos[NAME]["README.md"].decode()).data.base_model == base


def test_a_repository_with_something_else_in_it(
    exports: dict[str, Path], hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos[NAME] = {".gitattributes": b"", "model.safetensors": b"another model", "notes.txt": b"mine"}
    arguments = ["export", "--verify", str(exports["merged"]), "--push", NAME, "--yes"]
    assert main(arguments) == 2
    assert "holds 2 files that are not of this export, first model.safetensors" in capsys.readouterr().err
    assert len(hub.repos[NAME]) == 3
    # One that was made but not filled, and one that is complete: an upload that was cut off somewhere.
    hub.repos[NAME] = {".gitattributes": b""}
    assert main([*arguments, "--private"]) == 2
    assert "is there already, and public" in capsys.readouterr().err
    assert set(hub.repos[NAME]) == {".gitattributes"}
    assert main(arguments) == 0
    assert main(arguments) == 0
    pushed(hub, exports["merged"])


@pytest.mark.parametrize(
    ("at", "status", "said"),
    [
        ("POST /api/repos/create", 401, "the hub does not know the token"),
        ("POST /api/repos/create", 403, "the token may not write there"),
        ("POST /api/models/me/mine/commit", 403, "the token may not write there"),
        ("POST /me/mine.git/info/lfs", 413, "the hub says 413"),
        ("PUT /upload", 403, "the token may not write there"),
        ("POST /api/models/me/mine/commit", 0, "the hub cannot be reached, or the connection broke"),
        ("POST /api/validate-yaml", 400, "the hub says 400"),
    ],
)
def test_a_failure_at_the_hub_costs_nothing(
    at: str, status: int, said: str, exports: dict[str, Path], hub: StandInHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.failures[at] = status
    arguments = ["export", "--verify", str(exports["merged"]), "--push", NAME, "--yes", "--private"]
    before = {path.name: path.read_bytes() for path in exports["merged"].iterdir()}
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert f"{hub.url}/{NAME}: not uploaded: {said}" in printed
    assert f"phi3v export --verify {exports['merged']} --push {NAME} --private" in printed
    assert "Traceback" not in printed
    assert {path.name: path.read_bytes() for path in exports["merged"].iterdir()} == before
    hub.failures.clear()
    assert main(arguments) == 0
    pushed(hub, exports["merged"])
    assert hub.private == {NAME}


def test_no_network(exports: dict[str, Path], hub: StandInHub, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's tries
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["export", "--verify", str(exports["merged"]), "--push", NAME, "--yes"]) == 2
    assert "the hub cannot be reached" in capsys.readouterr().err


def test_sizes() -> None:
    assert [push._human(size) for size in (0, 12_345, 12_345_678, 8_294_000_000)] == [
        "0.0 kB",
        "12.3 kB",
        "12.35 MB",
        "8.29 GB",
    ]
