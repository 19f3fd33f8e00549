"""Making an export: find what was tuned, merge it, write it, prove it, and only then give it its name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from transformers.utils import cached_file

from phi3v.config import torch_dtype
from phi3v.errors import UserError
from phi3v.export.card import ExportResult, write_export_card
from phi3v.export.proof import (
    TOLERANCE,
    Answers,
    Comparison,
    Probe,
    answer_in_fresh_process,
    answer_probes,
    compare,
    make_probes,
)
from phi3v.export.push import require_hub_base
from phi3v.json_files import read_json
from phi3v.model.checkpoint import make_weights_readable
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.quantised import quantisation_of
from phi3v.paths import absolute, find_model, free_space, is_hub_id, is_out_of_room, require_writable
from phi3v.processing.conversation import stop_token_ids
from phi3v.processing.processor import Phi3VProcessor
from phi3v.processing.tokenizer import ADDITIONAL_SPECIAL_TOKENS, TOKENIZER_CONFIG
from phi3v.terminal import say
from phi3v.train.card import score_table
from phi3v.train.device import RuntimeDevice, choose_device
from phi3v.train.finetuned import FinetunedModel, load_tuned, resolve_model
from phi3v.train.methods.loading import load_weights
from phi3v.train.methods.weights import set_end_tokens, write_manifest


class ExportDiffersError(RuntimeError):
    """An export does not answer as what it was made from; nothing was left under its name."""


def export(
    name: str,
    out: Path,
    console: Console,
    *,
    dtype: str | None = None,
    adapter: bool = False,
    base: str | None = None,
    base_id: str | None = None,
    max_shard_size: str = "5GB",
    samples: int = 4,
    overwrite: bool = False,
    for_hub: bool = False,
) -> ExportResult:
    """Write a tuned model to ``out``, proven against the model as it was tuned.

    Args:
        name: a run, its ``best`` or ``final``, a checkpoint, an adapter, or a model.
        dtype: of the weights; default: that of the model which was tuned.
        adapter: write the adapter alone.
        base: the model that it was tuned from, where that has moved.
        base_id: its name on the hub, for the card and for an adapter's configuration.
        samples: prompts to compare with.
        overwrite: replace a folder.
        for_hub: it is to be uploaded, so an adapter needs a base model that is there.

    Raises:
        UserError: there is nothing to export, ``out`` is taken, or the disk is full.
        ExportDiffersError: the result does not answer as it should.
    """
    tuned = resolve_model(name, base)
    require_float(tuned)
    if adapter and tuned.adapter is None:
        raise UserError("is a whole model, not an adapter", where=name, hint="leave --adapter out")
    if adapter and dtype is not None:
        raise UserError("an adapter stays as it was trained", where="--dtype", hint="leave it out")
    require_base_id(base_id)
    if adapter and for_hub:
        require_hub_base(base_id or tuned.base)
    out = absolute(out)
    check_out(out, tuned, overwrite)
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(str(error), where=f"--max-shard-size {max_shard_size}", hint="e.g. 5GB") from None
    score_table(tuned)  # found damaged now, not when all is done
    wanted = torch_dtype(dtype) if dtype else _stored_dtype(tuned)
    room = _bytes_needed(tuned, None if adapter else wanted)
    if free_space(out.parent) < room * 1.05:
        raise no_room(out, room, "there is no room")
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        until_the_disk_is_full(out, room),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as made,
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as exchanged,
    ):
        folder, work = Path(made) / out.name, Path(exchanged)
        probes, source = make_probes(tuned, samples, work)
        say(console, f"comparing {len(probes)} prompts from {source}")
        written = _write(tuned, folder, probes, choose_device("fp32"), None if adapter else wanted, max_shard_size)
        theirs = answer_in_fresh_process(folder, probes, work)
        result = ExportResult(
            folder=out,
            source=name,
            method=tuned.run.method.name if tuned.run_folder is not None else "unknown",
            dtype=str(wanted).removeprefix("torch."),
            is_adapter=adapter,
            parameters=written.parameters,
            merge=written.merge,
            files=compare(written.exported, theirs),
            tuned=compare(written.tuned, theirs),
            probes=source,
        )
        _require_same(result)
        if base_id is not None and adapter:
            _name_base(folder, base_id)  # now that a fresh process has found it where it is
        write_export_card(folder, result, tuned, base_id)
        write_manifest(folder, tuned_from=tuned.origin)
        if out.exists():
            out.rename(Path(made) / "old")
        folder.rename(out)
    result.render(console)
    return result


def require_base_id(base_id: str | None) -> None:
    """Raise a `UserError` for what cannot be a model's name on the hub."""
    if base_id is not None and not is_hub_id(base_id):
        raise UserError("is no model's name on the hub", where=f"--base-id {base_id}", hint="OWNER/NAME")


