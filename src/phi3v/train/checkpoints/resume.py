"""Where a run goes on: which checkpoint, whether it belongs to this configuration, and what differs.

Rank 0 looks at the disk and tells the others, which may be on other machines; of a sharded checkpoint, which all ranks
see, each checks a share of the files.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v.config import LATER_GROUPS, RunConfig, load_config
from phi3v.data.shards.index import data_hash
from phi3v.errors import UserError
from phi3v.model.checkpoint import model_content
from phi3v.paths import find_model, now_at
from phi3v.train.checkpoint_folder import (
    SHARDED_FORMAT,
    Found,
    checkpoints,
    damage,
    find_checkpoint,
    is_sharded,
    link_tree,
    read_state,
    remove_unfinished,
    step_of,
)
from phi3v.train.collectives import HostCollectives
from phi3v.train.device import RuntimeDevice
from phi3v.train.engines.choice import choose_engine

# Keys that may be others on resume, by name, or by group with a dot at the end: none changes what a step computes.
CHANGEABLE = (
    "checkpoint.",
    "data.cache_limit",
    "data.image_check",
    "data.num_workers",
    "data.on_bad_sample",
    "distributed.engine",
    "distributed.offload_optimizer",
    "distributed.replicas",
    "distributed.timeout_minutes",
    "evaluation.after",
    "evaluation.batch_size",
    "evaluation.batch_tokens",
    "evaluation.before",
    "evaluation.early_stopping_patience",
    "evaluation.eval_steps",
    "training.activation_checkpointing",
    "training.logging_steps",
    "training.max_nonfinite_steps",
    "training.output_dir",
    "training.overwrite",
    "training.progress_bar",
    "training.self_check",
)
# These may grow.
EXTENDABLE = ("training.epochs", "training.max_steps")
# These may be at another place, with the same content; by their names in ``state.json``.
MOVABLE = {"data.train": "train", "data.eval": "eval", "model.path": "model"}

# Engines that hold everything on every rank, and save the optimizer alike; the others do so among themselves.
WHOLE = ("none", "ddp")

# What belongs to the end of a run, and is made again if the run goes on.
_OF_THE_END = ("final", "eval_after.json", "predictions_after.jsonl", "report.html")


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from.

    Attributes:
        folder: where it is; on ranks of other machines it need not exist.
        state: of ``state.json``.
        randoms: the random generators of each rank that saved.
    """

    folder: Path
    state: dict[str, Any]
    randoms: list[dict[str, Any]]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def is_sharded(self) -> bool:
        """Whether each rank reads what it needs; otherwise rank 0 reads everything."""
        return bool(self.state["format"] == SHARDED_FORMAT)

    @property
    def stopped_early(self) -> bool:
        """Saved when early stopping had ended training."""
        evaluation = self.state["evaluation"]
        return evaluation is not None and bool(evaluation["stopped_early"])


@dataclass(frozen=True)
class FinishedRun:
    """What ``--resume`` finds where nothing is left to do."""

    folder: Path

    def to_json_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "finished": True}


def find_resume_point(
    wanted: str | None, config: RunConfig, runtime: RuntimeDevice, collectives: HostCollectives, console: Console
) -> ResumePoint | FinishedRun | None:
    """What to go on from.

    Args:
        wanted: ``auto``, or a checkpoint of ``training.output_dir``; ``None``: start anew.

    Returns:
        ``None`` to start anew.

    Raises:
        UserError: that checkpoint is damaged or of another run, or the configuration may not differ so.
    """
    if wanted is None:
        return None
    run_folder = Path(config.training.output_dir)
    newest = max(map(step_of, checkpoints(run_folder)), default=-1)
    everywhere = collectives.all_gather((newest, platform.node()))

    def candidates() -> list[Path]:
        """What to look at, in this order."""
        _require_newest_here(everywhere, config.training.output_dir)
        for path in remove_unfinished(run_folder):
            step = path.name.split("-")[1].split(".")[0]
            console.print(f"resume: removed a half-written checkpoint of step {step}", highlight=False)
        if wanted != "auto":
            return [_named(Path(wanted), run_folder)]
        return [] if is_finished(run_folder, config) else checkpoints(run_folder)

    folders = collectives.run_on_first(runtime.rank, candidates)
    found = find_checkpoint(run_folder, folders, lambda folder: _damage(folder, runtime.rank, collectives))
    return collectives.run_on_first(runtime.rank, lambda: _choose(wanted, found, config, runtime, console))


def _damage(folder: Path, rank: int, collectives: HostCollectives) -> str | None:
    """What is wrong with a checkpoint, or None; a collective.

    Raises:
        UserError: it is sharded, and not all ranks see it.
    """
    sharded = collectives.broadcast(is_sharded(folder))
    if sharded:
        blind = [node for sees, node in collectives.all_gather((folder.is_dir(), platform.node())) if not sees]
        if blind:
            hint = "every rank reads its part of a sharded checkpoint: mount the disk there under the same path"
            raise UserError(f"cannot be seen on {blind[0]}", where=str(folder), hint=hint)
    wrong = damage(folder, rank, collectives.world_size) if sharded else damage(folder) if rank == 0 else None
    return next((text for text in collectives.all_gather(wrong) if text is not None), None)


