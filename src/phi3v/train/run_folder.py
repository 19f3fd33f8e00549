"""The folder of a run: what it holds, and that nothing in it is lost by accident."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from phi3v.config import RunConfig
from phi3v.errors import UserError
from phi3v.machine import available_cores

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


def check_run_folder(config: RunConfig) -> Path:
    """Look whether a run may write to ``training.output_dir``; nothing is written or removed yet.

    Raises:
        UserError: it holds a run and ``training.overwrite`` is not set; or what would be replaced is needed by this
            very run.
    """
    folder = Path(config.training.output_dir)
    held = [name for name in RESULTS if (folder / name).exists()]
    if held and not config.training.overwrite:
        raise UserError(
            f"holds a run already ({', '.join(held)})",
            where=str(folder),
            hint="choose another --training.output_dir, or add --training.overwrite true to replace it",
        )
    for key, needed in (
        ("model.path", config.model.path),
        ("data.train", config.data.train),
        ("data.eval", config.data.eval),
    ):
        for name in (*RUN_FILES, *RUN_FOLDERS):
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
        for name in RUN_FOLDERS:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
        (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(folder)) from None
    return folder


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


def write_manifest(folder: Path) -> None:
    """``manifest.json``: the SHA-256 of every file of a saved model."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "manifest.json":
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": hashes}, indent=2) + "\n", encoding="utf-8")
