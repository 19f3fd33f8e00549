"""The script behind the table of methods and tasks."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import command, run_ranks

import task_table
from phi3v.config import load_config
from phi3v.grammar import RECIPES
from phi3v.model.presets import PRETRAINED_TINY
from tasks import METHODS, TASKS
from tasks.parts import Sizes


@pytest.mark.parametrize("packing", task_table.PACKINGS)
@pytest.mark.parametrize(("name", "method"), list(itertools.product(TASKS, METHODS)))
def test_overrides_fit_the_recipes(name: str, method: str, packing: str) -> None:
    settings = task_table.overrides(method, packing, TASKS[name], None)
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value).lower())]
    config = load_config(RECIPES[f"{name}_{method}"], options)
    assert config.method.name == method.replace("_", "-")
    assert config.data.packing == packing
    assert config.training.max_steps == TASKS[name].steps
    assert config.training.learning_rate == task_table.LEARNING_RATES[method]


def test_a_row_is_measured_once(
    small_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = dataclasses.replace(TASKS["hateful_memes"], sizes=Sizes(16, 4, 8))
    monkeypatch.setitem(TASKS, "hateful_memes", small)
    work, out = tmp_path / "work", tmp_path / "tasks.json"
    options = ["--tasks", "hateful_memes", "--methods", "lora", "--steps", "2", "--model", str(small_model_dir)]
    options += ["--work", str(work), "--out", str(out)]

    def phi3v(*arguments: object, threads: int | None = None) -> dict[str, Any]:
        said = run_ranks(1, command, *arguments, "--json", folder=tmp_path / "ranks")
        answer: dict[str, Any] = json.loads(said)
        return answer

    monkeypatch.setattr(task_table, "phi3v", phi3v)  # without the seconds that a new interpreter takes to import
    task_table.main(options)
    result = json.loads(out.read_text(encoding="utf-8"))
    row, packed = result["rows"]
    assert [row["packing"], packed["packing"]] == ["none", "shared-image"]
    assert row["before"] == packed["before"]
    assert (row["task"], row["method"], row["metric"], row["n"], row["chance"]) == (
        "hateful_memes", "lora", "accuracy", 8, 0.5
    )  # fmt: skip
    assert row["settings"]["training.max_steps"] == 2
    for name in ("accuracy", "auroc"):
        value, low, high = row["after"][name]
        assert 0 <= low <= value <= high <= 1
    assert row["train_seconds"] > 0
    assert row["peak_memory_gb"] > 0
    assert result["device"]
    assert result["versions"]["torch"]

    capsys.readouterr()
    monkeypatch.setattr(task_table, "phi3v", lambda *arguments: pytest.fail(f"ran {arguments}"))
    task_table.main([*options, "--markdown"])
    main, auroc = capsys.readouterr().out.splitlines()[-2:]
    cells = [cell.strip() for cell in main.strip("|").split("|")]
    assert cells[:3] == ["hateful_memes (accuracy, 8, 50.0)", "lora", f"{100 * row['before']['accuracy'][0]:.1f}"]
    for cell, measured in zip(cells[3:5], (row, packed), strict=True):
        value, low, high = (100 * number for number in measured["after"]["accuracy"])
        assert cell == f"**{value:.1f}** ({low:.1f} to {high:.1f})"
    assert cells[5] == "2"
    assert "(auroc)" in auroc
    assert json.loads(out.read_text(encoding="utf-8")) == result


def test_the_base_is_measured_before_others_ask_for_it() -> None:
    keys = list(itertools.product(("docvqa", "nlvr2"), METHODS, ("none",)))
    first, then = task_table.in_waves(keys)
    assert first == [(task, method, "none") for task in ("docvqa", "nlvr2") for method in ("full", "qlora")]
    assert sorted(first + then) == sorted(keys)


def test_the_table_goes_between_its_marks(tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    document.write_text(f"above\n{task_table.BEGIN}\nold\n{task_table.END}\nbelow\n", encoding="utf-8")
    task_table.write_between_marks(document, (task_table.BEGIN, task_table.END), "new")
    assert document.read_text(encoding="utf-8") == f"above\n{task_table.BEGIN}\nnew\n{task_table.END}\nbelow\n"
    document.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks the marks"):
        task_table.write_between_marks(document, (task_table.BEGIN, task_table.END), "new")
    results = (task_table.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert results.index(task_table.BEGIN) < results.index(task_table.END)


COMMITTED: dict[str, Any] = json.loads(
    (task_table.ROOT / "benchmarks" / "results" / "tasks.json").read_text(encoding="utf-8")
)


def test_the_committed_table_is_of_the_base_that_is_shipped() -> None:
    weights = (PRETRAINED_TINY / "model.safetensors").read_bytes()
    assert COMMITTED["base"] == hashlib.sha256(weights).hexdigest()[:16]
    document = (task_table.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"{task_table.BEGIN}\n{task_table.markdown(COMMITTED)}\n{task_table.END}" in document


@pytest.mark.parametrize("row", COMMITTED["rows"], ids=lambda row: f"{row['task']}-{row['method']}-{row['packing']}")
def test_the_method_has_learned_the_task(row: dict[str, Any]) -> None:
    """By its score's interval: above what is right without looking, and above what the base could already."""
    _, low, _ = row["after"][row["metric"]]
    assert low > row["chance"]
    assert low > row["before"][row["metric"]][0]
    assert row["settings"] == task_table.overrides(row["method"], row["packing"], TASKS[row["task"]], None)
    assert row["data"] == task_table.made_from(TASKS[row["task"]])


def test_every_method_was_measured_on_every_task() -> None:
    measured = [(row["task"], row["method"], row["packing"]) for row in COMMITTED["rows"]]
    assert measured == list(itertools.product(TASKS, METHODS, task_table.PACKINGS))


def test_packing_costs_no_score() -> None:
    """On average, and of each pair the intervals of the first metric overlap."""
    _, _, high = task_table.packed_less_padded(COMMITTED)
    assert high > 0
    rows = {(row["task"], row["method"], row["packing"]): row["after"][row["metric"]] for row in COMMITTED["rows"]}
    for pair in itertools.product(TASKS, METHODS):
        (_, low, high), (_, packed_low, packed_high) = (rows[*pair, packing] for packing in task_table.PACKINGS)
        assert packed_low <= high, pair
        assert low <= packed_high, pair


def test_packing_is_compared_pair_by_pair() -> None:
    def row(method: str, packing: str, score: float) -> dict[str, Any]:
        return {"task": "t", "method": method, "packing": packing, "metric": "m", "after": {"m": [score, 0, 1]}}

    rows = [row("a", "none", 0.5), row("a", "shared-image", 0.7), row("b", "none", 0.5), row("b", "shared-image", 0.4)]
    mean, low, high = task_table.packed_less_padded({"rows": [*rows, row("c", "none", 0.9)]})  # c has no other
    assert mean == pytest.approx(0.05)
    assert (low, high) == pytest.approx((-0.1, 0.2))
