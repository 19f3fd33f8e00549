"""The public recipe's flags: their defaults, what they set, and what is wrong with them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import RunConfig, known_keys, load_config
from phi3v.grammar import RECIPES
from phi3v.recipes import public_recipe
from phi3v.recipes.public_recipe import EVAL_SPLITS, KEYS, TASKS, build_parser, find_data, fine_tune, to_config

ROOT = Path(__file__).parents[2]
NAMES = tuple(TASKS)
DEFAULTS = {
    "--model_name_or_path": "microsoft/Phi-3.5-vision-instruct",
    "--use_flash_attention": False,
    "--bf16": False,
    "--use_lora": False,
    "--use_qlora": False,
    "--freeze_vision_model": False,
    "--lora_rank": 64,
    "--lora_alpha_ratio": 2,
    "--lora_dropout": 0.0,
    "--output_dir": "./output/",
    "--batch_size": 16,
    "--num_crops": 16,
    "--num_train_epochs": 1,
    "--learning_rate": 4e-5,
    "--wd": 0.01,
    "--no-tqdm": True,  # the bar is shown
}
OURS = {"--data_dir": None, "--batch_size_per_gpu": 1, "--overwrite": False}


def config_of(*argv: str, task: str = "docvqa", has_gpu: bool = False) -> RunConfig:
    return to_config(TASKS[task], build_parser(TASKS[task]).parse_args(argv), has_gpu=has_gpu)


def value_at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def flags_of(parser: argparse.ArgumentParser) -> dict[str, Any]:
    return {
        action.option_strings[-1]: action.default
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_has_the_recipes_default(name: str) -> None:
    expected = DEFAULTS | OURS | ({"--full_train": False} if name == "docvqa" else {})
    assert flags_of(build_parser(TASKS[name])) == expected


def test_the_defaults_of_the_flags_train_as_the_recipe_does() -> None:
    config = config_of(has_gpu=True)
    assert (config.training.precision, config.model.attention, config.method.name) == ("fp16", "sdpa", "full")
    training = config.training
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.95, 1e-7)
    assert (training.schedule, training.warmup_steps, training.max_grad_norm) == ("linear", 50, 1.0)
    assert (training.micro_batch_size, training.activation_checkpointing) == (1, "auto")
    assert (config.evaluation.before, config.evaluation.after, config.evaluation.max_new_tokens) == (True, True, 64)


BOTH = ["decoder", "head", "vision", "projector"]
TRANSLATIONS: list[tuple[str, dict[str, Any]]] = [
    ("", {"training.precision": "fp32", "training.batch_size": 16, "training.progress_bar": True}),
    ("--model_name_or_path some/model.v2", {"model.path": "some/model.v2"}),
    ("--bf16", {"training.precision": "bf16"}),
    ("--use_flash_attention", {"model.attention": "auto"}),
    ("--use_lora", {"method.name": "lora", "method.lora.parts": BOTH, "method.lora.alpha": 128}),
    ("--use_qlora", {"method.name": "qlora", "method.lora.parts": BOTH}),
    ("--use_lora --use_qlora", {"method.name": "qlora"}),
    ("--freeze_vision_model", {"method.name": "frozen-vision"}),
    ("--use_lora --freeze_vision_model", {"method.name": "lora", "method.lora.parts": ["decoder", "head"]}),
    ("--use_qlora --freeze_vision_model", {"method.name": "qlora", "method.lora.parts": ["decoder", "head"]}),
    ("--use_lora --lora_rank 32 --lora_alpha_ratio 0.5", {"method.lora.rank": 32, "method.lora.alpha": 16}),
    ("--use_lora --lora_dropout 0.1", {"method.lora.dropout": 0.1}),
    ("--output_dir some/where", {"training.output_dir": "some/where"}),
    ("--overwrite", {"training.overwrite": True}),
    ("--batch_size 64 --batch_size_per_gpu 2", {"training.batch_size": 64, "training.micro_batch_size": 2}),
    ("--num_crops 4", {"model.num_crops": 4}),
    ("--num_train_epochs 3", {"training.epochs": 3}),
    ("--learning_rate 5e-6", {"training.learning_rate": 5e-6}),
    ("--wd 0", {"training.weight_decay": 0}),
    ("--no-tqdm", {"training.progress_bar": False}),
]


@pytest.mark.parametrize(("flags", "expected"), TRANSLATIONS, ids=lambda value: value if isinstance(value, str) else "")
def test_flags_set_keys(flags: str, expected: dict[str, Any]) -> None:
    config = config_of(*flags.split())
    assert {key: value_at(config, key) for key in expected} == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_scored_as_its_recipes_say(name: str) -> None:
    config = config_of(task=name)
    for path in (path for recipe, path in RECIPES.items() if recipe.startswith(name)):
        recipe = load_config(path)
        assert recipe.evaluation.metrics == config.evaluation.metrics
        assert recipe.evaluation.answer_words == config.evaluation.answer_words


def test_the_documentation_lists_every_flag_with_its_default_and_key() -> None:
    page = (ROOT / "docs" / "from_the_recipe.md").read_text(encoding="utf-8")
    rows = {
        match[1]: (match[2], match[3])
        for match in re.finditer(r"^\| `(--[\w-]+)`[^|]*\| ([^|]*) \| (.*) \|$", page, re.M)
    }
    assert set(rows) == set(DEFAULTS) | set(OURS) | {"--full_train"}
    for flag, default in (DEFAULTS | OURS | {"--full_train": False}).items():
        shown, keys = rows[flag]
        if isinstance(default, bool) or default is None:
            assert shown in ("off", "none")
        else:
            assert type(default)(shown) == default
        named = set(re.findall(r"`([a-z]+\.[a-z_.]+)`", keys))
        assert named <= set(known_keys())
        assert flag not in KEYS or named == {KEYS[flag]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_crops 17", "--num_crops: must be at most 16"),
        ("--num_crops 0", "--num_crops: must be at least 1"),
        ("--batch_size none", "argument --batch_size: invalid int value"),
        ("--batch_size 0", "--batch_size: must be at least 1"),
        ("--learning_rate -1", "--learning_rate: must be above 0"),
        ("--lora_rank 0", "--lora_rank: must be at least 1"),
        ("--lr 1", "unrecognized arguments: --lr"),
        ("--full_train", "unrecognized arguments: --full_train"),
        ("--batch_size 3", "--batch_size: 3 samples per step cannot be split over 2 devices"),
        ("--batch_size 3", "use a multiple of 2, or change --batch_size_per_gpu"),
        ("--data_dir nowhere", "phi3v data convert nlvr2 --out nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_flags(
    flags: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fine_tune("nlvr2", flags.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    assert "training." not in error


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        fine_tune("docvqa", ["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("default: 4e-05", "--full_train", "example: torchrun"):
        assert words in shown


@pytest.mark.parametrize("split", EVAL_SPLITS)
@pytest.mark.parametrize("name", ["docvqa", "ucf101"])
def test_converted_data_is_found_by_any_name_of_its_splits(name: str, split: str, tmp_path: Path) -> None:
    train, other = (tmp_path / f"{TASKS[name].prefix}{part}.jsonl" for part in ("train", split))
    other.touch()
    assert find_data(TASKS[name], tmp_path) is None
    train.touch()
    assert find_data(TASKS[name], tmp_path) == (train, other)


def run(name: str, model: Path, *flags: str) -> int:
    return fine_tune(name, ["--model_name_or_path", str(model), "--num_crops", "1", *flags])


@pytest.fixture
def small_source(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's small split of DocVQA, lying here in place of the hub."""
    local = dataclasses.replace(TASKS["docvqa"], small_source=str(sources / "docvqa_small"))
    monkeypatch.setitem(public_recipe.TASKS, "docvqa", local)


