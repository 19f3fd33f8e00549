"""What answering has in memory between two tokens, whether many questions are answered or one is streamed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import send_to_device

from phi3v.data.collate import Page, Sample
from phi3v.evaluate.batches import PromptBatch, whole_prompts
from phi3v.model.generation import CACHE_NAMES
from phi3v.processing.processor import Phi3VProcessor
from phi3v.processing.tokenizer import pad_rows
from phi3v.runtime import Runtime

Pixels = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]


class DecodingState:
    """What a batch of half-read samples has in memory: cache, mask, the last logits, and each sample's length."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.lengths: list[int] = []  # of whole prompts and what was generated after them
        self.cache: dict[str, Any] = {}  # under the name that this version of the library gives it
        self.mask: torch.Tensor | None = None  # [R, T]
        self.logits = torch.empty(0)  # [R, 1, V]

    def feed(self, inputs: dict[str, torch.Tensor], images: dict[str, Any] | None = None) -> None:
        """Read more tokens of every sample."""
        tokens = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(tokens))
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        outputs = self._run(tokens, self.mask, 1, **(images or {}))
        name = next(name for name in CACHE_NAMES if outputs.get(name) is not None)  # it may answer to both
        self.cache = {name: outputs[name]}
        self.logits = outputs.logits
        self.lengths = [length + tokens.shape[1] for length in self.lengths]

    def peek(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits (R, T, V) after each of ``tokens`` (R, T), which are then forgotten."""
        assert self.mask is not None
        outputs = self._run(tokens, torch.cat([self.mask, torch.ones_like(tokens)], dim=1), tokens.shape[1])
        for cache in self.cache.values():
            cache.crop(-tokens.shape[1])
        logits: torch.Tensor = outputs.logits
        return logits

    def select(self, lines: list[int]) -> None:
        """Go on with these lines, in this order; a line may be taken more than once."""
        assert self.mask is not None
        chosen = torch.tensor(lines, device=self.mask.device)
        self.mask, self.logits = self.mask[chosen], self.logits[chosen]
        for cache in self.cache.values():
            cache.batch_select_indices(chosen)
        self.lengths = [self.lengths[line] for line in lines] if self.lengths else []

    def _run(self, tokens: torch.Tensor, mask: torch.Tensor, logits_to_keep: int, **inputs: Any) -> Any:
        return self.model(
            input_ids=tokens,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **self.cache,
            **inputs,
        )


def prefill(model: Any, processor: Phi3VProcessor, batch: PromptBatch) -> DecodingState:
    """Run the prompts: the pages first, then each row's own end of it."""
    device = next(model.parameters()).device

    def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = pad_rows(rows, processor.tokenizer.pad_token_id, "left")
        return send_to_device(inputs, device)

    state = DecodingState(model)
    state.feed(padded(batch.prefixes), send_to_device(batch.images, device))
    if any(batch.suffixes):
        state.select(batch.page_of_row)
        state.feed(padded(batch.suffixes))
    state.lengths = batch.lengths()
    return state


class Decoder(Protocol):
    """One sample, read token by token."""

    def start(self, input_ids: Sequence[int], pages: Sequence[Pixels]) -> Logits:
        """Forget all, read a prompt; the logits (V,) after it.

        Args:
            input_ids: image k is a run of ``-k``.
            pages: of each image, uint8 (height, width, 3), multiples of 336.
        """

    def step(self, token: int) -> Logits:
        """Read another token; the logits (V,) after it."""


class TorchDecoder:
    """Our own model as a `Decoder`.

    Args:
        autocast_dtype: compute in this dtype; by default in the model's own.
    """

    def __init__(self, model: Any, processor: Phi3VProcessor, autocast_dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.processor = processor
        self.autocast_dtype = autocast_dtype
        self.device = next(model.parameters()).device
        self._ids: list[int] = []
        self._pages: list[Page] = []
        self._state = DecodingState(model)

    def start(self, input_ids: Sequence[int], pages: Sequence[Pixels]) -> Logits:
        self._ids = list(input_ids)
        self._pages = [
            Page(str(index), (page.shape[0], page.shape[1]), torch.from_numpy(page)) for index, page in enumerate(pages)
        ]
        return self._read()

    def step(self, token: int) -> Logits:
        self._ids.append(token)
        if self._state.lengths[0] == self.model.config.long_context_start:
            return self._read()  # the keys so far were rotated with the short factors
        with self._computing():
            self._state.feed({"input_ids": torch.tensor([[token]], device=self.device)})
        return self._logits()

    def _read(self) -> Logits:
        with self._computing():
            self._state = prefill(self.model, self.processor, whole_prompts([0], [Sample(self._ids, [], self._pages)]))
        return self._logits()

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        dtype = self.autocast_dtype
        autocast = torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()
        with torch.inference_mode(), autocast:
            yield

    def _logits(self) -> Logits:
        logits: Logits = self._state.logits[0, -1].float().cpu().numpy()
        return logits


def decoder_of(model: Any, processor: Phi3VProcessor, autocast_dtype: torch.dtype | None = None) -> Decoder:
    """A decoder of one sample, beside others of the same model: our own, or one of graphs.

    Args:
        autocast_dtype: as for `TorchDecoder`; graphs compute as they are.
    """
    return model.fork() if isinstance(model, Runtime) else TorchDecoder(model, processor, autocast_dtype)
