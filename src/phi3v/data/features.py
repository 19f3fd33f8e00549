"""What a frozen vision part made of each image, kept in memory or on the disk.

On the disk there is one file an image, named by the content of its file, in a folder named by all settings that the
features depend on. Any of it may be deleted between runs; what is missing is computed again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from phi3v.data.cache import cannot_write
from phi3v.data.image_store import ImageStore
from phi3v.data.jsonl import replacing
from phi3v.errors import UserError


class FeatureStore:
    """Features of images by the names that a data file gives them.

    Args:
        images: that are named.
        folder: where features are kept; in memory without one.
    """

    def __init__(self, images: ImageStore, folder: Path | None = None) -> None:
        self.images = images
        self.folder = folder
        self._keys: dict[str, str] = {}
        self._in_memory: dict[str, torch.Tensor] = {}

    def __contains__(self, name: str) -> bool:
        key = self._key(name)
        return key in self._in_memory if self.folder is None else self._file(key).is_file()

    def put(self, name: str, features: torch.Tensor) -> None:
        """Keep the features of an image; a file appears whole or not at all."""
        key, features = self._key(name), features.detach().cpu().contiguous()
        if self.folder is None:
            self._in_memory[key] = features
            return
        file = self._file(key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary:
                save_file({"features": features}, temporary)
        except OSError as error:
            raise cannot_write(file.parent, error) from None
        except SafetensorError as error:
            raise cannot_write(file.parent, OSError(str(error))) from None

    def get(self, name: str) -> torch.Tensor:
        """The features of an image.

        Raises:
            UserError: the file vanished or is damaged.
        """
        key = self._key(name)
        if self.folder is None:
            return self._in_memory[key]
        try:
            with safe_open(self._file(key), framework="pt") as file:
                return file.get_tensor("features")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the features of {name} cannot be read: {error}",
                where=str(self._file(key)),
                hint="delete the folder and start again; nothing else is lost",
            ) from None

    def _key(self, name: str) -> str:
        if name not in self._keys:
            self._keys[name] = self.images.sha256(name)
        return self._keys[name]

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"
