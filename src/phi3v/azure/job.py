"""`phi3v azure submit`: a recipe as a command job of Azure Machine Learning.

The job is a folder: ``job.yaml`` (what `az ml job create --file` takes), ``environment.yaml`` (the packages of this
machine) and ``code/`` (phi3v itself and the recipe). Azure ML starts one process a GPU on every node and sets the
variables that `torchrun` sets, so the command is `phi3v train` itself. The run folder is a fixed place of a datastore:
a job that was pre-empted, or is sent again under the same name, resumes from its checkpoints there.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

import phi3v
from phi3v.azure.account import Account, explained, require_extra
from phi3v.config import DataSource, RunConfig
from phi3v.data.shards.remote import EXTRAS
from phi3v.errors import UserError
from phi3v.paths import absolute, find_model, is_hub_id, url_of
from phi3v.plan.hardware import Machine

SCHEMA = "https://azuremlschemas.azureedge.net/latest/commandJob.schema.json"
# torch brings its own CUDA libraries; what the image adds is what InfiniBand needs.
IMAGE = "mcr.microsoft.com/azureml/openmpi5.0-cuda12.6-ubuntu24.04:latest"
DATASTORE = "workspaceblobstore"  # every workspace has it
SHARED_MEMORY_GB = 8  # a GPU, for the processes that read images
ROLE = "AzureML Data Scientist"
_REMOTE = re.compile(r"^(azureml|https|abfss|wasbs):")


@dataclass(frozen=True)
class JobSettings:
    """Where and how a job runs.

    Attributes:
        machine: an Azure size with its nodes.
        name: of the run; the same name resumes.
        data: folder or URI that holds the data files of the recipe; None: the folder they are in here.
        model: folder or URI of the model; None: the recipe's, a hub id being downloaded by the job.
        compute: an existing cluster; None: serverless compute, which needs none.
        low_priority: serverless compute that costs less and may be taken away at any time.
        datastore: keeps the run folder.
    """

    machine: Machine
    name: str
    data: str | None = None
    model: str | None = None
    compute: str | None = None
    low_priority: bool = False
    datastore: str = DATASTORE
    image: str = IMAGE

    def __post_init__(self) -> None:
        if self.machine.sku is None:
            raise UserError("a job needs an Azure size", where="--sku", hint="`phi3v azure skus RECIPE` lists them")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise UserError(f"{self.name!r} is no name", where="--name", hint="use letters, digits, - and _")
        if self.low_priority and self.compute is not None:
            raise UserError(
                "a cluster has its own priority", where="--low-priority", hint="create the cluster as low priority"
            )

    @property
    def run_folder(self) -> str:
        """Where checkpoints and results lie."""
        return f"azureml://datastores/{self.datastore}/paths/phi3v/{self.name}"


def write_job(config: RunConfig, settings: JobSettings, folder: Path) -> Path:
    """Write the job's folder and return its ``job.yaml``, which Azure's own schema has accepted.

    Raises:
        UserError: the recipe's data is not in one folder, or there is something in the way.
    """
    if folder.exists() and not (folder / "job.yaml").is_file() and any(folder.iterdir()):
        raise UserError("is not empty and holds no job", where=f"--out {folder}", hint="choose another folder")
    inputs, keys = _inputs(config, settings)
    code = folder / "code"
    shutil.rmtree(code, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(Path(phi3v.__file__).parent, code / "phi3v", ignore=ignored)
    (code / "recipe.yaml").write_text(_portable(config).to_yaml(), encoding="utf-8")
    (folder / "environment.yaml").write_text(_dump(_environment(config)), encoding="utf-8")
    path = folder / "job.yaml"
    path.write_text(_dump(_job(settings, inputs, keys)), encoding="utf-8")
    load_job_file(path)
    return path


def load_job_file(path: Path) -> Any:
    """The job of a ``job.yaml``, checked by `azure-ai-ml`'s schema without asking Azure.

    Raises:
        UserError: the schema refuses it.
    """
    require_extra("azure.ai.ml")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the SDK's own schemas, and that serverless priority is a new feature
        logging.getLogger("azure.ai.ml").setLevel(logging.ERROR)
        from azure.ai.ml import load_job
        from marshmallow.exceptions import ValidationError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_job(path)
    except ValidationError as error:
        raise UserError(f"Azure's schema refuses the job: {error}", where=str(path)) from None


def _job(settings: JobSettings, inputs: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    sku = settings.machine.sku
    assert sku is not None
    words = ["python -m phi3v train recipe.yaml", *(f"--{key} {value}" for key, value in keys.items())]
    resources: dict[str, Any] = {"instance_count": settings.machine.nodes}
    if settings.compute is None:
        resources["instance_type"] = sku.name
    resources["shm_size"] = f"{SHARED_MEMORY_GB * sku.gpus}g"
    job: dict[str, Any] = {
        "$schema": SCHEMA,
        "type": "command",
        "display_name": settings.name,
        "experiment_name": "phi3v",
        "code": "code",
        "command": " ".join([*words, "--training.output_dir ${{outputs.run}}", "--resume auto"]),
        "inputs": inputs,
        "outputs": {"run": {"type": "uri_folder", "path": settings.run_folder, "mode": "rw_mount"}},
        "environment": {"image": settings.image, "conda_file": "environment.yaml"},
        "distribution": {"type": "pytorch", "process_count_per_instance": sku.gpus},
        "resources": resources,
    }
    if settings.compute is not None:
        job["compute"] = f"azureml:{settings.compute}"
    if settings.low_priority:
        job["queue_settings"] = {"job_tier": "spot"}
    return job


def _inputs(config: RunConfig, settings: JobSettings) -> tuple[dict[str, Any], dict[str, str]]:
    """The job's inputs, and the recipe's keys that name them there."""
    if config.data.train is None:
        raise UserError("no data to train on", where="data.train", hint="give a JSONL file")
    paths = config.data.paths
    local = {path: absolute(path) for _, path in paths if url_of(path) is None}
    places = {path: path for _, path in paths}  # what is at a URL is read from there
    inputs = {}
    if local:
        # Of one file its folder, and of several the folder that has them all.
        trained = [local[source.path].parent for source in config.data.train_sources if source.path in local]
        home = Path(os.path.commonpath(trained or [path.parent for path in local.values()]))
        for key, path in paths:
            if path in local and not local[path].is_relative_to(home):
                raise UserError(
                    f"lies outside of {home}, which is what the job gets",
                    where=f"{key} {path}",
                    hint="put all files into one folder, or into folders below it",
                )
        places |= {path: f"${{{{inputs.data}}}}/{at.relative_to(home).as_posix()}" for path, at in local.items()}
        inputs["data"] = _folder_input(settings.data or str(home), "--data")
    keys = {}
    for key, data in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if data is not None:
            keys[key] = places[data] if isinstance(data, str) else _listed(data, places)
    model = settings.model or find_model(config.model.path, f"model.path {config.model.path}")
    if not is_hub_id(model):
        inputs["model"] = _folder_input(model, "--model")
        keys["model.path"] = "${{inputs.model}}"
    return inputs, keys


def _listed(sources: Sequence[DataSource], places: Mapping[str, str]) -> str:
    """Sources at other places, as a word of a command line in which the shell may still fill in the places."""
    entries = []
    for source in sources:
        given = {name: value for name, value in asdict(source).items() if value is not None}
        fields = [f"{name}: {value!r}" for name, value in (given | {"path": places[source.path]}).items()]
        entries.append("{" + ", ".join(fields) + "}")
    return f'"[{", ".join(entries)}]"'


def _folder_input(place: str, where: str) -> dict[str, str]:
    """A folder that nodes read; one of this machine is uploaded."""
    if not _REMOTE.match(place):
        if not Path(place).is_dir():
            hint = "give a folder, azureml:NAME:VERSION or azureml://datastores/STORE/paths/FOLDER"
            raise UserError(f"there is no folder {place}", where=where, hint=hint)
        place = str(Path(place).absolute())
    return {"type": "uri_folder", "path": place, "mode": "ro_mount"}


def _portable(config: RunConfig) -> RunConfig:
    """The recipe without the places of this machine; the job's command line names its own."""
    portable = copy.deepcopy(config)
    portable.data = replace(portable.data, train=None, eval=None)
    portable.training = replace(portable.training, output_dir="output", progress_bar=False)
    return portable


