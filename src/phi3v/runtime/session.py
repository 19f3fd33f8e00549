"""A model of exported graphs that answers: prompts to tokens, images to pages, LongRoPE's switch, greedy decoding.

Shapes: ``T`` tokens, ``H`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from phi3v.errors import UserError
from phi3v.json_files import read_json
from phi3v.processing.conversation import (
    IMAGE_TAG,
    UNFINISHED,
    ChatTurn,
    decode_answer,
    encode_conversation,
    image_tag,
    stop_token_ids,
)
from phi3v.processing.hd_transform import (
    CROP_SIZE,
    PREPROCESSOR_CONFIG,
    check_image_runs,
    hd_transform,
    image_runs,
    num_img_tokens,
    open_pixels,
    to_rgb,
)
from phi3v.processing.special_text import escape_special_text
from phi3v.processing.tokenizer import IMAGE_TOKEN, TOKENIZER_FILE, read_tokenizer
from phi3v.runtime.pages import Floats

Page = npt.NDArray[np.uint8]

# A file by which each kind of graph is known, and the module in this room whose `load(folder, processing)` runs it.
BACKENDS = {"openvino_language_model.xml": "openvino", "decoder.onnx": "onnx"}


KEPT_PAGES = 4


class Graphs(Protocol):
    """The graphs of a model: what a backend implements."""

    def embed(self, input_ids: npt.NDArray[np.int64]) -> Floats:
        """Embeddings (T, H) of token ids (T,), none of which is an image's."""

    def encode(self, page: Page) -> Floats:
        """Features (tokens of the image, H) of its page (height, width, 3)."""

    def fork(self) -> Graphs:
        """The same graphs, with nothing read: those of a conversation beside others."""

    def reset(self) -> None:
        """Forget what was read."""

    def read(self, embeddings: Floats) -> Floats:
        """Read tokens (T, H) after those that were read before; the logits (V,) after the last of them.

        The rotary factors are those of a sample of that length in all.
        """


def graph_kind(folder: str | Path) -> str | None:
    """The name of the backend that runs a folder's graphs; ``None`` if it holds none."""
    folder = Path(folder)
    return next((kind for file, kind in BACKENDS.items() if (folder / file).is_file()), None)


@dataclass(frozen=True)
class GraphConfig:
    """What is asked of any model's configuration, under the same names.

    Attributes:
        max_position_embeddings: tokens that a sample may have.
        long_context_start: samples longer than this many tokens use LongRoPE's long factors.
    """

    max_position_embeddings: int
    long_context_start: int


