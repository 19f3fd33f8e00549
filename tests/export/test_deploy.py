"""`phi3v export --format`: every format is made of a run and proven; what cannot be made is refused before that."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phi3v.cli import main
from phi3v.export import deploy, divergence, formats
from phi3v.export.formats import libraries
from phi3v.model.presets import copy_pretrained


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "model"
    copy_pretrained("tiny", folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["export", *map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--format", "fp8", "--bits", "4"], "--bits: is not known to the format fp8"),
        (["--format", "hf", "--bits", "4"], "--bits: is about other formats than hf"),
        (["--questions", "5"], "--questions: is about other formats than hf"),
        (["--format", "w4a16", "fp8", "w4a16"], "names a format twice"),
        (["--format", "w4a16", "--group-size", "48"], "48 does not divide 128"),
        (["--format", "openvino", "--bits", "8", "--group-size", "64"], "a scale per output channel"),
        (["--format", "w4a16", "--group-size", "-1"], "--group-size: must be positive"),
        (["--format", "w4a16", "--samples", "0"], "at least one prompt"),
        (["--format", "w4a16", "--adapter"], "an adapter has no other format"),
        (["--format", "hf", "w4a16", "--push", "me/mine", "--yes"], "is about one folder"),
        (["--format", "gguf"], "there is no 'gguf'"),
    ],
)
def test_wrong_use(
    arguments: list[str], what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert what in refused(capsys, model, "--out", tmp_path / "out", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    for name, format_ in formats.FORMATS.items():
        said = refused(capsys, model, "--out", tmp_path / "out", "--format", "hf", name)
        assert format_.modules[0].replace("_", "-") in said
        assert f'pip install "phi3v[{format_.extra}]"' in said
    assert not list(tmp_path.iterdir())


def test_every_extra_exists() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {format_.extra for format_ in formats.FORMATS.values()} <= set(project["optional-dependencies"])


def test_too_little_room_is_said_before_anything_is_made(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy, "free_space", lambda folder: 1_000_000)
    said = refused(capsys, model, "--out", tmp_path / "out", "--format", "int8")
    assert "there is no room" in said
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_its_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere/at/all"}')
    said = refused(capsys, adapter, "--out", tmp_path / "out", "--format", "w4a16")
    assert "/nowhere/at/all" in said
    assert "--model MODEL" in said


MADE = tuple(formats.FORMATS)


def run_json(*arguments: object) -> tuple[int, dict[str, Any]]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main([*map(str, arguments), "--json"])
    told: dict[str, Any] = json.loads(out.getvalue())
    return code, told


@pytest.fixture(scope="module")
def run(model: Path, easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short LoRA run on the trained tiny base."""
    folder = tmp_path_factory.mktemp("deploy-run") / "run"
    keys: dict[str, Any] = {
        "model.path": model,
        "data.train": easy_vqa / "train.jsonl",
        "data.eval": easy_vqa / "test.jsonl",
        "method.name": "lora",
        "method.lora.rank": 4,
        "training.output_dir": folder,
        "training.max_steps": 2,
        "training.batch_size": 2,
        "evaluation.before": "false",
        "evaluation.max_questions": 8,
        "evaluation.max_new_tokens": 4,
    }
    assert main(["train", *(f"--{key}={value}" for key, value in keys.items())]) == 0
    return folder


@pytest.fixture(scope="module")
def exports(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Every format, made by one command, and what that said; among them one that is too far from the float model."""
    out = tmp_path_factory.mktemp("deployed") / "out"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setitem(formats.FORMATS, "far", replace(formats.FORMATS["nf4"], bits=6))
        patch.setitem(divergence.BOUNDS, 6, (1e-9, 1 / 5))
        tuned_formats = ["hf", "far", *MADE]
        patch.setattr("phi3v.export.formats.libraries.make", _as_nf4)
        assert main(["export", str(run), "--out", str(out), "--samples", "4", "--format", *tuned_formats]) == 2
    return out, said.getvalue()


make_of_a_library = libraries.make


def _as_nf4(model: Path, folder: Path, options: formats.FormatOptions) -> None:
    make_of_a_library(model, folder, replace(options, format="nf4") if options.format == "far" else options)


@pytest.mark.parametrize("name", MADE)
def test_every_format_is_proven(name: str, exports: tuple[Path, str]) -> None:
    folder = exports[0] / name
    proof = json.loads((folder / "proof" / "proof.json").read_text(encoding="utf-8"))["export"]
    assert set(proof["parts"]) == {"own questions", "drawn prompts"}
    for part in proof["parts"].values():
        assert 0 < part["divergence"]["mean"] < part["bound"] < part["control"]["mean"]
    assert len(proof["divergence"]["kinds"]) == 10  # nine drawn, and own questions
    assert proof["score"]["n"] == proof["float_score"]["n"] == 8
    assert proof["size"] < proof["float_size"]
    assert proof["speed"]["prompt_tokens"] == proof["float_speed"]["prompt_tokens"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| a page of 4x4 |" in card
    assert "model-index" not in card  # the scores of the run are those of other weights
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert "proof/logits.safetensors" in manifest["sha256"]
    kinds = json.loads((folder / "proof" / "prompts.json").read_text(encoding="utf-8"))
    assert divergence.OWN not in {prompt["kind"] for prompt in kinds}  # the user's own data stays where it is


def test_what_is_too_far_is_not_left_under_its_name(exports: tuple[Path, str]) -> None:
    out, said = exports
    assert "far does not answer as the float model does" in said
    assert f"made were hf, {', '.join(MADE)}" in said
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert {path.name for path in out.iterdir()} == {"hf", *MADE}


def test_a_format_is_proven_again_and_damage_is_seen(exports: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(exports[0] / "int8", folder)
    code, told = run_json("export", "--verify", folder)
    assert code == 0
    assert {finding["check"] for finding in told["findings"]} == {"manifest", "processor", "end of answers", "proof"}

    file = folder / "model.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    weights = load_file(file)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].flip(0)
    save_file(weights, file, metadata)
    (folder / "manifest.json").unlink()
    code, told = run_json("export", "--verify", folder)
    assert code == 2
    (proof,) = (finding for finding in told["findings"] if finding["check"] == "proof")
    assert "does not answer as the float model does" in proof["what"]
