"""The folder of a run: what it holds, and that nothing in it is lost by accident."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from phi3v.config import RunConfig
from phi3v.data.jsonl import replacing
from phi3v.errors import UserError
from phi3v.machine import available_cores
from phi3v.paths import absolute, file_hash
from phi3v.train.checkpoint_folder import checkpoints, remove_unfinished

# Everything that a run writes; `overwrite` removes these and nothing else.
RUN_FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "eval_before.json",
    "eval_after.json",
    "predictions_before.jsonl",
    "predictions_after.jsonl",
    "report.html",
    "log.txt",
)
RUN_FOLDERS = ("best", "final", "runs")
LIBRARIES = ("phi3v", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "tokenizers", "Pillow")


# Any of these says that a run got somewhere.
RESULTS = ("metrics.jsonl", "eval_before.json", "eval_after.json", "best", "final")


def check_run_folder(config: RunConfig, *, resume: bool = False) -> Path:
    """Look whether a run may write to ``training.output_dir``; nothing is written or removed yet.

    Args:
        resume: what it holds is gone on with, or replaced if there is nothing to go on from.

    Raises:
        UserError: it holds a run and ``training.overwrite`` is not set; or what would be replaced is needed by this
            very run.
    """
    folder = Path(config.training.output_dir)
    held = [name for name in RESULTS if (folder / name).exists()]
    saved = [path.name for path in checkpoints(folder)]
    if (held or saved) and not config.training.overwrite and not resume:
        raise UserError(
            f"holds a run already ({', '.join([*held, *saved])})",
            where=str(folder),
            hint=("add --resume to go on with it, " if saved else "")
            + "choose another --training.output_dir, or add --training.overwrite true to replace it",
        )
    for key, needed in (
        ("model.path", config.model.path),
        ("data.train", config.data.train),
        ("data.eval", config.data.eval),
    ):
        for name in (*RUN_FILES, *RUN_FOLDERS, *saved):
            doomed = (folder / name).resolve()
            if needed is not None and doomed.exists() and Path(needed).resolve().is_relative_to(doomed):
                raise UserError(
                    f"{key} is {needed}, which this run would replace",
                    where=str(folder),
                    hint="choose another --training.output_dir",
                )
    return folder


def claim_run_folder(config: RunConfig) -> Path:
    """Make the folder, remove what an earlier run left there, write ``config.yaml`` and ``environment.json``.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(config.training.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
        remove_unfinished(folder)
        for path in (*(folder / name for name in RUN_FOLDERS), *checkpoints(folder)):
            if path.is_dir():
                shutil.rmtree(path)
        _describe(folder, config, environment())
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(folder)) from None
    return folder


def describe_again(config: RunConfig) -> None:
    """The configuration that a resumed run goes on with, and its environment beside the first one.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(config.training.output_dir)
    try:
        facts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        _describe(folder, config, facts | {"resumed": [*facts.get("resumed", []), environment()]})
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(folder)) from None


def _describe(folder: Path, config: RunConfig, facts: dict[str, Any]) -> None:
    # As a place that is the same from any folder; what is in it is found from there even if both are moved.
    named = replace(config, training=replace(config.training, output_dir=str(absolute(folder))))
    for name, text in (("config.yaml", named.to_yaml()), ("environment.json", json.dumps(facts, indent=2) + "\n")):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def environment() -> dict[str, Any]:
    """Versions, hardware and command of this process."""
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__  # with its build, which the package's metadata may lack
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cpu_threads": torch.get_num_threads(),
        "cpus": available_cores(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def write_manifest(folder: Path, *, tuned_from: str | None = None) -> None:
    """``manifest.json``: the SHA-256 of every file of a saved model, and which model it was tuned from."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "manifest.json":
            hashes[path.name] = file_hash(path)
    facts = {"sha256": hashes} | ({"tuned_from": tuned_from} if tuned_from is not None else {})
    (folder / "manifest.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_tuned_from(folder: Path) -> str | None:
    """Which model a saved one was tuned from, where its manifest says so."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("tuned_from")
    except (OSError, ValueError, AttributeError):  # none, or none of ours
        return None
    return found if isinstance(found, str) else None