@pytest.mark.usefixtures("small_source")
def test_without_a_data_folder_the_data_is_converted_once_and_a_run_is_not_overwritten_unasked(
    tmp_path: Path, small_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("docvqa", small_model_dir) == 0
    first = capsys.readouterr().out
    assert "converting docvqa into data/docvqa_small" in first
    assert "fp16, which needs a GPU" in first
    measured = json.loads((tmp_path / "output" / "eval_after.json").read_text(encoding="utf-8"))
    assert measured["metric"] == "anls"
    assert measured["answers"] == [["12.50", "12.50 EUR"]] * 2
    # The hint is in flags, and what it says works.
    assert run("docvqa", small_model_dir) == 2
    assert "another --output_dir, or add --overwrite to replace it" in capsys.readouterr().err
    assert run("docvqa", small_model_dir, "--overwrite") == 0
    assert "converting" not in capsys.readouterr().out


@pytest.mark.usefixtures("small_source")
def test_a_wrong_model_is_found_before_anything_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert run("docvqa", tmp_path / "empty") == 2
    assert "--model_name_or_path" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("flags", [[], ["--full_train"]])
def test_without_a_hub_it_says_what_to_do(
    flags: list[str],
    tmp_path: Path,
    small_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("docvqa", small_model_dir, *flags) == 2
    error = capsys.readouterr().err
    assert ("HuggingFaceM4/the_cauldron" if flags else "nielsr/docvqa_1200_examples") in error
    assert "Traceback" not in error


def test_other_processes_of_a_machine_wait_for_the_files(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    (tmp_path / "data").mkdir()
    convert = threading.Timer(0.2, lambda: (tmp_path / "data" / "nlvr2").symlink_to(workplace / "data" / "nlvr2"))
    convert.start()
    console = argparse.Namespace()  # nothing is said
    files = public_recipe._converted_data(TASKS["nlvr2"], console, small=False, bars=False)  # type: ignore[arg-type]
    assert [file.name for file in files] == ["train.jsonl", "val.jsonl"]
