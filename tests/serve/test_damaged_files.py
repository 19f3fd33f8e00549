"""Every file of a model or run folder is the user's input: damaged, it is named in one message, and nothing crashes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3v.cli import main
from phi3v.config import ModelConfig, RunConfig
from phi3v.errors import UserError
from phi3v.model.presets import planned_config
from phi3v.report.run_files import read_run
from phi3v.train.checkpoint_folder import damage
from phi3v.train.device import choose_device
from phi3v.train.finetuned import inspect_tuned, load_tuned, resolve_model
from phi3v.train.methods.loading import inspect_model, load_processor, load_weights
from phi3v.train.run_folder import describe_again

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "{}": lambda content: b"{}",
    "other bytes": lambda content: b"\xff\xfe\x00\x81",
    "a list": lambda content: b"[1]",
    "null": lambda content: b"null",
    "text": lambda content: b'"x"',
    "a number": lambda content: b"7",
}
FEW = ("cut", "{}", "a list")  # where each try takes a second
WRONG: tuple[Any, ...] = ("x", -1, [], {}, None, [{"a": 1}], 1e400)


def damaged(file: Path, content: bytes) -> None:
    """Give a file other content without touching what it is a link of."""
    file.unlink()
    file.write_bytes(content)


def linked(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, copy_function=os.link)
    return target


def open_model(folder: Path) -> None:
    """All that any command reads of a model."""
    config = RunConfig(model=ModelConfig(str(folder)))
    inspect_model(config, choose_device("fp32"))
    load_processor(config)
    load_weights(str(folder))


def open_run(folder: Path) -> None:
    inspect_tuned(resolve_model(str(folder)), choose_device("fp32"))


def assert_named(use: Callable[[Path], object], folder: Path, file: Path, *, harmless: tuple[str, ...] = ()) -> None:
    whole = file.read_bytes()
    for name, change in DAMAGES.items():
        if name in harmless:
            continue
        damaged(file, change(whole))
        with pytest.raises(UserError) as caught:
            use(folder)
        assert str(file) in str(caught.value), name
        assert caught.value.hint, name
    damaged(file, whole)
    use(folder)


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        ("config.json", ()),
        ("preprocessor_config.json", ()),
        ("tokenizer.json", ()),
        ("tokenizer_config.json", ()),
        ("special_tokens_map.json", ("{}",)),  # a copy of what tokenizer_config.json says, which nothing here reads
        ("generation_config.json", ("{}",)),  # no setting of its own
    ],
)
def test_a_damaged_file_of_a_model_is_named(
    small_model_dir: Path, tmp_path: Path, name: str, harmless: tuple[str, ...]
) -> None:
    folder = linked(small_model_dir, tmp_path / "model")
    assert_named(open_model, folder, folder / name, harmless=harmless)
    if name == "config.json":
        assert_named(lambda folder: planned_config(str(folder)), folder, folder / name)


def test_a_damaged_index_of_weights_is_named(small_model_dir: Path, tmp_path: Path) -> None:
    folder = linked(small_model_dir, tmp_path / "model")
    file = folder / "model.safetensors.index.json"
    keys = ["lm_head.weight"]
    file.write_text(json.dumps({"weight_map": dict.fromkeys(keys, "model.safetensors")}), encoding="utf-8")
    for content in [change(file.read_bytes()) for change in DAMAGES.values()]:
        damaged(file, content)
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
            open_model(folder)
    for wrong in WRONG:
        for tree in ({"weight_map": wrong}, {"weight_map": {"lm_head.weight": wrong}}):
            damaged(file, json.dumps(tree).encode())
            with pytest.raises(UserError):
                open_model(folder)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer_config.json"])
def test_a_wrong_value_is_read_or_refused(small_model_dir: Path, tmp_path: Path, name: str) -> None:
    folder = linked(small_model_dir, tmp_path / "model")
    refused = 0
    fields = json.loads((folder / name).read_text(encoding="utf-8"))
    for key in fields:
        for wrong in WRONG:
            damaged(folder / name, json.dumps(fields | {key: wrong}).encode())
            with contextlib.suppress(UserError):
                load_processor(RunConfig(model=ModelConfig(str(folder))))
                continue
            refused += 1
    assert refused


def test_a_wrong_value_of_the_model_is_read_or_refused(small_model_dir: Path, tmp_path: Path) -> None:
    folder = linked(small_model_dir, tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config, runtime = RunConfig(model=ModelConfig(str(folder))), choose_device("fp32")
    refused = set()
    for number, key in enumerate(fields):
        for wrong in (WRONG[number % len(WRONG)], WRONG[(number + 3) % len(WRONG)]):
            damaged(folder / "config.json", json.dumps(fields | {key: wrong}).encode())
            try:
                inspect_model(config, runtime)
            except UserError:
                refused.add(key)
    assert {"hidden_size", "num_hidden_layers", "model_type"} <= refused


@pytest.mark.parametrize("name", ["config.yaml", "final/adapter_config.json"])
def test_a_damaged_file_of_a_run_is_named(tuned_run: Path, tmp_path: Path, name: str) -> None:
    folder = linked(tuned_run, tmp_path / "run")
    file = folder / name
    whole = file.read_bytes()
    for kind in FEW:
        damaged(file, DAMAGES[kind](whole))
        with pytest.raises(UserError) as caught:
            open_run(folder)
        assert str(file) in str(caught.value), kind


@pytest.mark.parametrize("key", ["peft_type", "base_model_name_or_path", "r"])
def test_a_wrong_value_of_an_adapter_is_named(tuned_run: Path, tmp_path: Path, key: str) -> None:
    folder = linked(tuned_run, tmp_path / "run")
    file = folder / "final" / "adapter_config.json"
    fields = json.loads(file.read_bytes())
    for wrong in ([], {"a": 1}, -1):
        damaged(file, json.dumps(fields | {key: wrong}).encode())
        try:
            load_tuned(resolve_model(str(folder)), choose_device("fp32"))
        except UserError as error:
            said = str(error)
        else:
            said = ""
        assert str(file.parent) in said, wrong


def test_a_damaged_environment_does_not_crash_a_resumed_run(tuned_run: Path, tmp_path: Path) -> None:
    folder = linked(tuned_run, tmp_path / "run")
    config = resolve_model(str(folder)).run
    config.training.output_dir = str(folder)
    assert_named(lambda _: describe_again(config), folder, folder / "environment.json", harmless=("{}",))


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "eval_before.json", "eval_after.json"])
def test_the_report_leaves_out_what_is_damaged_and_says_so(tuned_run: Path, tmp_path: Path, name: str) -> None:
    folder = linked(tuned_run, tmp_path / "run")
    whole = (folder / name).read_bytes()
    for change in DAMAGES.values():
        damaged(folder / name, change(whole))
        assert any(note.startswith(name) for note in read_run(folder).missing)


def test_the_report_says_that_a_log_of_metrics_is_empty(tuned_run: Path, tmp_path: Path) -> None:
    folder = linked(tuned_run, tmp_path / "run")
    damaged(folder / "metrics.jsonl", b"")
    assert "metrics.jsonl is empty" in read_run(folder).missing


@pytest.mark.parametrize("kind", FEW)
def test_an_export_names_a_damaged_score_before_it_begins(
    tuned_run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = linked(tuned_run, tmp_path / "run")
    damaged(folder / "eval_after.json", DAMAGES[kind]((folder / "eval_after.json").read_bytes()))
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "eval_after.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["manifest.json", "adapter_config.json", "tokenizer_config.json"])
def test_verifying_names_what_is_damaged(
    tuned_run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = linked(tuned_run / "final", tmp_path / "model")
    whole = (folder / name).read_bytes()
    for kind in FEW:
        damaged(folder / name, DAMAGES[kind](whole))
        assert main(["export", "--verify", str(folder)]) == 2
        assert name in capsys.readouterr().out


def test_a_manifest_that_proves_nothing_is_damage(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"format": 1}', encoding="utf-8")
    for manifest in ("{}", "[]", "", '{"sha256": {}}', '{"sha256": []}', '{"sha256": {"state.json": 5}}'):
        (tmp_path / "manifest.json").write_text(manifest, encoding="utf-8")
        assert damage(tmp_path) is not None