def _choose(
    wanted: str, found: Found, config: RunConfig, runtime: RuntimeDevice, console: Console
) -> ResumePoint | FinishedRun | None:
    run_folder = Path(config.training.output_dir)
    if wanted == "auto":
        if is_finished(run_folder, config):
            console.print(
                f"resume: the run in {run_folder} is finished, so there is nothing to do",
                highlight=False,
                soft_wrap=True,
            )
            return FinishedRun(run_folder)
        for folder, why in found.skipped:
            console.print(f"resume: skipped {folder}: {why}", highlight=False, soft_wrap=True)
        if found.folder is None:
            if (run_folder / "final" / "manifest.json").is_file():
                raise UserError(
                    "holds a run that has ended, and no checkpoint to go on from",
                    where=str(run_folder),
                    hint="choose another --training.output_dir, or drop --resume and add --training.overwrite true",
                )
            console.print(
                f"resume: no valid checkpoint in {run_folder}, so the run starts anew", highlight=False, soft_wrap=True
            )
            return None
        folder, why = found.folder, "the newest valid checkpoint"
    else:
        if found.folder is None:
            _, wrong = found.skipped[0]
            raise UserError(f"is damaged: {wrong}", where=f"--resume {wanted}", hint="leave it at auto")
        folder, why = found.folder, "as asked for"
    state, randoms = read_state(folder)
    engine = choose_engine(config, runtime).name
    if state["format"] != SHARDED_FORMAT and (engine in WHOLE) != (state["engine"] in WHOLE):
        raise UserError(
            f"was saved by the engine {state['engine']}, and on {runtime.world_size} ranks this is {engine}",
            where=str(folder),
            hint=f"go on on {state['world_size']} ranks, or begin runs that change their number or engine with "
            "checkpoint.format sharded or distributed.engine ddp or fsdp2",
        )
    changes = allowed_changes(state, config, str(folder))
    console.print(f"resume: {folder} ({why}), after step {state['step']}", highlight=False, soft_wrap=True)
    for line in [*changes, *_other_ranks(state, config, runtime)]:
        console.print(f"resume: {line}", highlight=False, soft_wrap=True)
    return ResumePoint(folder, state, randoms)


def _require_newest_here(everywhere: list[tuple[int, str]], folder: str) -> None:
    """Rank 0 reads and writes checkpoints; a launcher may have given that number to another machine than before."""
    step, machine = max(everywhere)
    if step > everywhere[0][0]:
        raise UserError(
            f"the newest checkpoint, of step {step}, is on {machine}, and rank 0 is on {everywhere[0][1]} now",
            where=folder,
            hint="copy the run folder there, use a disk that all machines share, or fix the order with --node-rank",
        )


def _named(folder: Path, run_folder: Path) -> Path:
    hint = "name a checkpoint-N of training.output_dir, or leave it at auto"
    if step_of(folder) < 0 or not folder.is_dir():
        raise UserError("is no checkpoint", where=f"--resume {folder}", hint=hint)
    if folder.resolve().parent != run_folder.resolve():
        raise UserError(f"is not a checkpoint of {run_folder}", where=f"--resume {folder}", hint=hint)
    return run_folder / folder.name


def is_finished(run_folder: Path, config: RunConfig) -> bool:
    """Whether a run ended as ``config`` wants it to, with all that it is to leave behind."""
    if not (run_folder / "final" / "manifest.json").is_file():
        return False
    if config.evaluation.after and config.data.eval is not None and not (run_folder / "eval_after.json").is_file():
        return False
    before = load_config(run_folder / "config.yaml", of_run=True).training
    return (before.epochs, before.max_steps) == (config.training.epochs, config.training.max_steps)


