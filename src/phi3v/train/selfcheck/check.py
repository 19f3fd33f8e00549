"""Which fast paths a run may use on the device that it meets: what is known, else looked at, and said."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from phi3v.config import RunConfig
from phi3v.data.cache import cache_root, recall, remember
from phi3v.errors import StoppedError, UserError
from phi3v.findings import Finding
from phi3v.train.collectives import HostCollectives
from phi3v.train.compute.fast_paths import FastPaths
from phi3v.train.device import ROUNDING, RuntimeDevice, library_versions
from phi3v.train.methods.loading import ModelFacts
from phi3v.train.selfcheck.examine import CheckCase, examine, in_short
from phi3v.train.selfcheck.process import examine_apart
from phi3v.train.selfcheck.verdict import Verdict

KERNEL_LIBRARIES = ("triton", "flash_attn", "liger-kernel", "torchao", "deepspeed")
VERSION = 1  # of what is compared: raise it whenever the same kernels would be judged otherwise
HINT = "--training.self_check always looks again, off uses everything unchecked"
# What has no plain way that keeps to what the recipe asks for: the memory that it plans with, or its arithmetic.
INSTEAD = {
    "precision": ("training.precision", "set it to fp32, or bf16 in place of fp16"),
    "optimizer": ("training.optimizer", "use adamw"),
    "four_bit": ("method.name", "use lora"),
}


@dataclass(frozen=True)
class SelfCheck:
    """What was found, the same on all ranks.

    Attributes:
        paths: to be used.
        device: the kinds of devices that were looked at; empty if none was.
        verdicts: on each path that was looked at, in the order of the examination.
        was_known: nothing was looked at now.
    """

    paths: FastPaths
    device: str = ""
    verdicts: tuple[Verdict, ...] = ()
    was_known: bool = False
    seconds: float = 0.0

    @property
    def line(self) -> str | None:
        """What passed, in one line; None if nothing was looked at."""
        passed = [verdict for verdict in self.verdicts if verdict.state == "passed"]
        if not passed:
            return None
        worst = max(passed, key=lambda verdict: (verdict.off or 0.0) / (verdict.allowed or 1.0))
        when = "known from before" if self.was_known else f"{self.seconds:.1f} s"
        names = ", ".join(verdict.label for verdict in passed)
        return f"{names} agree with the plain path ({when}); furthest, {worst}"

    @property
    def unfit(self) -> set[Any]:
        """Policies of recomputing that are not to be chosen."""
        return {each.value for each in self.verdicts if (each.path, each.state) == ("checkpointing", "failed")}

    @property
    def findings(self) -> list[Finding]:
        """What is not as the recipe asks for, or not known to be right."""
        said = []
        for verdict in self.verdicts:
            if verdict.state == "failed":
                used = getattr(self.paths, verdict.path, None)
                without = verdict.label if used == "auto" else verdict.path
                plain = f"without {without}" if used in (False, "auto") else f"with {used}"
                what = f"on {self.device}, {verdict}; the run goes on {plain}"
                said.append(Finding("self-check", "warn", what, HINT))
            elif verdict.state == "unchecked":
                what = f"{verdict.label} could not be checked on {self.device}: {verdict.what}"
                said.append(Finding("self-check", "warn", what, HINT))
        return said

    def to_json_dict(self) -> dict[str, Any]:
        """For ``environment.json``; empty if nothing was looked at."""
        if not self.verdicts:
            return {}
        verdicts = {verdict.label: f"{verdict.state}: {verdict}" for verdict in self.verdicts}
        return {"device": self.device, "used": asdict(self.paths), "verdicts": verdicts, "seconds": self.seconds}


def self_check(
    config: RunConfig,
    facts: ModelFacts,
    runtime: RuntimeDevice,
    collectives: HostCollectives,
    make_row: Callable[[], Mapping[str, Any]],
    say: Callable[[str], None] = lambda line: None,
) -> SelfCheck:
    """The fast paths that a run may use; all ranks decide alike. A collective.

    The first rank of each kind of device and versions looks, unless its machine knows already. It changes no random
    state and no weights of the run. On the CPU it looks only if ``training.self_check`` is ``always``.

    Args:
        make_row: of the run's data, see `small_row`.
        say: told before it takes time.

    Raises:
        UserError: what the recipe asks for computes wrong numbers there, and nothing else does what it asks for.
    """
    asked = FastPaths.of(config, facts.attention)
    wanted = config.training.self_check
    looks = wanted == "always" or (wanted == "auto" and runtime.device.type != "cpu")
    if not looks or not runtime.gpu.is_here:  # a device of the planner's cannot be looked at
        return SelfCheck(asked)
    identity = device_identity(runtime)
    kinds = collectives.all_gather(json.dumps(identity, sort_keys=True))
    found: tuple[list[Verdict], bool, float] | None = None
    if kinds.index(kinds[runtime.rank]) == runtime.rank:
        found = _look(config, facts, runtime, asked, identity, make_row, say)
    every = [each for each in collectives.all_gather(found) if each is not None]
    names = list(dict.fromkeys(json.loads(kind)["device"] for kind in kinds))
    verdicts = _strictest([each[0] for each in every])
    checked = SelfCheck(
        _settled(asked, verdicts),
        " and ".join(names),
        verdicts,
        all(each[1] for each in every),
        round(max(each[2] for each in every), 1),
    )
    for verdict in verdicts:
        if verdict.state == "failed" and verdict.path in INSTEAD:
            where, hint = INSTEAD[verdict.path]
            raise UserError(f"on {checked.device}, {verdict}", where=where, hint=f"{hint}; {HINT}")
    return checked


def _look(
    config: RunConfig,
    facts: ModelFacts,
    runtime: RuntimeDevice,
    asked: FastPaths,
    identity: dict[str, Any],
    make_row: Callable[[], Mapping[str, Any]],
    say: Callable[[str], None],
) -> tuple[list[Verdict], bool, float]:
    """Verdicts, whether they were known, and the seconds that it took."""
    start = time.monotonic()
    try:
        row = make_row()
    except StoppedError:
        raise
    except Exception as error:  # the other ranks wait for an answer, and the run can do without
        return [_unchecked(runtime, error)], False, 0.0
    file = cache_root() / "self_check" / f"{_key(config, facts, runtime, asked, identity, row)}.json"
    if config.training.self_check != "always":
        known = _recalled(file)
        if known:
            return known, True, 0.0
    say(f"checking on {identity['device']}, once: {', '.join(asked.alternatives())}")
    try:
        case = CheckCase(config, facts.skeleton.config, facts.stored_dtype, runtime, asked, row)
        found = examine_apart(case) if runtime.device.type == "cuda" else examine(case)
        verdicts = [verdict for verdict in found if verdict.state != "trying"]
    except StoppedError:
        raise
    except Exception as error:  # as above
        verdicts = [_unchecked(runtime, error)]
    if verdicts and all(verdict.state != "unchecked" for verdict in verdicts):
        with contextlib.suppress(UserError, OSError):  # the next run looks again
            file.parent.mkdir(parents=True, exist_ok=True)
            remember(file, {"verdicts": [asdict(verdict) for verdict in verdicts], "identity": identity})
    return verdicts, False, time.monotonic() - start


def _unchecked(runtime: RuntimeDevice, error: Exception) -> Verdict:
    return Verdict("precision", runtime.precision, "unchecked", in_short(error))


def _recalled(file: Path) -> list[Verdict]:
    """The verdicts in a file; none if it is damaged."""
    try:
        return [Verdict.of_json(values) for values in recall(file)["verdicts"]]
    except (KeyError, TypeError):
        return []


def _strictest(every: list[list[Verdict]]) -> tuple[Verdict, ...]:
    """One verdict a path and value, that of the device which does worst."""
    order = ("failed", "unchecked", "passed")
    worst: dict[tuple[str, Any], Verdict] = {}
    for verdict in (verdict for verdicts in every for verdict in verdicts):
        known = worst.setdefault((verdict.path, verdict.value), verdict)
        if order.index(verdict.state) < order.index(known.state):
            worst[verdict.path, verdict.value] = verdict
    return tuple(worst.values())


def _settled(asked: FastPaths, verdicts: tuple[Verdict, ...]) -> FastPaths:
    """Of each path the first value that did not fail; the plain one is not looked at."""
    failed = {(verdict.path, verdict.value) for verdict in verdicts if verdict.state == "failed"}
    chosen: dict[str, Any] = {
        name: next(value for value in values if (name, value) not in failed)
        for name, values in asked.alternatives().items()
        if (name, asked.checkpointing) != ("checkpointing", "auto")
    }
    return replace(asked, **chosen)


def device_identity(runtime: RuntimeDevice) -> dict[str, Any]:
    """All that kernels depend on beside what they are given: the card, its driver, the libraries."""
    versions = dict(library_versions())
    for name in KERNEL_LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    identity: dict[str, Any] = {"device": runtime.gpu.name, "versions": versions, "cuda": torch.version.cuda}
    identity["environment"] = {name: os.environ.get(name) for name in (*ROUNDING, "TRITON_INTERPRET")}
    if runtime.device.type == "cuda":
        identity["capability"] = torch.cuda.get_device_capability(runtime.device)
        identity["hip"], identity["cudnn"] = torch.version.hip, torch.backends.cudnn.version()
        identity["driver"] = _driver()
    return identity


def _driver() -> str:
    """The version of the GPU's driver, as the system tells it; empty if it does not."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(file).read_text(encoding="utf-8", errors="replace").splitlines()[0]
    return ""


def _key(
    config: RunConfig,
    facts: ModelFacts,
    runtime: RuntimeDevice,
    asked: FastPaths,
    identity: dict[str, Any],
    row: Mapping[str, Any],
) -> str:
    """A name for all that a verdict depends on; of the data, what kind of row it gives, and of the weights nothing."""
    model = facts.skeleton.config
    shape = {
        name: getattr(model, name)
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    }
    training = config.training
    depends = {
        "version": VERSION,
        "identity": identity,
        "shape": shape | {"tower": model.clip_vision_config, "stored": str(facts.stored_dtype)},
        "precision": runtime.precision,
        "paths": asdict(asked),
        "method": asdict(config.method),
        "packing": config.data.packing,
        # Without images no tower is looked at; alone nothing can be seen of others; a group may have branches.
        "row": [sorted(row), len(row.get("lengths", ())), [len(group) > 2 for group in row.get("layout", ())]],
        "objective": asdict(config.objective),
        "optimizer": [training.optimizer, training.lean, training.loss_weighting],
    }
    return hashlib.blake2b(json.dumps(depends, sort_keys=True).encode(), digest_size=16).hexdigest()
