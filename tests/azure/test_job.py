"""Jobs of Azure Machine Learning: accepted by azure-ai-ml's own schema, and sent through its client."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from arm import SUBSCRIPTION, Answer, Arm, error

from phi3v.azure.account import Account
from phi3v.azure.job import JobSettings, load_job_file, send_job, write_job
from phi3v.cli import main
from phi3v.config import DataSource, RunConfig, load_config
from phi3v.errors import UserError
from phi3v.grammar import RECIPES
from phi3v.plan.hardware import find_machine


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    turn = {"user": "what is 1 + 1?", "assistant": "2"}
    lines = [json.dumps({"id": str(number), "conversations": [turn]}) for number in range(16)]  # one a GPU
    for name in ("train.jsonl", "val.jsonl"):
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def config(data: Path) -> RunConfig:
    config = load_config(RECIPES["docvqa_lora"])
    config.data.train, config.data.eval = str(data / "train.jsonl"), str(data / "val.jsonl")
    return config


def settings(**changes: Any) -> JobSettings:
    return JobSettings(find_machine(None, None, "Standard_ND96asr_v4", 2), "docvqa", **changes)


def test_two_nodes(config: RunConfig, data: Path, tmp_path: Path) -> None:
    path = write_job(config, settings(low_priority=True), tmp_path / "job")
    job = load_job_file(path)
    assert job._validate().passed
    assert (job.resources["instance_count"], job.resources["instance_type"]) == (2, "Standard_ND96asr_v4")
    assert job.distribution.process_count_per_instance == 8
    assert job.queue_settings["job_tier"] == "spot"
    assert job.inputs["data"].path == str(data)
    assert job.outputs["run"].path == "azureml://datastores/workspaceblobstore/paths/phi3v/docvqa"
    assert job.outputs["run"].mode == "rw_mount"
    words = shlex.split(job.command)
    assert words[:5] == ["python", "-m", "phi3v", "train", "recipe.yaml"]
    assert words[words.index("--data.train") + 1] == "${{inputs.data}}/train.jsonl"
    assert words[words.index("--data.eval") + 1] == "${{inputs.data}}/val.jsonl"
    assert words[words.index("--training.output_dir") + 1] == "${{outputs.run}}"
    assert words[-2:] == ["--resume", "auto"]


def test_the_code_and_the_packages_go_with_it(config: RunConfig, tmp_path: Path) -> None:
    config.method.name = "qlora"
    folder = write_job(config, settings(), tmp_path / "job").parent
    assert (folder / "code/phi3v/cli.py").is_file()
    assert (folder / "code/phi3v/plan/hardware.yaml").is_file()
    assert not list(folder.rglob("__pycache__"))
    recipe = load_config(folder / "code/recipe.yaml")
    assert recipe.method.name == "qlora"
    assert recipe.training.learning_rate == config.training.learning_rate
    assert recipe.data.train is None
    environment = yaml.safe_load((folder / "environment.yaml").read_text())
    packages = environment["dependencies"][-1]["pip"]
    names = {package.split("==")[0] for package in packages}
    assert names >= {"torch", "transformers", "peft", "bitsandbytes"}
    assert not names & {"pytest", "azure-ai-ml", "phi3v"}
    assert not any("+" in package for package in packages)
    config.method.name = "full"
    write_job(config, settings(), folder)
    assert "deepspeed" in (folder / "environment.yaml").read_text()


def test_data_and_models_of_other_places(config: RunConfig, tmp_path: Path, tiny_model_dir: Path) -> None:
    config.model.path = str(tiny_model_dir)
    job = load_job_file(write_job(config, settings(data="azureml:docvqa:1", compute="cluster"), tmp_path / "job"))
    assert job.inputs["data"].path == "docvqa:1"  # the SDK takes the prefix off
    assert job.inputs["model"].path == str(tiny_model_dir)
    assert "--model.path ${{inputs.model}}" in job.command
    assert job.compute == "cluster"
    assert job.resources.get("instance_type") is None
    place = "azureml://datastores/store/paths/models/phi"
    again = load_job_file(write_job(config, settings(model=place, datastore="store"), tmp_path / "job"))
    assert again.inputs["model"].path == place
    assert again.outputs["run"].path == "azureml://datastores/store/paths/phi3v/docvqa"


def test_several_data_files(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job gets the folder that has them all; its shell may still have to fill in where that is."""
    for name in ("one", "two"):
        (tmp_path / "all" / name).mkdir(parents=True)
    one, two = (str(tmp_path / "all" / name / "train.jsonl") for name in ("one", "two"))
    config.data.train = [DataSource(one, name="one", weight=2.0), DataSource(two, name="two", weight=1.0)]
    config.data.eval = [DataSource(two, name="eval", max_records=5)]
    job = load_job_file(write_job(config, settings(), tmp_path / "job"))
    assert job.inputs["data"].path == str(tmp_path / "all")
    keys = job.command[job.command.index("--data.train") : job.command.index("--training.output_dir")]
    monkeypatch.setenv("PLACE", "/mnt/data")
    line = f"printf '%s\\n' {keys.replace('${{inputs.data}}', '$PLACE')}"
    words = subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout.splitlines()
    there = load_config(None, words[:4]).data
    moved = [each.path.replace(f"{tmp_path}/all", "/mnt/data") for each in config.data.train]
    assert there.train == [replace(each, path=path) for each, path in zip(config.data.train, moved, strict=True)]
    assert there.eval == [DataSource("/mnt/data/two/train.jsonl", name="eval", max_records=5)]