def _environment(config: RunConfig) -> dict[str, Any]:
    """A conda file with what phi3v needs here, in the versions that are installed here."""
    wanted = {
        "qlora": config.method.name == "qlora" or config.training.optimizer == "adamw_8bit",
        "gpu": config.training.kernels == "liger",
        "deepspeed": config.distributed.engine.startswith("zero")
        or (config.distributed.engine == "auto" and config.method.name in ("full", "frozen-vision")),
    }
    drivers = {EXTRAS.get((url_of(path) or "").partition(":")[0], "") for _, path in config.data.paths}
    extras = ["", *(extra for extra, needed in wanted.items() if needed), *sorted(drivers - {""})]
    pip = []
    for line in metadata.requires("phi3v") or []:
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            pip.append(_pinned(requirement))
    python = f"python={sys.version_info.major}.{sys.version_info.minor}"
    return {"name": "phi3v", "channels": ["conda-forge"], "dependencies": [python, "pip", {"pip": sorted(set(pip))}]}


def _pinned(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    try:
        # A build for this machine, such as 2.13.0+cpu, is not what the job's machine wants.
        version = metadata.version(requirement.name).split("+")[0]
    except metadata.PackageNotFoundError:
        return f"{requirement.name}{extras}{requirement.specifier}"
    return f"{requirement.name}{extras}=={version}"


def _dump(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)


def send_job(account: Account, path: Path, *, resource_group: str, workspace: str) -> tuple[str, str | None]:
    """Send a job to a workspace and return its name and its page in the studio.

    Raises:
        UserError: Azure refuses, or there is no such workspace.
    """
    from azure.ai.ml import MLClient

    client = MLClient(account.credential, account.subscription, resource_group, workspace)
    with explained(
        f"workspace {workspace}",
        role=ROLE,
        missing=f"is there a workspace {workspace} in {resource_group} (`az ml workspace list --output table`)",
        provider="Microsoft.MachineLearningServices",
    ):
        client.workspaces.get(workspace)  # a wrong name is told before the data is uploaded
        sent = client.jobs.create_or_update(load_job_file(path))
    return str(sent.name), getattr(sent, "studio_url", None)
