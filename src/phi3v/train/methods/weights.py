"""Saving what was trained, and reading it back to see that all of it is there."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError

from phi3v.errors import UserError
from phi3v.json_files import read_json
from phi3v.model.checkpoint import make_weights_readable, stored_tensors
from phi3v.paths import file_hash
from phi3v.processing.conversation import stop_token_ids
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.methods.pissa import as_difference, as_trained, difference_config, start_of

CARD_FILE = "README.md"
MANIFEST = "manifest.json"
# What the file system, safetensors and torch raise where a file cannot be written.
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


def failure_text(error: BaseException) -> str:
    """What went wrong while writing, without the traceback."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return " ".join(str(error).split())[:300]


class IncompleteSaveError(RuntimeError):
    """A saved model lacks something that was trained."""


def round_to_stored_dtype(model: Any, dtype: torch.dtype) -> None:
    """Put a model that was trained in float32 back into the dtype of its checkpoint, in place.

    Done before it is evaluated again, so that the score belongs to the weights that were saved. Adapters stay float32.
    """
    if not isinstance(model, PeftModel):
        model.to(dtype)


@contextlib.contextmanager
def in_stored_dtype(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """The model as `round_to_stored_dtype` would make it, for a while; afterwards it has the very weights it had."""
    if isinstance(model, PeftModel):
        yield
        return
    kept = [(p, p.data) for p in model.parameters() if p.is_floating_point() and p.dtype != dtype]
    try:
        for parameter, data in kept:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def save_final(model: Any, processor: Phi3VProcessor, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the adapter or the model, its processor and a manifest to ``folder``, then verify them.

    Args:
        model: the unwrapped model; only its configuration and the names of what it trains are used.
        tensors: as of `saved_tensors`, or what an engine's ``full_state_dict`` gave.

    Raises:
        IncompleteSaveError: a trained tensor is missing from the files or differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = as_difference(model, tensors)
    set_end_tokens(model, processor)
    with _config_of_what_is_saved(model):
        # An adapted head makes PEFT add the frozen embeddings and head to the adapter, which the base model has.
        more = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        model.save_pretrained(folder, state_dict=dict(tensors), **more)  # which it takes apart
    (folder / CARD_FILE).unlink(missing_ok=True)  # PEFT's card has the path of the base model
    make_weights_readable(folder)
    processor.save_pretrained(folder)
    verify_saved(model, folder, tensors)
    write_manifest(folder)


def save_description(model: Any, processor: Phi3VProcessor, folder: Path) -> None:
    """What `save_final` writes of a model that is not adapted, but the weights and the manifest."""
    set_end_tokens(model, processor)
    for part in (model.config, model.generation_config, processor):
        part.save_pretrained(folder)


def set_end_tokens(model: Any, processor: Phi3VProcessor) -> None:
    """Let ``generation_config.json`` end answers where the chat format does, beside what the source says."""
    config = model.generation_config
    known = config.eos_token_id
    known = known if isinstance(known, list) else [known] if known is not None else []
    ends = stop_token_ids(processor.backend_tokenizer)
    config.eos_token_id = [*ends, *(token for token in known if token not in ends)]
    config.pad_token_id = processor.tokenizer.pad_token_id


@contextlib.contextmanager
def _config_of_what_is_saved(model: Any) -> Iterator[None]:
    """An adapter's configuration as it is to be written."""
    if not start_of(model):
        yield
        return
    own = model.peft_config["default"]
    model.peft_config["default"] = difference_config(own)
    try:
        yield
    finally:
        model.peft_config["default"] = own


def save_replacing(model: Any, processor: Phi3VProcessor, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As `save_final`, into a folder that may hold an earlier save: that one stays until the new one is verified.

    Raises:
        IncompleteSaveError: as `save_final`.
    """
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        save_final(model, processor, new, tensors)
    except WRITE_ERRORS:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def saved_names(model: Any) -> dict[str, str]:
    """The name in ``model.state_dict()`` of each tensor that a save holds, by its name in the saved files."""
    names = {name: name for name in model.state_dict()}
    if isinstance(model, PeftModel):
        return dict(get_peft_model_state_dict(model, state_dict=names, save_embedding_layers=False))
    return names


def saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What a save holds of a model that is whole, by the names of its ``state_dict``; its own tensors."""
    state = model.state_dict()
    return {name: state[name] for name in saved_names(model).values()}


def trained_names(model: Any) -> dict[str, str]:
    """As `saved_names`, of what was trained; of an adapter that is all it holds.

    Raises:
        IncompleteSaveError: something is trained that the adapter would not hold.
    """
    names = saved_names(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lost = sorted(trained - set(names.values()))
    if lost:
        raise IncompleteSaveError(f"{len(lost)} trained tensors would not be saved, first {lost[0]}")
    if isinstance(model, PeftModel):
        return names
    return {saved: name for saved, name in names.items() if name in trained}


def read_trained(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The trained tensors of a save by the names they have in the model that was saved.

    Raises:
        IncompleteSaveError: the files lack a trained tensor.
    """
    names = trained_names(model)
    tensors = {names[name]: tensor for _, name, tensor in stored_tensors(folder, names)}
    missing = sorted(name for name, own in names.items() if own not in tensors)
    if missing:
        raise IncompleteSaveError(f"{folder}: {len(missing)} trained tensors are missing, first {missing[0]}")
    return as_trained(model, tensors)


def verify_saved(model: Any, folder: Path, tensors: dict[str, torch.Tensor]) -> int:
    """Compare every trained tensor with the files, bit by bit.

    Args:
        tensors: as of `save_final`.

    Returns:
        How many tensors were compared.

    Raises:
        IncompleteSaveError: one is missing or differs.
    """
    names = trained_names(model)
    found: set[str] = set()
    for path, name, saved in stored_tensors(folder, names):
        if not torch.equal(saved, tensors[names[name]].to("cpu", saved.dtype)):
            raise IncompleteSaveError(f"{path}: {name} differs from what was trained")
        found.add(name)
    missing = sorted(set(names) - found)
    if missing:
        raise IncompleteSaveError(f"{folder}: {len(missing)} trained tensors were not saved, first {missing[0]}")
    return len(found)


def write_manifest(folder: Path, *, tuned_from: str | None = None) -> None:
    """``manifest.json``: the SHA-256 of every file of a saved model, and which model it was tuned from.

    The card is left out: people edit it.
    """
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, CARD_FILE):
            hashes[path.relative_to(folder).as_posix()] = file_hash(path)
    facts = {"sha256": hashes} | ({"tuned_from": tuned_from} if tuned_from is not None else {})
    (folder / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_tuned_from(folder: Path) -> str | None:
    """Which model a saved one was tuned from, where its manifest says so."""
    try:
        found = read_json(folder / MANIFEST).get("tuned_from")
    except UserError:  # none, or none of ours
        return None
    return found if isinstance(found, str) else None