def test_data_at_a_url_is_read_from_there(
    config: RunConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extras = ['fsspec[http]>=2025.9; extra == "http"', 's3fs>=2025.9; extra == "s3"']
    monkeypatch.setattr("phi3v.azure.job.metadata.requires", lambda _name: extras)
    config.data.train = "https://host/shards/train"
    written = write_job(config, settings(), tmp_path / "job")
    job = load_job_file(written)
    assert "--data.train https://host/shards/train --data.eval ${{inputs.data}}/val.jsonl" in job.command
    assert job.inputs["data"].path == str(data)
    assert _packages(written) == ["fsspec"]
    config.data.eval = "s3://bucket/val"
    written = write_job(config, settings(), tmp_path / "job")
    job = load_job_file(written)
    assert "data" not in job.inputs
    assert "--data.eval s3://bucket/val" in job.command
    assert _packages(written) == ["fsspec", "s3fs"]


def _packages(job: Path) -> list[str]:
    """The names of what the job's machines install."""
    environment = yaml.safe_load((job.parent / "environment.yaml").read_text())
    return [re.split(r"[\[=>]", line)[0] for line in environment["dependencies"][-1]["pip"]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "nowhere"}, "there is no folder nowhere"),
        ({"low_priority": True, "compute": "c"}, "a cluster has its own priority"),
    ],
)
def test_wrong_settings(config: RunConfig, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        write_job(config, settings(**changes), tmp_path / "job")


def test_wrong_recipes(config: RunConfig, tmp_path: Path) -> None:
    config.data.eval = str(tmp_path / "elsewhere.jsonl")
    with pytest.raises(UserError, match="lies outside of"):
        write_job(config, settings(), tmp_path / "job")
    config.data.train = None
    with pytest.raises(UserError, match="no data to train on"):
        write_job(config, settings(), tmp_path / "job")
    with pytest.raises(UserError, match="no name"):
        JobSettings(find_machine(None, None, "Standard_ND40rs_v2"), "../up")


def test_a_folder_of_something_else_stays(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("my thesis")
    with pytest.raises(UserError, match="holds no job"):
        write_job(config, settings(), tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "my thesis"


def test_what_the_schema_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("type: command\ncommand: phi3v\nqueue_settings: {job_tier: cheap}\n")
    with pytest.raises(UserError, match="schema refuses the job"):
        load_job_file(tmp_path / "job.yaml")


def test_every_method_makes_a_job(tmp_path: Path, data: Path) -> None:
    for recipe in (RECIPES[name] for name in RECIPES if name.startswith("docvqa_")):
        config = load_config(recipe)
        config.data.train, config.data.eval = str(data / "train.jsonl"), None
        job = load_job_file(write_job(config, settings(), tmp_path / recipe.stem))
        assert job._validate().passed, recipe


def test_the_command_without_azure(
    data: Path, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["azure", "submit", "docvqa_lora", "--sku", "Standard_ND96asr_v4", "--nodes", "2"]
    command += ["--dry-run", "--out", str(tmp_path / "job"), "--json"]
    command += ["--data.train", str(data / "train.jsonl"), "--data.eval", str(data / "val.jsonl")]
    command += ["--model.path", str(tiny_model_dir)]
    assert main(command) == 2
    assert "no record has an image" in capsys.readouterr().err  # refused before a node is paid for
    command += ["--method.lora.parts", "[decoder, head]"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not answer["sent"]
    assert answer["verdict"] == "fits"
    assert "az ml job create --file" in answer["az"]
    assert load_job_file(Path(answer["job"])).display_name == "docvqa_lora"
    assert main([part for part in command if part != "--dry-run"]) == 2
    assert "is needed to send a job" in capsys.readouterr().err
    assert main([*command, "--data.packing", "none", "--training.batch_size", "20"]) == 2
    assert "cannot be split over 16 devices" in capsys.readouterr().err


@pytest.fixture
def cloud(arm: Arm, account: Account, monkeypatch: pytest.MonkeyPatch) -> Arm:
    """azure-ai-ml asks a cloud of its own, which it is told of by the setting that Azure Stack uses."""
    endpoints = {
        "name": "Local",
        "portal": "https://portal",
        "resourceManager": f"{arm.endpoint}/",
        "authentication": {"loginEndpoint": "https://login/"},
        "suffixes": {"storage": "local"},
    }
    arm.on("GET", "/metadata/endpoints", Answer(200, [endpoints]))
    monkeypatch.setenv("ARM_CLOUD_METADATA_URL", f"{arm.endpoint}/metadata/endpoints?api-version=2019-05-01")
    monkeypatch.setenv("AZUREML_CURRENT_CLOUD", "Local")
    return arm


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (error(404, "ResourceNotFound", "The workspace was not found"), ["does not find it", "workspace list"]),
        (error(403, "AuthorizationFailed", "Not allowed"), ["no permission", "AzureML Data Scientist"]),
    ],
)
def test_a_workspace_that_is_not_there_or_closed(
    config: RunConfig, account: Account, cloud: Arm, tmp_path: Path, answer: Answer, words: list[str]
) -> None:
    path = write_job(config, settings(), tmp_path / "job")
    workspace = (
        f"/subscriptions/{SUBSCRIPTION}/resourceGroups/g/providers/Microsoft.MachineLearningServices/workspaces/w"
    )
    cloud.on("GET", workspace, answer)
    with pytest.raises(UserError) as caught:
        send_job(account, path, resource_group="g", workspace="w")
    for word in words:
        assert word in str(caught.value)
    assert any(path == workspace for _, path, _, _ in cloud.asked)
