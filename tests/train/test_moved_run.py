"""A run is used from any folder, and after its model was moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_helpers import Train

from phi3v.cli import main
from phi3v.data.image_store import FolderStore
from phi3v.export import make, proof
from phi3v.paths import file_hash
from phi3v.report.gallery import image_store
from phi3v.report.run_files import read_run
from phi3v.train import run as training
from phi3v.train.finetuned import resolve_model


@pytest.fixture
def project(
    tmp_path: Path, small_model_dir: Path, easy_vqa: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a model, data and a run of LoRA, all named relative to it, and then left."""
    project = tmp_path / "my pröject"
    shutil.copytree(small_model_dir, project / "models" / "tiny.v1.0")
    shutil.copytree(easy_vqa, project / "data")
    monkeypatch.chdir(project)
    settings = ("method.name", "lora", "method.lora.rank", 4, "training.max_steps", 2, "checkpoint.save_steps", 1)
    places = {"model.path": "models/tiny.v1.0/", "data.train": "data/train.jsonl", "data.eval": "./data/test.jsonl"}
    named = [part for item in places.items() for part in item]
    assert train(*settings, *named, "training.output_dir", "out/run")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return project


def phi3v(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_a_run_is_used_from_another_folder(
    project: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = project / "out" / "run", project / "models" / "tiny.v1.0"
    adapter = json.loads((run / "final" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(model)
    assert image_store(read_run(run)) == FolderStore(project / "data" / "images")
    (tmp_path / "link").symlink_to(run / "final")
    tuned = resolve_model("../link/")  # a link leads into the run
    assert (tuned.base, tuned.run.method.name) == (str(model), "lora")

    def go_on(steps: int, *more: object) -> int:
        capsys.readouterr()
        return phi3v("train", run / "config.yaml", "--resume", "--training.max_steps", steps, *more)

    # The run folder's own recipe goes on with it. Older versions wrote what they were given, relative or not.
    for state in run.glob("checkpoint-*/state.json"):
        old = json.loads(state.read_text())
        old["config"]["model"]["path"], old["config"]["training"]["output_dir"] = "models/tiny.v1.0", "out/run"
        del old["data"]["model"]
        state.write_text(json.dumps(old))
        manifest = state.with_name("manifest.json")
        hashes = json.loads(manifest.read_text())
        hashes["sha256"]["state.json"] = file_hash(state)
        manifest.write_text(json.dumps(hashes))
    assert go_on(3) == 0

    # Moved together, the model is found; moved alone, it is asked for. Nothing is asked of the hub.
    moved = tmp_path / "moved"
    project.rename(moved)
    assert resolve_model(str(moved / "out" / "run")).base == str(moved / "models" / "tiny.v1.0")
    run = moved / "out" / "run"
    assert go_on(3) == 0
    assert "is finished" in capsys.readouterr().out
    assert not project.exists()
    (moved / "models").rename(moved / "bases")
    run, model = moved / "out" / "run", moved / "bases" / "tiny.v1.0"
    data = ["--data", moved / "data" / "test.jsonl", "--max-questions", 1]
    for command in (
        ["eval", run, *data],
        ["chat", run / "checkpoint-3", "--prompt", "what?"],
        ["export", run / "final", "--out", "out"],
    ):
        assert phi3v(*command) == 2
        message = capsys.readouterr().err
        assert "no model there: no such folder" in message
        assert "--model MODEL" in message
        assert "Traceback" not in message
    assert not Path("out").exists()
    monkeypatch.setattr(make, "answer_in_fresh_process", answer_here)
    assert phi3v("eval", run, "--model", model, *data) == 0
    assert phi3v("export", run, "--model", model, "--out", "out", "--adapter", "--samples", 1) == 0
    assert json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    # Going on needs the same model, wherever it is.
    here = ["--training.output_dir", run, "--model.path", model]
    assert go_on(4, *here) == 2
    moves = ["--data.train", moved / "data" / "train.jsonl", "--data.eval", moved / "data" / "test.jsonl"]
    assert go_on(4, *here, *moves) == 0
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert go_on(5, *here, *moves) == 2
    assert "is not the model that the run began with" in capsys.readouterr().err


def answer_here(folder: Path, probes: list[proof.Probe], work: Path) -> proof.Answers:
    import torch

    model, processor = proof.load_export(folder, torch.device("cpu"))
    return proof.answer_probes(model, processor, probes)


def test_a_run_of_an_older_version(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its paths are as they were given; what looks like a hub id may have been a folder."""
    run = project / "out" / "run"
    config, adapter = run / "config.yaml", run / "final" / "adapter_config.json"
    tree = yaml.safe_load(config.read_text())
    tree["training"]["output_dir"], tree["data"]["eval"] = "out/run", "data/test.jsonl"

    def write(path: str) -> None:
        tree["model"]["path"] = path
        config.write_text(yaml.safe_dump(tree))
        adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": path}))

    write("models/tiny.v1.0")
    assert resolve_model(str(run)).base == str(project / "models" / "tiny.v1.0")
    assert resolve_model(str(run)).run.data.eval == str(project / "data" / "test.jsonl")
    assert image_store(read_run(run)) == FolderStore(project / "data" / "images")
    for path in ("gone/tiny", "../gone", "models/gone"):
        write(path)
        assert main(["chat", str(run), "--prompt", "what?"]) == 2
        message = capsys.readouterr().err
        assert f"{path}, which" in message
        assert "no such folder" in message


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_a_data_file_that_is_replaced_after_its_check(
    key: str, train: Train, easy_vqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Before the first checkpoint: what was checked and parsed counts, not what is there later."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(easy_vqa / "images")
    files = {"data.train": data / "a.jsonl", "data.eval": data / "b.jsonl"}
    for name in ("train", "test"):
        shutil.copy(easy_vqa / f"{name}.jsonl", files["data.train" if name == "train" else "data.eval"])
    real = training.print_header

    def replace(*arguments: Any) -> None:
        lines = files[key].read_text().splitlines(keepends=True)
        files[key].write_text("".join(reversed(lines)))
        real(*arguments)

    monkeypatch.setattr(training, "print_header", replace)
    settings = [part for item in files.items() for part in item]
    settings += ["evaluation.before", "false", "evaluation.after", "false", "checkpoint.save_steps", 2]
    assert train(*settings, "training.max_steps", 2)[0] == 0
    monkeypatch.setattr(training, "print_header", real)
    assert train(*settings, "training.max_steps", 3, resume="auto")[0] == 2
    assert "is not the file that the run began with" in capsys.readouterr().err
