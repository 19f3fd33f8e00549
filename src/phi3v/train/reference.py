"""Log-probabilities of all answers by the reference model, computed once before training.

The reference is the model that training begins with: under adapters that do nothing yet, the base as it is loaded. So
it is at hand before the first step and never again, and no second model is held. The values are kept in the run folder,
with all that they depend on, and saved as they come: a run that ends meanwhile goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from phi3v.data.batches import RowPlan, Step
from phi3v.data.features import FeatureStore
from phi3v.data.jsonl import replacing
from phi3v.data.readers import Readers
from phi3v.data.table import RecordTable
from phi3v.errors import UserError
from phi3v.terminal import progress_bar, say
from phi3v.train.compute.feature_cache import computing
from phi3v.train.objectives import PreferenceObjective
from phi3v.train.open_data import each_once
from phi3v.train.prepare import PreparedRun

FILE = "reference.safetensors"
CHUNK = 64  # records that a rank computes before all tell each other
SAVE_SECONDS = 30.0

Values = npt.NDArray[np.float32]


def reference_log_probs(run: PreparedRun, features: FeatureStore | None = None) -> torch.Tensor:
    """The log-probability of every answer of the training data, float32, as `Preferences` counts them; a collective.

    Answers of records that cannot be read, where these are left out, are NaN.

    Raises:
        UserError: a record cannot be read, or the file cannot be written.
    """
    dataset = run.dataset(features)
    assert dataset.preferences is not None
    starts = dataset.preferences.starts
    key = json.dumps(_facts(run), sort_keys=True)
    file, first = run.folder / FILE, run.runtime.rank == 0
    values: Values = run.collectives.run_on_first(run.runtime.rank, lambda: _read(file, key, starts[-1]))
    rounds = list(_rounds(run, np.isnan(values), starts))
    if not rounds:
        say(run.console, f"reference: log-probabilities of {starts[-1]:,} answers, read from {FILE}")
        return torch.from_numpy(values)
    known = starts[-1] - int(np.isnan(values).sum())
    before = f", {known:,} of them known" if known else ""
    say(run.console, f"reference: computing the log-probabilities of {starts[-1]:,} answers{before}")
    own = [step[run.runtime.rank] for step in rounds]
    plans = [RowPlan(row, ends_step=row is rows[-1]) for rows in own for row in rows]
    run.train_table.expect([index for plan in plans for group in plan.row for index in group])
    readers = Readers(dataset.__getitem__, run.num_workers, timeout=60 * run.config.distributed.timeout_minutes)
    saved = time.monotonic()
    was_training = run.model.training
    run.model.eval()
    bar = progress_bar(run.console, enabled=run.config.training.progress_bar)
    with bar, readers, computing(run.model, run.runtime):
        task = bar.add_task("reference", total=starts[-1], completed=known, extra="")
        rows = readers.read(plans)
        for work in own:
            found, wrong = [], None
            try:
                found = [_compute(run, next(rows)) for _ in work]
            except UserError as error:
                wrong = (error.what, error.where, error.hint)
            everywhere = run.collectives.all_gather((found, wrong))
            for pieces, _ in everywhere:
                for places, log_probs in pieces:
                    values[list(places)] = log_probs
            is_due = time.monotonic() - saved > SAVE_SECONDS or work is own[-1]
            failed = next((wrong for _, wrong in everywhere if wrong is not None), None)
            if first and (is_due or failed is not None):
                _write(file, key, values)
                saved = time.monotonic()
            if failed is not None:
                raise UserError(failed[0], where=failed[1], hint=failed[2])
            bar.update(task, completed=int((~np.isnan(values)).sum()))
    run.model.train(was_training)
    return torch.from_numpy(values)


def _facts(run: PreparedRun) -> dict[str, Any]:
    """All that the values depend on."""
    config = run.config
    return {
        "model": run.contents["model"],
        "data": run.contents["train"],
        "images": _digest(_file_sizes(run.train_table)),
        "tokenizer": _digest(run.processor.backend_tokenizer.to_str()),
        "special_text": config.data.special_text,
        "exif_orientation": config.data.exif_orientation,
        "num_crops": run.processor.image_processor.num_crops,
        "mismatched": config.objective.name == "kto",
        "precision": run.runtime.precision,
        "dtypes": sorted({str(parameter.dtype) for parameter in run.model.parameters()}),
        "fp8": run.checked.paths.fp8,
        "four_bits": [config.method.lora.double_quant] if config.method.name == "qlora" else None,
    }


def _file_sizes(table: RecordTable) -> str:
    """The sizes of the image files, which tell whether one was replaced; a copy of the folder has the same."""
    names, _ = table.distinct_images()
    return json.dumps(table.images.stamps(names)[:, 0].tolist())


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _rounds(run: PreparedRun, missing: npt.NDArray[np.bool_], starts: list[int]) -> Iterator[Step]:
    """The rows of each rank, round by round; those whose answers are all known are left out.

    They are the same on any number of ranks. Each rank has a stretch of them, which goes through shards of its own.
    """
    order = each_once(run.train_table)
    plan = replace(run.plan, batch_size=CHUNK, batch_tokens=None, world_size=1, seed=0, order=order)
    steps = [
        rows
        for (rows,) in plan.steps(0)
        if any(missing[starts[index] : starts[index + 1]].any() for row in rows for group in row for index in group)
    ]
    ranks = run.runtime.world_size
    ends = [len(steps) * rank // ranks for rank in range(ranks + 1)]
    for step in zip_longest(*(steps[start:end] for start, end in pairwise(ends))):
        yield [rows or [] for rows in step]


def _compute(run: PreparedRun, row: dict[str, Any]) -> tuple[tuple[int, ...], list[float]]:
    """The places and the log-probabilities of a row's answers."""
    objective = run.objective
    assert isinstance(objective, PreferenceObjective)
    inputs = {
        name: value.to(run.runtime.device) if isinstance(value, torch.Tensor) else value
        for name, value in row.items()
        if name not in ("counts", "ends_step")
    }
    answers = objective.answers(lambda inputs: run.model(**inputs), inputs, at_start=True)
    return row["answer_places"], answers.log_probs.tolist()


def _read(file: Path, key: str, count: int) -> Values:
    """What was computed before, NaN where nothing was."""
    try:
        with safe_open(file, framework="np") as opened:
            if (opened.metadata() or {}).get("key") == key and len(values := opened.get_tensor("log_probs")) == count:
                return np.array(values, dtype=np.float32)
    except (OSError, SafetensorError):
        pass  # there is none, or it is damaged
    return np.full(count, np.nan, dtype=np.float32)


def _write(file: Path, key: str, values: Values) -> None:
    try:
        with replacing(file) as temporary:
            save_file({"log_probs": torch.from_numpy(values)}, temporary, metadata={"key": key})
    except (OSError, SafetensorError) as error:
        hint = "make room, or choose another training.output_dir"
        raise UserError(f"cannot be written: {error}", where=str(file), hint=hint) from None