def require_float(tuned: FinetunedModel) -> None:
    """Raise a `UserError` for what has been quantised already."""
    if tuned.graphs is not None:
        raise UserError(
            f"holds graphs of a model ({tuned.graphs}), from which no other format can be made",
            where=tuned.base,
            hint="export the run again, or the float model",
        )
    stored = quantisation_of(Phi3VConfig.from_pretrained(tuned.base), tuned.base)
    if stored is not None:
        raise UserError(
            f"its weights are quantised ({stored.name}), and what rounding took cannot be had again",
            where=tuned.base,
            hint="export the run again, or the float model",
        )


@dataclass
class _Written:
    """What is kept for the comparison: answers, not models, so that one model fits the memory.

    Attributes:
        tuned: of the model as it was tuned.
        exported: of the weights that were written, in float32.
        merge: merged against unmerged weights; none without an adapter that was merged.
    """

    tuned: Answers
    exported: Answers
    merge: Comparison | None
    parameters: int


def _write(
    tuned: FinetunedModel,
    folder: Path,
    probes: Sequence[Probe],
    runtime: RuntimeDevice,
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> _Written:
    """Write the folder: without ``dtype`` the adapter, else a whole model."""
    model, processor = load_tuned(tuned, runtime)
    if tuned.adapter is None:
        model = model.float()
    answers = exported = answer_probes(model, processor, probes)
    if tuned.adapter is not None and tuned.is_quantised:
        del model
        model = load_weights(tuned.base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(tuned.adapter)).eval().to(runtime.device)
        exported = answer_probes(model, processor, probes)
    merge = None
    if dtype is None:
        model.peft_config["default"].base_model_name_or_path = tuned.base
        model.save_pretrained(folder, save_embedding_layers=False)
        trained = {name: p for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name}
        parameters = sum(parameter.numel() for parameter in trained.values())
    else:
        if tuned.adapter is not None:
            model = _merge(model)
            merge = compare(exported, answer_probes(model, processor, probes))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        model = model.to(dtype)
        model.config.dtype = dtype
        set_end_tokens(model, processor)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        _copy_remote_code(tuned, folder)
        exported = answer_probes(model.float(), processor, probes)
    make_weights_readable(folder)
    processor.save_pretrained(folder)
    name_special_tokens(folder / TOKENIZER_CONFIG)
    return _Written(answers, exported, merge, parameters)


def _name_base(folder: Path, base_id: str) -> None:
    """Let an adapter go on the base model of this name."""
    path = folder / "adapter_config.json"
    fields = read_json(path) | {"base_model_name_or_path": base_id}
    path.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")


def name_end_tokens(folder: Path) -> None:
    """Let answers end at the tokens that end them, which the published ``generation_config.json`` lacks."""
    file = folder / "generation_config.json"
    fields = read_json(file) if file.is_file() else {}
    known = fields.get("eos_token_id")
    known = known if isinstance(known, list) else [known] if known is not None else []
    stops = stop_token_ids(Phi3VProcessor.from_pretrained(folder).backend_tokenizer)
    if not set(stops) <= set(known):
        ends = [*stops, *(token for token in known if token not in stops)]
        file.write_text(json.dumps(fields | {"eos_token_id": ends}, indent=2) + "\n", encoding="utf-8")


def name_special_tokens(file: Path) -> None:
    """Add what vLLM needs to read a prompt as we do, where it is missing; the official file has it."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    if not fields.get("additional_special_tokens"):
        fields["additional_special_tokens"] = ADDITIONAL_SPECIAL_TOKENS
        file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _merge(model: Any) -> Any:
    """The adapter's weights added to the base's."""
    return model.merge_and_unload(safe_merge=True)


def _copy_remote_code(tuned: FinetunedModel, folder: Path) -> None:
    """Copy the official code that ``auto_map`` names, or let it name the hub's."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base = tuned.run.model.path if tuned.adapter is None else tuned.base
    entries = map(str, fields.get("auto_map", {}).values())
    for module in sorted({entry.split(".")[0] for entry in entries if "--" not in entry}):
        found = _source_file(base, f"{module}.py") or _source_file(tuned.base, f"{module}.py")
        if found is not None:
            shutil.copyfile(found, folder / f"{module}.py")


def _source_file(model: str, name: str) -> Path | None:
    """A file of a model folder, or of a hub model that was downloaded; nothing is fetched."""
    if Path(model).is_dir():
        return Path(model) / name if (Path(model) / name).is_file() else None
    if not is_hub_id(model):
        return None
    try:
        found = cached_file(model, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def _stored_dtype(tuned: FinetunedModel) -> torch.dtype:
    """Of the model that was tuned; a checkpoint's own is the one it trains in."""
    source = tuned.base
    if tuned.is_checkpoint and tuned.adapter is None:
        hint = "name it with --model, or the dtype of the export with --dtype"
        source = find_model(tuned.run.model.path, f"{tuned.run.model.path}, which was tuned", hint=hint)
    dtype = Phi3VConfig.from_pretrained(source).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def check_out(out: Path, tuned: FinetunedModel, overwrite: bool) -> None:
    """Look whether ``out`` may be made or replaced, before anything is loaded."""
    where, hint = f"--out {out}", "choose another folder"
    sources = [tuned.run_folder, tuned.adapter, Path(tuned.base)]
    folders = [path.resolve() for path in sources if path is not None and path.is_dir()]
    used = [*folders, *(Path(path).resolve() for _, path in tuned.run.data.paths)]
    used += [Path(tuned.run.model.path).resolve()] if os.path.isdir(tuned.run.model.path) else []
    target = out.resolve()
    for path in used:
        if path.is_relative_to(target):
            raise UserError(f"is or holds what the export is made from ({path})", where=where, hint=hint)
    for path in folders:
        if target.is_relative_to(path):
            raise UserError(f"lies inside {path}, which the export is made from", where=where, hint=hint)
    if os.path.lexists(out):
        if not out.is_dir():
            raise UserError("is a file, or a link to nothing", where=where, hint="choose another name")
        if os.path.ismount(out):
            raise UserError("is a mount point, which cannot be renamed", where=where, hint=f"name {out / 'model'}")
        if any(out.iterdir()) and not overwrite:
            raise UserError("is not empty", where=where, hint="choose another folder, or add --overwrite")
    require_writable(out.parent, where, hint)


def _bytes_needed(tuned: FinetunedModel, dtype: torch.dtype | None) -> int:
    """Of the weights; without ``dtype`` of the adapter's files."""
    if dtype is None:
        return sum(path.stat().st_size for path in (tuned.adapter or Path(tuned.base)).iterdir() if path.is_file())
    with torch.device("meta"):
        skeleton = Phi3VForCausalLM(Phi3VConfig.from_pretrained(tuned.base))
    return sum(parameter.numel() for parameter in skeleton.parameters()) * dtype.itemsize


@contextmanager
def until_the_disk_is_full(out: Path, needed: int) -> Iterator[None]:
    """What fills the disk meanwhile (another program, a quota that `free_space` does not see) is no fault of ours."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_out_of_room(error):
            raise
        raise no_room(out, needed, str(error)) from None


def no_room(out: Path, needed: int, why: str) -> UserError:
    return UserError(
        f"{why}: the export takes {needed / 1e6:,.1f} MB, and {free_space(out.parent) / 1e6:,.1f} MB are free",
        where=str(out.parent),
        hint="make room, or export to another disk with --out",
    )


def _require_same(result: ExportResult) -> None:
    for what, found in (("the merged weights", result.merge), ("the files", result.files)):
        if found is not None and not found.same:
            raise ExportDiffersError(
                f"{what} do not answer as the tuned model does: {found}; {TOLERANCE:.0e} of the largest logit would be "
                f"the order of sums. Nothing was left in {result.folder}"
            )
