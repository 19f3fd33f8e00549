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
from huggingface_hub import ModelCard
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phi3v.cli import main
from phi3v.config import DataConfig, RunConfig
from phi3v.errors import UserError
from phi3v.export import deploy, divergence, formats, push
from phi3v.export.card import Proof, write_format_card
from phi3v.export.formats import libraries
from phi3v.export.formats.files import copy_other_files
from phi3v.model.presets import copy_pretrained
from phi3v.train.finetuned import FinetunedModel, resolve_model


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
        (["--format", "w4a16", "--base-id", "no/such/name"], "is no model's name on the hub"),
        (["--format", "w4a16", "--max-shard-size", "1GB"], "is about the format hf"),
        (["--format", "w4a16", "--questions", "-1"], "--questions: cannot be negative"),
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


def test_several_formats_are_made_on_the_disk_that_they_go_to(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other-disk" / "exports").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "other-disk" / "exports")
    monkeypatch.setattr(deploy, "free_space", lambda folder: 1_000_000)
    said = refused(capsys, model, "--out", tmp_path / "link", "--format", "int8", "nf4")
    assert f"{tmp_path / 'other-disk'}: there is no room" in said


def test_the_room_for_hf_is_counted_too(model: Path) -> None:
    tuned = resolve_model(str(model))
    alone, both = (deploy._bytes_needed(tuned, formats) for formats in (["int8"], ["hf", "int8"]))
    assert both - alone == pytest.approx((model / "model.safetensors").stat().st_size, rel=0.02)


def test_vllm_is_not_started_on_another_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "proof").mkdir()
    (tmp_path / "proof" / "proof.json").write_text('{"format": "openvino"}')
    assert "is about the official layout, not about openvino" in refused(capsys, "--verify", tmp_path, "--serve-check")


def test_own_questions_that_graphs_cannot_take_are_found_before_they_are_made(model: Path) -> None:
    long = divergence.Prompt(divergence.OWN, [1] * 9000, [], [2, 3])
    deploy._check_length([long], model, {"onnx": formats.FormatOptions("onnx", max_length=9002)})
    deploy._check_length([long], model, {"openvino": formats.FormatOptions("openvino")})
    with pytest.raises(UserError, match="8,192: the run's own questions take up to 9,002 tokens"):
        deploy._check_length([long], model, {"onnx": formats.FormatOptions("onnx")})


def test_only_what_a_model_needs_is_copied(model: Path, tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    shutil.copytree(model, source)
    needed = {path.name for path in source.glob("*.json")} - {"manifest.json"} | {"modeling_phi3_v.py"}
    (source / "modeling_phi3_v.py").touch()
    for name in ("patients.json", "notes.txt", "train.py", "manifest.json", "model.safetensors.index.json"):
        (source / name).write_text("{}")
    folder.mkdir()
    copy_other_files(source, folder)
    assert {path.name for path in folder.iterdir()} == needed


def test_scores_that_cannot_be_had_are_none(model: Path, tmp_path: Path) -> None:
    turn = {"images": ["gone.png"], "user": "What is shown?", "assistant": "a dog"}
    (tmp_path / "test.jsonl").write_text(json.dumps({"id": "1", "conversations": [turn]}))
    run = RunConfig(data=DataConfig(eval=str(tmp_path / "test.jsonl")))
    said = Console(file=io.StringIO(), width=500)
    assert deploy._float_score(FinetunedModel(str(model), run=run), model, 8, said) is None
    assert isinstance(said.file, io.StringIO)
    assert "no scores, as the run's evaluation data cannot be used" in said.file.getvalue()


def test_the_card_says_how_the_weights_were_made_and_of_which_model(tmp_path: Path) -> None:
    found = divergence.Divergence(1e-3, 1e-2, 1e-1, 1.0, 12, {"text only": 1e-3})
    speed = divergence.Speed(1, 1.0, 1, 1.0)
    base = "microsoft/Phi-3.5-vision-instruct"
    proof = Proof("w4a16", 4, tmp_path / "mine", found, found, {}, speed, speed, 1, 2, is_fitted=True)
    write_format_card(tmp_path, proof, FinetunedModel(base), None)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data["base_model_relation"]) == (base, "quantized")
    assert "4-bit integers, for vLLM; fitted to data (GPTQ)" in card.text
    proof = replace(proof, format="openvino", bits=8, is_fitted=False)
    write_format_card(tmp_path, proof, FinetunedModel(base, tmp_path), None)  # an adapter was merged into it
    assert ModelCard.load(tmp_path / "README.md").data["base_model_relation"] == "finetune"
    (uploaded,) = push._contents(tmp_path, "me/mine")
    assert isinstance(uploaded.path_or_fileobj, bytes)
    text = uploaded.path_or_fileobj.decode()
    assert "8 bits, rounded to the nearest" in text
    assert 'load_runtime("mine")' in text  # which takes folders, not names on the hub


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
    questions = easy_vqa / "with-special-text.jsonl"  # read as the run reads it, also of an export
    text = (easy_vqa / "test.jsonl").read_text(encoding="utf-8")
    questions.write_text(text.replace("what is the red shape?", "what is the red shape? <|end|>"), encoding="utf-8")
    keys: dict[str, Any] = {
        "model.path": model,
        "data.train": easy_vqa / "train.jsonl",
        "data.eval": questions,
        "data.special_text": "escape",
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
        (out / "far").mkdir(parents=True)
        (out / "far" / "old.txt").touch()  # of an earlier export, which stays
        patch.setattr("phi3v.export.formats.libraries.make", _as_nf4)
        settings = ["--samples", "4", "--overwrite", "--format", *tuned_formats]
        assert main(["export", str(run), "--out", str(out), *settings]) == 2
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
    assert {path.name for path in out.iterdir()} == {"hf", "far", *MADE}
    assert [path.name for path in (out / "far").iterdir()] == ["old.txt"]


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
