"""What is in a checkpoint folder, read without loading it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from phi3v.errors import UserError
from phi3v.json_files import read_json

EMBEDDING = "model.embed_tokens.weight"
SAMPLE = 64 * 1024
SECOND_EMBEDDING = "model.vision_embed_tokens.wte.weight"


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder of safetensors, single or sharded; empty where there are none.

    Raises:
        OSError, SafetensorError: a file that the index names is missing, or one is cut short.
        UserError: the index is no index.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            what = "does not say in which file each tensor is (weight_map)"
            raise UserError(what, where=str(index), hint="copy or download it again")
        files = sorted(set(weight_map.values()))
    else:
        files = [name for name in ("model.safetensors",) if (folder / name).is_file()]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in files:
        with safe_open(folder / name, framework="pt") as weights:
            shapes |= {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    return shapes


def stored_tensors(folder: Path, names: Collection[str] | None = None) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """The tensors in the safetensors files of a folder, read one at a time, each after its file and its name.

    Args:
        names: only these; default: all.

    Raises:
        OSError, SafetensorError: a file cannot be read, or is cut short.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in sorted(weights.keys()):
                if names is None or name in names:
                    yield path, name, weights.get_tensor(name)


def embedding_key_mapping(folder: Path) -> dict[str, str] | None:
    """A renaming for checkpoints that kept the embeddings under their second name only.

    Tools that drop one of two names of a shared tensor at saving may have kept either.
    """
    keys = checkpoint_shapes(folder)
    if SECOND_EMBEDDING in keys and EMBEDDING not in keys:
        return {r"^model\.vision_embed_tokens\.wte\.weight": EMBEDDING}
    return None


def model_content(name: str) -> str:
    """A hash that tells models apart: of a folder's configuration and of samples of its weights; of a hub id, that.

    Samples, since reading all would take as long as loading: 64 KiB from 512 places of each file.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(SAMPLE, size // 512)):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def make_weights_readable(folder: Path) -> None:
    """Give weight files the permissions of any new file; safetensors writes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)
