"""Running OpenVINO graphs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phi3v.errors import UserError
from phi3v.json_files import read_json
from phi3v.runtime.pages import Floats, cut_page, image_statistics, lay_out

# By the names that OpenVINO's own tools give the graphs of such a model.
TOWER = "openvino_vision_embeddings_model.xml"
PROJECTION = "openvino_vision_projection_model.xml"
EMBEDDINGS = "openvino_text_embeddings_model.xml"
DECODER = "openvino_language_model.xml"
CROPS_AT_ONCE = 8


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """For imports of OpenVINO and NNCF, which send that they are used, unless that was declined before."""
    name = "openvino_telemetry"
    kept = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment] # an import then fails, which both allow for
    try:
        yield
    finally:
        if kept is None:
            del sys.modules[name]
        else:
            sys.modules[name] = kept


def import_openvino() -> Any:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        with without_telemetry():
            import openvino
            import openvino.tools.ovc
    except ImportError as error:
        raise UserError(f"needs OpenVINO ({error})", hint='pip install "phi3v[openvino]"') from None
    return openvino


class OpenVinoGraphs:
    """The four graphs of a folder, compiled for a device.

    Args:
        folder: as ``phi3v export --format openvino`` writes it.
        device: of OpenVINO, ``CPU`` or ``GPU``.
        settings: of OpenVINO, over its most exact ones.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "CPU",
        settings: dict[str, Any] | None = None,
    ) -> None:
        core = import_openvino().Core()
        exact: dict[str, Any] = {"EXECUTION_MODE_HINT": "ACCURACY"}
        if device == "CPU":
            exact["KV_CACHE_PRECISION"] = "f32"
            if threads := int(os.environ.get("OMP_NUM_THREADS", 0)):  # as torch does; 0: all cores
                exact["INFERENCE_NUM_THREADS"] = threads
        self._statistics = image_statistics(folder)
        try:
            self._compiled = [
                core.compile_model(folder / name, device, exact | (settings or {}))
                for name in (TOWER, PROJECTION, EMBEDDINGS, DECODER)
            ]
        except RuntimeError as error:
            what = f"a graph cannot be loaded: {str(error).strip().splitlines()[-1][:300]}"
            raise UserError(what, where=str(folder), hint="copy all of the folder again, the .bin files too") from None
        self.make_requests()
        fields = read_json(folder / "config.json")
        self._row_end, self._separator = (np.array(fields[name], np.float32).ravel() for name in ("sub_GN", "glb_GN"))

    def embed(self, input_ids: npt.NDArray[np.int64]) -> Floats:
        """Embeddings (tokens, H) of token ids (tokens,)."""
        return _run(self._embeddings, {"input": input_ids[None]})[0]

    def encode(self, page: npt.NDArray[np.uint8]) -> Floats:
        """Features (tokens, H) of an image's page (height, width, 3)."""
        crops, rows, columns = cut_page(page, *self._statistics)
        parts = [crops[start : start + CROPS_AT_ONCE] for start in range(0, len(crops), CROPS_AT_ONCE)]
        features = np.concatenate([_run(self._tower, {"pixel_values": part}) for part in parts])
        tokens = lay_out(features, rows, columns, self._row_end, self._separator)
        return _run(self._projection, {"input": tokens[None]})[0]

    def fork(self) -> OpenVinoGraphs:
        """The same graphs, with nothing read."""
        other = copy(self)
        other.make_requests()
        return other

    def make_requests(self) -> None:
        """Take new requests, each with states of its own."""
        requests = [graph.create_infer_request() for graph in self._compiled]
        self._tower, self._projection, self._embeddings, self._decoder = requests
        self._length = 0

    def reset(self) -> None:
        """Forget all that was read."""
        self._decoder.reset_state()
        self._length = 0

    def read(self, embeddings: Floats) -> Floats:
        """Read more tokens (n, H) after those that were; the logits (V,) after the last of them."""
        start, self._length = self._length, self._length + len(embeddings)
        inputs = {
            "inputs_embeds": embeddings[None],
            "attention_mask": np.ones((1, self._length), np.int64),
            "position_ids": np.arange(start, self._length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return _run(self._decoder, inputs)[0, -1]


def load(folder: Path, **settings: Any) -> OpenVinoGraphs:
    """The graphs of a folder; arguments as of `OpenVinoGraphs`."""
    return OpenVinoGraphs(folder, **settings)


def _run(request: Any, inputs: dict[str, Any]) -> Floats:
    request.infer(inputs)
    output: Floats = request.get_output_tensor(0).data.copy()
    return output
