"""Services that get the metrics too. The library here is a stand-in; what it is sent, and by whom, is real."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest
from run_helpers import Train, read_metrics

from phi3v.errors import UserError
from phi3v.train.observers.tracking import prepare_trackers

TRACKIO = """
import contextvars, json, os

class context_vars:
    current_space_id = contextvars.ContextVar("space", default=None)
    current_project = contextvars.ContextVar("project", default=None)

config = type("Config", (dict,), {"update": lambda self, *arguments, **settings: None})()

def _write(kind, value):
    with open(os.environ["TRACKED"], "a") as file:
        file.write(json.dumps([kind, value]) + "\\n")

class Run:
    def log(self, values, step):
        _write("log", values)

    def finish(self):
        _write("finish", None)

def init(**settings):
    _write("init", {name: settings[name] for name in ("project", "name")})
    return Run()
"""


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name in ("MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_SILENT", "WANDB_CONSOLE", "WANDB_MODE"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("clean_environment")
def test_a_service_gets_losses_and_scores_under_the_runs_name(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "library" / "trackio").mkdir(parents=True)
    (tmp_path / "library" / "trackio" / "__init__.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path / "library")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setenv("TRACKED", str(tmp_path / "tracked"))
    importlib.invalidate_caches()
    code, folder = train("training.report_to", "[trackio]", "evaluation.eval_steps", 2, out="my-run")
    sys.modules.pop("trackio", None)
    assert code == 0
    sent = [json.loads(line) for line in (tmp_path / "tracked").read_text().splitlines()]
    assert sent[0] == ["init", {"project": "phi3v", "name": "my-run"}]
    assert sent[-1][0] == "finish"
    logs = [values for kind, values in sent if kind == "log"]
    lines = read_metrics(folder)
    assert [line["train/loss"] for line in logs if "train/loss" in line] == [
        line["loss"] for line in lines if "loss" in line
    ]
    assert [line["eval/accuracy"] for line in logs if "eval/accuracy" in line] == [
        line["eval"]["accuracy"]["value"] for line in lines if "eval" in line
    ]
    assert list((folder / "runs").rglob("events.out.*"))  # TensorBoard as ever


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_library_is_named_before_any_work(
    train: Train, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *rest: None if wanted == name else find(wanted))
    code, folder = train("training.report_to", f"[{name}]", "model.path", "nowhere")
    assert code == 2
    assert f"pip install {name}" in capsys.readouterr().err
    assert not folder.exists()


def test_an_unknown_service_is_refused(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("training.report_to", "[comet]")[0] == 2
    assert "report_to" in capsys.readouterr().err


@pytest.mark.usefixtures("clean_environment")
def test_wandb_stays_offline_where_nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would wait for a key to be typed, or end the run where there is no terminal."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "wandb sync" in prepare_trackers(["wandb"], 0)[0]
    assert os.environ["WANDB_MODE"] == "offline"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert prepare_trackers(["wandb"], 0) == ["wandb: mode online, project phi3v"]
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    assert "wandb sync" in prepare_trackers(["wandb"], 0)[0]
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert prepare_trackers(["wandb"], 0) == ["wandb: mode online, project phi3v"]


@pytest.mark.usefixtures("clean_environment")
def test_a_store_of_mlflow_that_cannot_be_reached_is_said_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("mlflow")
    asked: list[str] = []

    def refuse(experiment: str) -> None:
        asked.append(experiment)
        raise ConnectionError("no such server\nand a long story")

    monkeypatch.setattr(library, "set_experiment", refuse, raising=False)
    monkeypatch.setattr(library, "get_tracking_uri", lambda: "http://nowhere", raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", library)
    with pytest.raises(UserError, match=r"http://nowhere: MLflow's store cannot be used: no such server\n"):
        prepare_trackers(["mlflow"], 0)
    assert prepare_trackers(["mlflow"], 1) == ["mlflow: http://nowhere, experiment phi3v"]  # rank 0 alone asks
    assert asked == ["phi3v"]
