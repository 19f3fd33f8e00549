"""Saving what was trained, and reading it back to see that all of it is there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from phi3v.model.checkpoint import make_weights_readable
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.run_folder import write_manifest


class IncompleteSaveError(RuntimeError):
    """A saved model lacks something that was trained."""


def round_to_stored_dtype(model: Any, dtype: torch.dtype) -> None:
    """Put a model that was trained in float32 back into the dtype of its checkpoint, in place.

    Done before it is measured again, so that the score belongs to the weights that were saved. Adapters stay float32.
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


def save_final(model: Any, processor: Phi3VProcessor, folder: Path) -> None:
    """Write the adapter or the model, its processor and a manifest to ``folder``, then verify them.

    Raises:
        IncompleteSaveError: a trained tensor is missing from the files or differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # An adapted head makes PEFT add the frozen embeddings and head to the adapter, which the base model has already.
    model.save_pretrained(folder, **({"save_embedding_layers": False} if isinstance(model, PeftModel) else {}))
    make_weights_readable(folder)
    processor.save_pretrained(folder)
    verify_saved(model, folder)
    write_manifest(folder)


def save_replacing(model: Any, processor: Phi3VProcessor, folder: Path) -> None:
    """As `save_final`, into a folder that may hold an earlier save: that one stays until the new one is verified.

    Raises:
        IncompleteSaveError: as `save_final`.
    """
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    save_final(model, processor, new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_trained(model: Any, folder: Path, *, rank: int, world_size: int) -> None:
    """Put the trained tensors of a save back into the model they came from, on every rank.

    Rank 0 reads; the others, whose disk may be another, get its tensors.

    Raises:
        IncompleteSaveError: the files lack a trained tensor.
    """
    trained = _trained_tensors(model)
    if rank == 0:
        missing = set(trained)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as weights:
                for name in missing & set(weights.keys()):
                    trained[name].copy_(weights.get_tensor(name))
                    missing = missing - {name}
        if missing:
            raise IncompleteSaveError(f"{folder}: {len(missing)} trained tensors are missing, first {min(missing)}")
    if world_size > 1:
        for name in sorted(trained):
            broadcast(trained[name], from_process=0)


def _trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What was trained, by the names it has in saved files; the tensors are the model's own."""
    if isinstance(model, PeftModel):
        return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def verify_saved(model: Any, folder: Path) -> int:
    """Compare every trained tensor with the files, bit by bit.

    Returns:
        How many tensors were compared.

    Raises:
        IncompleteSaveError: one is missing or differs.
    """
    expected = _trained_tensors(model)
    if isinstance(model, PeftModel):
        # The saved names carry no adapter name, so count tensors too: a trained one that PEFT does not save at all
        # (a base tensor unfrozen by hand) would otherwise go unnoticed.
        trained = sum(1 for parameter in model.parameters() if parameter.requires_grad)
        if len(expected) < trained:
            raise IncompleteSaveError(f"{trained} tensors were trained but the adapter holds {len(expected)}")
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                if name in expected:
                    found[name] = weights.get_tensor(name)
                    if not torch.equal(found[name], expected[name].to("cpu", found[name].dtype)):
                        raise IncompleteSaveError(f"{path}: {name} differs from what was trained")
                    found[name] = found[name].new_empty(0)  # only the name is needed from here
    missing = sorted(set(expected) - set(found))
    if missing:
        raise IncompleteSaveError(f"{folder}: {len(missing)} trained tensors were not saved, first {missing[0]}")
    return len(found)
