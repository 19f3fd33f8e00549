"""Every recipe: what it says, and that the real command line runs it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from phi3v.cli import main
from phi3v.config import RunConfig, load_config
from phi3v.grammar import RECIPES

TASKS = ("docvqa", "hateful_memes", "nlvr2", "ucf101")
METHODS = ("full", "frozen_vision", "lora", "qlora")
NAMES = [f"{task}_{method}" for task, method in itertools.product(TASKS, METHODS)]
CONVERTED = {"docvqa": "docvqa", "hateful_memes": "hateful-memes", "nlvr2": "nlvr2", "ucf101": "ucf101"}
SCORES = {
    "docvqa": ["anls"],
    "hateful_memes": ["accuracy", "auroc"],
    "nlvr2": ["accuracy", "consistency"],
    "ucf101": ["accuracy", "per_class_accuracy"],
}
# As published by Microsoft: learning rate, epochs, rank, alpha.
PUBLISHED = {
    "docvqa_full": (5e-6, 2, None, None),
    "docvqa_frozen_vision": (1e-4, 2, None, None),
    "docvqa_lora": (2e-4, 2, 32, 16),
    "docvqa_qlora": (2e-4, 2, 32, 16),
    "hateful_memes_full": (5e-5, 2, None, None),
    "hateful_memes_frozen_vision": (1e-4, 3, None, None),
    "hateful_memes_lora": (2e-4, 2, 128, 256),
    "hateful_memes_qlora": (2e-4, 2, 128, 256),
    "nlvr2_full": (1e-5, 3, None, None),
    "nlvr2_frozen_vision": (2e-5, 2, None, None),
}


def task_of(name: str) -> str:
    return next(task for task in TASKS if name.startswith(task))


def read(name: str) -> RunConfig:
    return load_config(RECIPES[name])


def test_every_task_has_every_method() -> None:
    assert set(RECIPES) == {*NAMES, "easy_vqa_tiny", "easy_vqa_dpo"}
    for name in NAMES:
        assert read(name).method.name.replace("-", "_") == name.removeprefix(f"{task_of(name)}_")


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_with_its_line_and_its_commands_and_says_the_trade_off(name: str) -> None:
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    comments = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert comments[1:3] == ["#", f"# phi3v train {name}"]
    assert comments[3].startswith("# torchrun ")
    assert comments[3].endswith(f" -m phi3v train {name}")
    task = task_of(name)
    assert f"# The data: phi3v data convert {CONVERTED[task]} --out data/{task}" in comments
    text = " ".join(line.removeprefix("#").strip() for line in comments)
    assert ("as published by Microsoft" in text) == (name in PUBLISHED)
    assert ("our own and have not been evaluated" in text) == (name not in PUBLISHED)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", PUBLISHED)
def test_hyperparameters_are_the_published_ones(name: str) -> None:
    config = read(name)
    training, lora = config.training, config.method.lora
    learning_rate, epochs, rank, alpha = PUBLISHED[name]
    assert (training.learning_rate, training.epochs, training.batch_size) == (learning_rate, epochs, 64)
    if rank is not None:
        assert (lora.rank, lora.alpha) == (rank, alpha)


@pytest.mark.parametrize("name", NAMES)
def test_records_that_have_the_same_pictures_share_them(name: str) -> None:
    packing = "shared-image" if task_of(name) in ("docvqa", "nlvr2") else "none"
    assert read(name).data.packing == packing


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, workplace: Path, small_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder where its data was converted, with nothing overridden but what makes it small."""
    monkeypatch.chdir(workplace)
    small = {
        "model.path": small_model_dir,
        "model.num_crops": 1,
        "training.max_steps": 1,
        "training.batch_size": 2,
        "evaluation.max_new_tokens": 2,  # in place of 64
    }
    overrides = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    assert main(["train", name, *overrides]) == 0
    folder = workplace / "output" / name
    is_adapter = name.endswith("lora")
    assert (folder / "final" / ("adapter_model.safetensors" if is_adapter else "model.safetensors")).is_file()
    for when in ("before", "after"):
        measured = json.loads((folder / f"eval_{when}.json").read_text(encoding="utf-8"))
        assert list(measured["scores"]) == SCORES[task_of(name)]
        assert measured["metric"] == SCORES[task_of(name)][0]
        assert 0 <= measured["score"] <= 1
        assert measured["num_questions"] == len(measured["generated_texts"]) == 2


def test_preferences_run(
    easy_vqa: Path, small_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe for pairs, from the folder where the quickstart and its example leave their files."""
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    pairs, data = Path("quickstart/preferences/pairs"), Path("quickstart/data")
    for folder in (pairs, data):
        folder.mkdir(parents=True)
        (folder / "images").symlink_to(easy_vqa / "images")
    lines = [json.loads(line) for line in (easy_vqa / "test.jsonl").read_text().splitlines()[:6]]
    (data / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[4:]))
    for line in lines:
        line["conversations"][0]["rejected"] = "neither"
    (pairs / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    small = {"model.path": small_model_dir, "training.max_steps": 1, "evaluation.max_new_tokens": 2}
    overrides = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    assert main(["train", "easy_vqa_dpo", *overrides]) == 0
    (line,) = (tmp_path / "quickstart/preferences/run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["rewards/margins"] == pytest.approx(0, abs=1e-5)
