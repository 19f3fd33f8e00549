"""The files of a format's folder: what stays as it is, and weights written as they are made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from phi3v.json_files import read_json
from phi3v.model.checkpoint import make_weights_readable

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# Beside the weights; other files of a folder may be anything, and an export may be uploaded.
COPIED = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "*_phi3_v.py",  # the official code, which config.json may name
)


def copy_other_files(model: Path, folder: Path) -> None:
    """Copy the files of a model that its weights need beside them, byte for byte."""
    for path in sorted(model.iterdir()):
        if path.is_file() and any(path.match(pattern) for pattern in COPIED):
            shutil.copyfile(path, folder / path.name)


def add_to_config(folder: Path, fields: dict[str, Any]) -> None:
    """Add fields to the ``config.json`` of a folder; the others stay as they are, in their order."""
    path = folder / "config.json"
    path.write_text(json.dumps(read_json(path) | fields, indent=2) + "\n", encoding="utf-8")


class WeightFiles:
    """Safetensors files of at most ``SHARD_BYTES`` (a larger tensor has one of its own), written as they fill up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; it is not to be changed any more."""
        size = tensor.numel() * tensor.itemsize
        if self._pending and self._bytes + size > SHARD_BYTES:
            self._write()
        self._pending[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def _write(self) -> None:
        save_file(self._pending, self.folder / f"{len(self._shards)}.safetensors", {"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def close(self) -> None:
        """Write the rest, give the files their names, and say where each tensor is."""
        self._write()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            name = f"model-{index + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
            (self.folder / f"{index}.safetensors").rename(self.folder / name)
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            index_json = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index_json, indent=2) + "\n", encoding="utf-8")
        make_weights_readable(self.folder)