def allowed_changes(state: Mapping[str, Any], config: RunConfig, where: str) -> list[str]:
    """What is configured otherwise than when the checkpoint was saved, as lines to say.

    Raises:
        UserError: something that may not differ.
    """
    before, now = flat(state["config"]), flat(dataclasses.asdict(config))
    # What an older version did not have yet was as it is by default.
    later = {key: value for key, value in flat(dataclasses.asdict(RunConfig())).items() if _group(key) in LATER_GROUPS}
    before = later | before
    lines = []
    for key, value in now.items():
        old = before.get(key, value)
        if old == value or key in MOVABLE:
            continue
        if key in EXTENDABLE:
            # One of the two may take over from the other, e.g. max_steps where epochs counted.
            shorter = value is not None and old is not None and value < old
            if shorter or (key == "training.max_steps" and value is not None and value < state["step"]):
                raise UserError(
                    f"{key} was {old} and is {value} now; on resume it may only grow",
                    where=where,
                    hint=f"leave {key} at {old}, or start another run",
                )
            lines.append(f"{key}: {old} → {value}; from here the learning rate is that of a run planned for so many")
        elif key in CHANGEABLE or f"{_group(key)}." in CHANGEABLE:
            lines.append(f"{key}: {old} → {value}")
        else:
            raise UserError(
                f"{key} was {old} when it was saved and is {value} now",
                where=where,
                hint=f"leave {key} at {old}, or start another run; docs/resume.md lists what may change",
            )
    for key, name in MOVABLE.items():
        saved, value, old = state["data"].get(name), now[key], before.get(key)
        if value is None or old is None:
            continue
        if _besides_labels(value) != _besides_labels(old):
            what = f"{key} was {old} when it was saved and is {value} now"
            raise UserError(what, where=where, hint="paths and names may differ, and nothing else")
        contents = saved.split() if saved is not None else None
        for place, (path, old_path) in enumerate(zip(_paths(value), _paths(old), strict=True)):
            old_path = now_at(old_path, before["training.output_dir"], Path(config.training.output_dir))
            if contents is None and path != old_path:  # of an older version, which did not look into it
                what = f"{key} was {old_path} when it was saved and is {path} now"
                raise UserError(what, where=where, hint=f"leave {key}")
            if path != old_path:
                lines.append(f"{key}: {old_path} → {path}")
            if contents is not None and _content_of(name, path) != contents[place]:
                raise _other_content(key, path, where)
        renamed = enumerate(zip(_names(old), _names(value), strict=True))
        lines += [f"{key}[{place}].name: {old} → {new}" for place, (old, new) in renamed if old != new]
    return lines


def _paths(value: str | list[dict[str, Any]]) -> list[str]:
    """The paths of a key that names one, or a list of sources."""
    return [value] if isinstance(value, str) else [source["path"] for source in value]


def _names(value: str | list[dict[str, Any]]) -> list[str]:
    return [] if isinstance(value, str) else [source["name"] for source in value]


def _besides_labels(value: str | list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """What decides how much is taken of each source of a list."""
    return None if isinstance(value, str) else [{**source, "path": None, "name": None} for source in value]


def _group(key: str) -> str:
    return key.split(".", 1)[0]


def _content_of(name: str, path: str) -> str:
    return model_content(find_model(path, f"model.path {path}")) if name == "model" else data_hash(path)


def _other_content(key: str, path: str, where: str) -> UserError:
    what = "model" if key == "model.path" else "file"
    return UserError(
        f"{path} is not the {what} that the run began with (its content differs)",
        where=where,
        hint=f"{key} may be at another place, but must hold the same: bring it back, or start another run",
    )


def require_same_content(contents: Mapping[str, str], point: ResumePoint | None, collectives: HostCollectives) -> None:
    """Look whether all ranks read the same model and data, and those that the run began with.

    Args:
        contents: what was checked and parsed, by the names of `MOVABLE`.

    Raises:
        UserError: another copy on a machine, or a file that was replaced a moment ago.
    """
    everywhere = collectives.all_gather((dict(contents), platform.node()))
    first, machine = everywhere[0]
    keys = {name: key for key, name in MOVABLE.items()}
    for rank, (others, other_machine) in enumerate(everywhere):
        for name, content in others.items():
            if content != first.get(name):
                raise UserError(
                    f"is not the same on all machines: rank 0 on {machine} and rank {rank} on {other_machine} differ",
                    where=keys[name],
                    hint="copy it from one machine to the others",
                )
    if point is None:
        return
    for name, content in point.state["data"].items():
        if first.get(name, content) != content:
            raise _other_content(keys[name], f"{keys[name]}, replaced a moment ago,", str(point.folder))


def _other_ranks(state: Mapping[str, Any], config: RunConfig, runtime: RuntimeDevice) -> list[str]:
    """What another number of ranks or another engine changes, as lines to say."""
    engine = choose_engine(config, runtime).name
    if (state["world_size"], state["engine"]) == (runtime.world_size, engine):
        return []
    said = f"saved by {state['engine']}, going on with {engine}"
    if state["world_size"] != runtime.world_size:
        said = f"saved on {state['world_size']} ranks, going on on {runtime.world_size}"
    lines = [
        f"{said}: every step has the same samples, and their gradients are summed in another order, so numbers agree "
        "up to rounding"
    ]
    if config.method.uses_adapters and config.method.lora.dropout > 0:
        lines.append("dropout draws other numbers than it would have on the same ranks")
    return lines


def reopen_run_folder(config: RunConfig, point: ResumePoint) -> None:
    """Bring the run folder back to what it was when the checkpoint was saved; called on rank 0."""
    run_folder = Path(config.training.output_dir)
    for folder in checkpoints(run_folder):
        if step_of(folder) > point.step:
            shutil.rmtree(folder)  # of steps that are taken again
    for name in _OF_THE_END:
        path = run_folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if (point.folder / "metrics.jsonl").is_file():
        shutil.copyfile(point.folder / "metrics.jsonl", run_folder / "metrics.jsonl")
    else:
        (run_folder / "metrics.jsonl").unlink(missing_ok=True)
    if (point.folder / "best").is_dir():
        link_tree(point.folder / "best", run_folder / "best")
    else:
        shutil.rmtree(run_folder / "best", ignore_errors=True)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration as dotted keys, in the types that JSON gives back."""
    values: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(tree)).items() if not prefix else tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values
