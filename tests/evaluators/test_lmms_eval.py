"""What lmms-eval finds in an installed package; that it works with it is tested in tests/ecosystem/lmms_eval."""

from __future__ import annotations

import runpy
import tomllib
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from phi3v.data.sources import SOURCES
from phi3v.errors import UserError
from phi3v.evaluate.metrics import METRICS, Answers, score_answers
from phi3v.evaluators import TASKS
from phi3v.evaluators.lmms_model import _count
from phi3v.evaluators.lmms_tasks import aggregate, process_results

ROOT = Path(__file__).parents[2]
NAMES = ["docvqa", "hateful_memes", "nlvr2", "ucf101"]


class Loader(yaml.SafeLoader):
    """Resolves ``!function module.name`` as lmms-eval does."""


def function(loader: yaml.SafeLoader, node: Any) -> Any:
    module, _, name = loader.construct_scalar(node).rpartition(".")
    return getattr(import_module(module), name)


Loader.add_constructor("!function", function)


def read_task(name: str) -> dict[str, Any]:
    task: dict[str, Any] = yaml.load((TASKS / f"phi3v_{name}.yaml").read_text(encoding="utf-8"), Loader)
    return task


def test_the_entry_point_is_declared_and_leads_to_a_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = project["project"]["entry-points"]["lmms_eval.models"]
    assert callable(EntryPoint("phi3v", declared["phi3v"], "lmms_eval.models").load())


def test_the_tasks_are_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["phi3v"]
    package = ROOT / "src" / "phi3v"
    shipped = {file for pattern in patterns for file in package.glob(pattern)}
    assert {TASKS / f"phi3v_{name}.yaml" for name in NAMES} == set(TASKS.iterdir()) <= shipped


def test_the_module_prints_the_folder_of_the_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("phi3v.evaluators", run_name="__main__")
    assert capsys.readouterr().out == f"{TASKS}\n"


@pytest.mark.parametrize("value", [0, 2.5, True, "auto"])
def test_an_option_that_is_no_count_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=f"num_crops: must be a whole number from 1, not {value}"):
        _count("num_crops", value)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_asks_what_its_recipe_asks(name: str) -> None:
    task = read_task(name)
    recipe = yaml.safe_load((ROOT / "src" / "phi3v" / "recipes" / f"{name}_lora.yaml").read_text(encoding="utf-8"))
    evaluation = recipe["evaluation"]
    assert task["task"] == f"phi3v_{name}"
    assert task["class"].__name__ == "RecordsTask"
    assert f"data/{task['dataset_path']}" == recipe["data"]["eval"]
    metrics = [entry["metric"] for entry in task["metric_list"]]
    assert metrics == evaluation["metrics"]
    assert set(metrics) <= set(METRICS)
    generation = task["generation_kwargs"]
    assert generation.get("answer_words") == evaluation.get("answer_words")
    assert generation["max_new_tokens"] == evaluation.get("max_new_tokens", 128)
    assert name.replace("_", "-") in SOURCES


@pytest.mark.parametrize("name", METRICS)
def test_a_score_is_that_of_our_own_metric(name: str) -> None:
    references = [["Yes"], ["No"], ["Yes", "yes sir"], ["No"]]
    predictions = ["Yes", "Yes", "yes sir.", "n"]
    words = ["Yes", "No"] if METRICS[name].needs_probabilities else []
    items = []
    for number, (given, expected) in enumerate(zip(predictions, references, strict=True)):
        doc = {"id": str(number), "question": f"q{number // 2}", "references": expected, "answer_words": words}
        items.append(process_results([name], doc, [given])[name])
    probabilities = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]) if words else None
    answers = Answers(["q0", "q0", "q1", "q1"], references, predictions, words, probabilities)
    assert aggregate(name, items) == score_answers(name, answers).value
    # What lmms-eval takes a standard error of is there only where the score is the mean of the questions' own.
    if "score" in items[0]:
        assert sum(item["score"] for item in items) / len(items) == pytest.approx(aggregate(name, items))
    assert ("score" in items[0]) == (name not in ("auroc", "consistency", "per_class_accuracy"))