class Runtime:
    """A model of graphs.

    Args:
        folder: with the graphs, ``config.json``, ``preprocessor_config.json`` and the tokenizer.
        graphs: those of the folder, loaded.

    Attributes:
        tokenizer: of the folder.
        num_crops: crops of a page at most; may be changed.
        exif_orientation: whether images are turned as their EXIF orientation says.
    """

    def __init__(self, folder: Path, graphs: Graphs) -> None:
        self.folder = folder
        self.graphs = graphs
        self.tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
        self.stops = stop_token_ids(self.tokenizer)
        images, config = read_json(folder / PREPROCESSOR_CONFIG), read_json(folder / "config.json")
        self.num_crops: int = images["num_crops"]
        self.exif_orientation: bool = images.get("exif_orientation", True)
        longest: int = config["max_position_embeddings"]
        self.config = GraphConfig(longest, config.get("original_max_position_embeddings", longest))
        self._features: OrderedDict[bytes, Floats] = OrderedDict()  # of the last pages
        self._length = 0  # of what was read
        self._prompt = np.zeros((0, 0), np.float32)  # its embeddings
        self._new: list[int] = []  # what came after it

    def fork(self) -> Runtime:
        """The same model, with nothing read."""
        other = copy(self)
        other.graphs = self.graphs.fork()
        return other

    def start(self, input_ids: Sequence[int], pages: Sequence[Page]) -> Floats:
        """Read a prompt from the beginning.

        Args:
            input_ids: image k as a run of ``-k``.
            pages: of each image in order, uint8 (height, width, 3), both multiples of 336.

        Returns:
            The logits (V,) of the next token, float32.

        Raises:
            ImageAlignmentError: runs and pages do not fit together.
            UserError: it is too long.
        """
        sizes = [(page.shape[0], page.shape[1]) for page in pages]
        check_image_runs(image_runs(input_ids), sizes, "the prompt")
        ids = np.array(input_ids, np.int64)
        self._prompt = self.graphs.embed(np.maximum(ids, 0))
        if pages:
            self._prompt[ids < 0] = np.concatenate([self._encode(page) for page in pages])
        self._new = []
        return self._read_from_start()

    def step(self, token: int) -> Floats:
        """Read one more token; the logits (V,) of the next.

        Raises:
            UserError: it is too long.
        """
        self._new.append(token)
        if self._length == self.config.long_context_start:
            # Its keys were rotated with the short factors: all runs again with the long ones.
            return self._read_from_start()
        return self._read(self.graphs.embed(np.array([token])))

    def _encode(self, page: Page) -> Floats:
        """The features of a page; those of the last few are kept, since questions about one page come together."""
        key = hashlib.sha256(page.tobytes()).digest() + bytes(str(page.shape), "ascii")
        features = self._features.pop(key, None)
        if features is None:
            features = self.graphs.encode(page)
            if len(self._features) == KEPT_PAGES:
                self._features.popitem(last=False)
        self._features[key] = features
        return features

    def _read_from_start(self) -> Floats:
        self.graphs.reset()
        self._length = 0
        new = [self.graphs.embed(np.array(self._new))] if self._new else []
        return self._read(np.concatenate([self._prompt, *new]))

    def _read(self, embeddings: Floats) -> Floats:
        self._length += len(embeddings)
        longest = self.config.max_position_embeddings
        if self._length > longest:
            raise UserError(f"{self._length:,} tokens are too many: the model takes {longest:,}")
        return self.graphs.read(embeddings)

    def page(self, image: Image.Image) -> Page:
        """An image of any mode and size, resized and padded to its page."""
        return np.array(hd_transform(to_rgb(image), self.num_crops))

    def prompt(self, text: str, pages: Sequence[Page], *, system: str | None = None) -> list[int]:
        """The tokens of a question.

        Args:
            text: with ``<|image_1|>`` … ``<|image_n|>`` or n times ``<|image|>`` where the images are to be, else they
                come first. Any other special token in it stays text.

        Raises:
            UserError: it has tags, but not of these images in this order.
        """
        tags = list(IMAGE_TAG.finditer(text))
        numbered = [image_tag(number) for number in range(1, len(pages) + 1)]
        if tags and [tag.group() for tag in tags] not in (numbered, [IMAGE_TOKEN] * len(pages)):
            raise UserError(
                f"the text has the image tags {[tag.group() for tag in tags]}, and {len(pages)} images were given",
                hint=f"write each of {numbered} once, in this order, or no tags at all",
            )
        ends = [0, *chain.from_iterable(tag.span() for tag in tags), len(text)]
        pieces = [escape_special_text(text[start:end]) for start, end in zip(ends[::2], ends[1::2], strict=True)]
        offsets = [len("".join(pieces[: index + 1])) for index in range(len(tags))]
        turn = ChatTurn("".join(pieces), None, len(pages), tuple(offsets) if tags else None)
        counts = [num_img_tokens(page.shape[0] // CROP_SIZE, page.shape[1] // CROP_SIZE) for page in pages]
        system = escape_special_text(system) if system else None
        return encode_conversation(self.tokenizer, [turn], counts, system=system).input_ids

    def stream(
        self,
        text: str,
        images: Sequence[str | Path | Image.Image] = (),
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        choose: Callable[[Floats], int] = lambda logits: int(logits.argmax()),
    ) -> Iterator[str]:
        """The answer so far after each token, and last the whole answer.

        Args:
            text: see `prompt`.
            images: files, or images in memory.
            max_new_tokens: where it is cut.
            choose: the next token from its logits (V,); by default the likeliest.

        Raises:
            UserError: an image cannot be read, the sample is too long, or ``max_new_tokens`` is below 1.
        """
        if max_new_tokens < 1:
            raise UserError("at least one token is needed", where=f"max_new_tokens={max_new_tokens}")
        pages = [self.page(self._open(image)) for image in images]
        logits = self.start(self.prompt(text, pages, system=system), pages)
        ids: list[int] = []
        while True:
            ids.append(choose(logits))
            answer = decode_answer(self.tokenizer, ids, self.stops)
            if ids[-1] in self.stops or len(ids) == max_new_tokens:
                yield answer
                return
            yield answer.rstrip(UNFINISHED)
            logits = self.step(ids[-1])

    def answer(self, text: str, images: Sequence[str | Path | Image.Image] = (), **settings: Any) -> str:
        """The answer to a question about images; arguments as of `stream`."""
        *_, answer = self.stream(text, images, **settings)
        return answer

    def _open(self, image: str | Path | Image.Image) -> Image.Image:
        if isinstance(image, Image.Image):
            return image
        try:
            with open_pixels(image) as opened:
                opened.load()
                return ImageOps.exif_transpose(opened) if self.exif_orientation else opened
        except OSError as error:
            raise UserError(f"cannot be read as an image ({error.strerror or error})", where=str(image)) from None


def load_runtime(folder: str | Path, **settings: Any) -> Runtime:
    """The model of a folder that ``phi3v export`` wrote as graphs.

    Args:
        settings: of the graphs' library; see the backends in this room.

    Raises:
        UserError: the folder has no graphs, a file is missing or damaged, or the library is not installed.
    """
    folder = Path(folder)
    kind = graph_kind(folder)
    if kind is None:
        raise UserError(
            "has no graphs", where=str(folder), hint="write them with phi3v export --format openvino or onnx"
        )
    load = import_module(f"phi3v.runtime.{kind}").load
    return Runtime(folder, load(folder, **settings))
