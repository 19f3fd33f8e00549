"""What answering has in memory between two tokens, whether many questions are answered or one is streamed."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import send_to_device

from phi3v.evaluate.batches import PromptBatch
from phi3v.model.generation import CACHE_NAMES
from phi3v.processing.processor import Phi3VProcessor
from phi3v.processing.tokenizer import pad_rows


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
