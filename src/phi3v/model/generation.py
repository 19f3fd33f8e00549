"""Generating by the library's ways, with images and across LongRoPE's switch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin

# transformers 5.24 renamed the cache from `past_key_values`; both names are met.
CACHE_NAMES = ("cache", "past_key_values")

IMAGE_INPUTS = ("pixel_values", "image_sizes", "pages", "page_index", "image_features", "image_positions")


class Phi3VGenerationMixin(GenerationMixin):
    """`generate` and what it asks of the model."""

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the library's, for all its ways of decoding; prompts come back with ``image_token_id`` in images' places.

        Images are encoded once a prompt, however many sequences are searched or drawn for it. Where there are images, a
        cache is always used. Where a sample may outgrow LongRoPE's short factors, tokens are not drafted. A batch
        padded on the right, as the published tokenizer pads, comes back padded on the left.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if (mask := kwargs.get("attention_mask")) is not None and mask.dim() == 2 and not mask[:, -1].all():
            # Padding would be what the first new token is predicted from. Also of models that draft.
            kwargs["attention_mask"] = _pad_on_the_left(mask, mask)
            input_ids, kwargs["inputs_embeds"] = (
                values if values is None else _pad_on_the_left(values, mask)
                for values in (input_ids, kwargs.get("inputs_embeds"))
            )
        if input_ids is None:
            return super().generate(None, *args, **kwargs)
        # A model that drafts gets the same arguments and has its own embeddings; chunks of a prompt are cut from ids.
        if self._may_outgrow_short_factors(input_ids.shape[1], kwargs):
            # Drafts beyond the switch would be judged, and those before it with them, by the factors of the other side.
            kwargs |= {"assistant_model": None, "prompt_lookup_num_tokens": None}
        in_chunks = self._setting("prefill_chunk_size", kwargs)
        if not in_chunks and kwargs.get("assistant_model") is None and kwargs.get("inputs_embeds") is None:
            images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
            if any(value is not None for value in images.values()):
                with torch.no_grad():
                    kwargs["inputs_embeds"] = self.model.embed(input_ids, **images)
        image_token_id = self.config.image_token_id
        if image_token_id is not None and image_token_id < self.config.vocab_size:
            input_ids = input_ids.masked_fill(input_ids < 0, image_token_id)  # penalties and decoders index by ids
        return super().generate(input_ids, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *,
        inputs_embeds: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The library's inputs; where a sample outgrows the short rotary factors, the cache is made anew.

        Its keys were rotated with the short factors, so at that one step the whole sequence, images included, runs
        again with the long ones, as in the official code.
        """
        caches = {
            name: value for name, value in zip(CACHE_NAMES, (cache, past_key_values), strict=True) if value is not None
        }
        if any(value.get_seq_length() for value in caches.values()):
            inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **caches, **kwargs)
            if not self._outgrows_short_factors(inputs.get("position_ids")):
                (cached,) = {value.get_seq_length() for value in caches.values()}
                if inputs_embeds is not None and cached < inputs_embeds.shape[1]:  # a prompt whose start is cached
                    inputs |= {"input_ids": None, "inputs_embeds": inputs_embeds[:, cached:]}
                return inputs
            caches = {}
            kwargs["next_sequence_length"] = None
        # Also a model that drafts, which is not told of its first step, needs the images.
        kwargs["is_first_iteration"] = True
        # Those given are of the prompt alone.
        if inputs_embeds is not None and (new := kwargs["position_ids"].shape[1] - inputs_embeds.shape[1]):
            inputs_embeds = torch.cat([inputs_embeds, self.model.embed_tokens(input_ids[:, -new:])], dim=1)
        whole: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **caches, **kwargs
        )
        return whole

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """A setting of generation, wherever it is given."""
        return kwargs.get(name) or getattr(kwargs.get("generation_config") or self.generation_config, name, None)

    def _may_outgrow_short_factors(self, length: int, kwargs: dict[str, Any]) -> bool:
        new = self._setting("max_new_tokens", kwargs)
        limit = self._setting("max_length", kwargs) or 0 if new is None else length + new
        return length <= self.config.long_context_start < limit

    def _outgrows_short_factors(self, position_ids: torch.Tensor | None) -> bool:
        """Whether one of the samples does so with the tokens at ``position_ids`` (B, T)."""
        if position_ids is None:
            return False
        length = position_ids[:, -1] + 1  # [B], tokens of each sample including the new ones
        before = length - position_ids.shape[1]
        start = self.config.long_context_start
        return bool(((before <= start) & (length > start)).any())


def _pad_on_the_left(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Rows of ``values`` (B, T, …) with their padding on the right moved to the left."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * places).argmax(dim=1, keepdim=True)  # [B, 1]
    index = (places + last + 1) % len(places)  # [B, T]
    return values[torch.arange(len(values), device=index.device)[:, None], index]
