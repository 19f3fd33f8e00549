"""One HTML file about one or several runs."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from phi3v import __version__
from phi3v.config import RunConfig
from phi3v.errors import UserError
from phi3v.report.gallery import Thumbnails, class_scores, gallery
from phi3v.report.page import write_page
from phi3v.report.run_files import RunFiles, read_run

REPORT_FILE = "report.html"
IMAGE_BUDGET = 2_000_000  # bytes of small images in a page
SCRIPTS = ("page", "charts", "scores", "gallery", "report")


def report(folders: Sequence[Path], *, out: Path | None = None, image_budget: int = IMAGE_BUDGET) -> dict[str, Any]:
    """Write a report and return what it says in short.

    Args:
        folders: run folders; several are compared.
        out: the file; by default ``report.html`` in the run folder, or here for several.
        image_budget: bytes that small images may take, shared by the runs.

    Raises:
        UserError: a folder is no run, or the file cannot be written.
    """
    repeated = [folder for folder in folders if folders.count(folder) > 1]
    if repeated:
        raise UserError("is named twice", where=str(repeated[0]), hint="name each run once")
    runs = [read_run(folder) for folder in folders]
    _name_apart(runs)
    out = out or (folders[0] if len(folders) == 1 else Path()) / REPORT_FILE
    size = write_report(runs, out, image_budget=image_budget)
    told = [
        {
            "folder": str(run.folder),
            "status": run.status,
            "missing": run.missing,
            "before": _primary(run, "before"),
            "after": _primary(run, "after"),
            "predictions": len(run.predictions.get("after") or run.predictions.get("before") or []),
        }
        for run in runs
    ]
    return {"report": str(out), "bytes": size, "runs": told}


def write_report(runs: Sequence[RunFiles], out: Path, *, image_budget: int = IMAGE_BUDGET) -> int:
    """Write the page about ``runs`` and return its size in bytes."""
    galleries, encoded = [], []
    for run in runs:
        thumbnails = Thumbnails(image_budget // len(runs))
        galleries.append(gallery(run, thumbnails))
        encoded.append(thumbnails.encoded)
    blocks = {
        "runs": {
            "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            "version": __version__,
            "runs": [_run_block(run) for run in runs],
        },
        "predictions": {"galleries": galleries, "thumbnails": encoded},
    }
    title = " · ".join(run.name for run in runs) + " · phi3v report"
    return write_page(out, title, SCRIPTS, blocks)


def _run_block(run: RunFiles) -> dict[str, Any]:
    command = run.environment.get("command")
    typed = {"command": shlex.join(map(str, command))} if isinstance(command, list) else {}
    return {
        "name": run.name,
        "folder": str(run.folder),
        "status": run.status,
        "config": _flat(run.config),
        "defaults": _flat(dataclasses.asdict(RunConfig())),
        "environment": _flat(run.environment | typed),
        "curves": dataclasses.asdict(run.curves),
        "result": run.result,
        "evaluations": run.evaluations,
        "confusion": class_scores(run),
        "log": run.log,
        "missing": run.missing,
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to values; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _primary(run: RunFiles, when: str) -> float | None:
    score = run.evaluations.get(when, {}).get("score")
    return score if isinstance(score, float | int) else None


def _name_apart(runs: Sequence[RunFiles]) -> None:
    """Runs whose folders are called the same are named by as much of their path as tells them apart."""
    paths = [run.folder.resolve() for run in runs]
    common = Path(os.path.commonpath(paths))
    names = [run.name for run in runs]
    for run, path in zip(runs, paths, strict=True):
        if names.count(run.name) > 1:
            run.name = str(path.relative_to(common)) if path != common else path.name
