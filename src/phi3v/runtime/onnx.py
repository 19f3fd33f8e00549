"""Running ONNX graphs by onnxruntime alone."""

from __future__ import annotations

import os
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phi3v.errors import UserError
from phi3v.json_files import read_json
from phi3v.runtime.pages import Floats, cut_page, image_statistics

VISION, EMBEDDINGS, DECODER = "vision.onnx", "embeddings.onnx", "decoder.onnx"
CONFIG = "genai_config.json"  # as onnxruntime-genai reads it
SPARE = 256  # tokens that the cache has room for beyond the prompt, at first


def import_onnxruntime() -> Any:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"needs ONNX Runtime ({error})", hint='pip install "phi3v[onnx]"') from None
    return onnxruntime


class OnnxGraphs:
    """The three graphs of a folder in a session each.

    Args:
        folder: as ``phi3v export --format onnx`` writes it.
        device: ``CPU``, or the start of another execution provider's name, such as ``CUDA`` or ``Dml``.
    """

    def __init__(self, folder: Path, device: str = "CPU") -> None:
        self._ort = import_onnxruntime()
        provider = f"{device}ExecutionProvider"
        if provider not in (available := self._ort.get_available_providers()):
            raise UserError(f"this onnxruntime has no {provider} but {', '.join(available)}", where=f"device {device}")
        self._place = ("cpu", 0) if device == "CPU" else (device.lower(), 0)
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))  # as torch does; 0: all cores
        try:
            self._vision, self._embeddings, self._decoder = (
                self._ort.InferenceSession(folder / name, options, providers=[provider])
                for name in (VISION, EMBEDDINGS, DECODER)
            )
        except Exception as error:  # the library has a dozen, without a base of their own
            what = f"a graph cannot be loaded: {str(error).strip().splitlines()[0][:300]}"
            raise UserError(what, where=str(folder), hint="copy all of the folder again, the .data files too") from None
        self._statistics = image_statistics(folder)
        model = read_json(folder / CONFIG)["model"]
        self._max_length, width = int(model["context_length"]), int(model["decoder"]["hidden_size"])
        self._no_features = np.zeros((0, width), np.float32)
        self._caches = [value for value in self._decoder.get_inputs() if value.name.startswith("past_key_values.")]
        self._binding = self._decoder.io_binding()
        self._length, self._room = 0, 0
        self._values: list[Any] = []

    def embed(self, input_ids: npt.NDArray[np.int64]) -> Floats:
        """Embeddings (tokens, H) of token ids (tokens,)."""
        feeds = {"input_ids": input_ids[None], "image_features": self._no_features}
        embeddings: Floats = self._embeddings.run(None, feeds)[0][0]
        return embeddings

    def encode(self, page: npt.NDArray[np.uint8]) -> Floats:
        """Features (tokens, H) of an image's page (height, width, 3)."""
        crops, rows, columns = cut_page(page, *self._statistics)
        if rows * columns == 1:  # the page and its global view; the graph sees that they are the same
            crops = np.concatenate([crops, crops])
        feeds = {"pixel_values": crops[None], "image_sizes": np.array([page.shape[:2]], np.int64)}
        features: Floats = self._vision.run(None, feeds)[0]
        return features

    def fork(self) -> OnnxGraphs:
        """The same graphs, with nothing read."""
        other = copy(self)
        other.drop_caches()
        return other

    def drop_caches(self) -> None:
        """Start with none."""
        self._length = self._room = 0
        self._values = []

    def reset(self) -> None:
        """Forget all that was read."""
        self._length = 0

    def read(self, embeddings: Floats) -> Floats:
        """Read more tokens (n, H) after those that were; the logits (V,) after the last of them.

        Raises:
            UserError: these are more tokens than the graphs have rotary tables for.
        """
        length = self._length + len(embeddings)
        if length > self._max_length:
            what = f"these graphs take {self._max_length:,} tokens, and there are {length:,}"
            raise UserError(what, hint="export again with a larger --max-length")
        if length > self._room:
            self._make_room(min(self._max_length, length + max(SPARE, length // 4)))
        # Bound by their address, so they have to outlive the run.
        inputs = {
            "inputs_embeds": np.ascontiguousarray(embeddings[None]),
            "attention_mask": np.ones((1, length), np.int64),
        }
        for name, value in inputs.items():
            self._binding.bind_cpu_input(name, value)
        self._decoder.run_with_iobinding(self._binding)
        self._length = length
        logits: Floats = self._binding.get_outputs()[0].numpy()
        return logits[0, -1].copy()  # the next run writes to the same memory

    def _make_room(self, room: int) -> None:
        """One buffer for each cache, which is its input and its output: the graph writes new keys behind the others."""
        values = []
        for index, cache in enumerate(self._caches):
            heads, size = cache.shape[1], cache.shape[3]
            buffer = np.zeros((1, heads, room, size), np.float32)
            if self._length:
                buffer[:, :, : self._length] = self._values[index].numpy()[:, :, : self._length]
            values.append(self._ort.OrtValue.ortvalue_from_numpy(buffer, *self._place))
        self._values, self._room = values, room
        self._binding = self._decoder.io_binding()
        self._binding.bind_output("logits")
        for cache, value in zip(self._caches, values, strict=True):
            self._binding.bind_ortvalue_input(cache.name, value)
            self._binding.bind_ortvalue_output(cache.name.replace("past_key_values", "present"), value)


def load(folder: Path, **settings: Any) -> OnnxGraphs:
    """The graphs of a folder; arguments as of `OnnxGraphs`."""
    return OnnxGraphs(folder, **settings)
