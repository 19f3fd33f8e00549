"""Phi-3-vision for causal language modelling: transformers' Phi-3 decoder behind our vision part.

Shapes: ``B`` rows, ``T`` tokens, ``N`` images of the batch in reading order (row by row), ``H`` hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, Phi3Model, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from phi3v.json_files import content_of, read_json
from phi3v.model.attention import BACKENDS, Layout, OutputBackend, Phi3VRotaryEmbedding, prepare_row, to_device
from phi3v.model.checkpoint import EMBEDDING, embedding_key_mapping
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.generation import CACHE_NAMES, IMAGE_INPUTS, Phi3VGenerationMixin
from phi3v.model.loss import LossKernel, answer_log_probs, causal_lm_loss, group_sums, target_losses
from phi3v.model.vision import Phi3VImageEmbedding, real_crops
from phi3v.processing.hd_transform import (
    CROP_SIZE,
    check_image_alignment,
    cut_flat_pages,
    num_img_tokens,
)
from phi3v.processing.tokenizer import TOKEN_IDS

OFFICIAL_VOCABULARY = 32064
END_TOKEN_ID = TOKEN_IDS["<|end|>"]
END_OF_TEXT_TOKEN_ID = TOKEN_IDS["<|endoftext|>"]  # also padding


# Attention that is causal by a flag and needs no mask. Ours of packed rows take ordinary ones by SDPA.
CAUSAL_WITHOUT_MASK = ("sdpa", "flash_attention_2", *BACKENDS)


class Phi3VPreTrainedModel(PreTrainedModel):
    """What the library needs to know to load, initialise, shard and place the model."""

    config: Phi3VConfig
    config_class = Phi3VConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Phi3DecoderLayer", "LastDecoderLayer", "CLIPEncoderLayer"]  # noqa: RUF012 - the library's own form
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # A second name for the embeddings that some checkpoints hold, and a buffer of older CLIP versions.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"vision_embed_tokens\.wte\.weight",
        r"embeddings\.position_ids",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Phi3VImageEmbedding):
            init.zeros_(module.glb_GN)
            init.zeros_(module.sub_GN)
        elif isinstance(module, CLIPVisionEmbeddings):
            init.normal_(module.class_embedding, mean=0.0, std=module.embed_dim**-0.5)
            init.copy_(module.position_ids, torch.arange(module.num_positions).expand((1, -1)))
        else:
            super()._init_weights(module)

    def enable_input_require_grads(self) -> None:
        """As the library's, and for the vision part: reentrant checkpointing cuts off adapters in frozen layers."""
        super().enable_input_require_grads()
        tower = self.base_model.vision_embed_tokens.img_processor.vision_model

        def require_grad(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if any(parameter.requires_grad for parameter in tower.parameters()):  # otherwise nothing flows back so far
                output.requires_grad_(True)

        self._require_grads_hooks.append(tower.embeddings.register_forward_hook(require_grad))


class LastDecoderLayer(Phi3DecoderLayer):
    """The decoder's last layer, which can leave out outputs that no target is predicted from."""

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, outputs: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As the library's layer; of (1, T, H) only the places ``outputs`` (n,), where they are given: (1, n, H)."""
        if outputs is None:
            return super().forward(hidden_states, *args, **kwargs)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), attention_mask=None, **kwargs)
        hidden_states, attended = (tensor.index_select(1, outputs) for tensor in (hidden_states, attended))
        hidden_states = hidden_states + self.resid_attn_dropout(attended)
        return hidden_states + self.resid_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class Phi3VModel(Phi3VPreTrainedModel, Phi3Model):
    """The decoder with images laid into its embeddings."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.layers[-1].__class__ = LastDecoderLayer  # a new one would draw the random weights of a preset anew
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        # Set where ranks gather each layer's weights together, so that all must run the same layers.
        self.always_runs_vision = False
        self.rotary_emb = Phi3VRotaryEmbedding(config)
        self.post_init()

    def is_image(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which of ``input_ids`` (B, T) stand for images: ``config.image_token_id``, or the official negative ids."""
        negative = input_ids < 0
        return negative if self.config.image_token_id is None else negative | (input_ids == self.config.image_token_id)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
        pages: torch.Tensor | None = None,
        page_index: torch.Tensor | Sequence[int] | None = None,
        image_features: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings (B, T, H) of ``input_ids`` with the images' features at the ids of images."""
        is_image = self.is_image(input_ids)
        inputs_embeds: torch.Tensor = self.embed_tokens(input_ids.masked_fill(is_image, 0))
        if pixel_values is not None and pixel_values.shape[0] == 0:  # of a slice of a batch
            pixel_values = image_sizes = None
        given = {"pixel_values": pixel_values, "pages": pages, "image_features": image_features}
        name = next((name for name, value in given.items() if value is not None), None)
        if name is not None and image_sizes is None:
            raise ValueError(f"{name} came without image_sizes")
        sizes = [(height, width) for height, width in _host_values(image_sizes)]
        shown = list(range(len(sizes))) if page_index is None else _host_values(page_index)  # the page of each image
        # A graph has no host to check on, and places its features by the mask.
        if image_positions is None and not torch.compiler.is_compiling():  # of a batch whose maker did not check it
            numbered = torch.where(is_image, input_ids.clamp(max=-1), 0)
            check_image_alignment(numbered, [sizes[page] for page in shown] if name is not None else [])
            image_positions = is_image.flatten().nonzero()[:, 0]
        if name is None:
            return self._dummy_vision_forward(inputs_embeds)
        if image_features is not None:
            # (tokens, H), or as the tower leaves them, (n, 576, V)
            features = image_features
            if features.dim() == 3:
                features = self.vision_embed_tokens.project(features, sizes)
        elif pages is not None:
            features = self.vision_embed_tokens(cut_flat_pages(pages, sizes), sizes)  # [tokens of all pages, H]
        else:
            assert pixel_values is not None
            crops, counts = real_crops(pixel_values, sizes)
            features = self.vision_embed_tokens(crops, sizes, counts)
        if shown != list(range(len(sizes))):
            of_page = features.split([num_img_tokens(h // CROP_SIZE, w // CROP_SIZE) for h, w in sizes])
            features = torch.cat([of_page[page] for page in shown])
        if image_positions is None:
            return inputs_embeds.masked_scatter(is_image[..., None], features.to(inputs_embeds.dtype))
        flat = inputs_embeds.flatten(0, 1)  # [B * T, H]
        return flat.index_copy(0, image_positions, features.to(flat.dtype)).view_as(inputs_embeds)

    def _dummy_vision_forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Run the vision part to no effect where a batch has no image; a trained one gets a zero gradient.

        All ranks of a step reduce, or even gather, the same tensors, and the batches of some may be text alone.
        """
        is_trained = any(parameter.requires_grad for parameter in self.vision_embed_tokens.parameters())
        if not self.training or not (self.always_runs_vision or (is_trained and torch.is_grad_enabled())):
            return inputs_embeds
        blank = inputs_embeds.new_zeros(1, 3, CROP_SIZE, CROP_SIZE)
        return inputs_embeds + 0.0 * self.vision_embed_tokens(blank, [(CROP_SIZE, CROP_SIZE)]).sum()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        layout: Layout | None = None,
        lengths: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The decoder's output for official inputs, or for a batch as `data` makes it (see `Phi3VForCausalLM`).

        Args:
            outputs: places of a packed row, ascending: their output alone is wanted.
        """
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give either input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, **images)
        if layout is not None:
            return self._forward_packed(inputs_embeds, layout, outputs)
        if lengths is not None:
            if self.config._attn_implementation in CAUSAL_WITHOUT_MASK:
                return self._forward_padded(inputs_embeds, lengths)
            places = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            attention_mask = (places < to_device(torch.tensor(lengths), places.device)[:, None]).long()
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            # Positions count a sample's own tokens, so padding on either side changes nothing.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            position_ids = position_ids.masked_fill(attention_mask == 0, 0)[:, -inputs_embeds.shape[1] :]
        return super().forward(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )

    def _forward_padded(self, hidden_states: torch.Tensor, lengths: Sequence[int]) -> BaseModelOutputWithPast:
        """Rows padded on the right: causal attention never sees their padding, so there is no mask."""
        if len(lengths) != len(hidden_states) or max(lengths) > hidden_states.shape[1]:
            raise ValueError(f"rows of {list(lengths)} tokens came with {tuple(hidden_states.shape)}")
        self._check_window(max(lengths))
        device = hidden_states.device
        is_long = to_device(torch.tensor(lengths) > self.config.long_context_start, device)[:, None]
        return self._run_layers(hidden_states, torch.arange(hidden_states.shape[1], device=device)[None], is_long)

    def _forward_packed(
        self, hidden_states: torch.Tensor, layout: Layout, outputs: Sequence[int] | None
    ) -> BaseModelOutputWithPast:
        tokens = sum(map(sum, layout))
        if hidden_states.shape[:2] != (1, tokens):
            raise ValueError(f"the layout of one row of {tokens} tokens came with {tuple(hidden_states.shape)}")
        self._check_window(max(prefix + max(branches) for prefix, *branches in layout))
        implementation = self.config._attn_implementation
        row = prepare_row(layout, implementation, hidden_states.device, self.config.long_context_start)
        last: dict[str, Any] = {"packed_row": row}
        if outputs is not None:
            backend = OutputBackend(layout, outputs, hidden_states.device)
            last = {"packed_row": replace(row, backend=backend), "outputs": backend.outputs}
        return self._run_layers(hidden_states, row.position_ids, row.is_long, {"packed_row": row}, last)

    def _run_layers(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        is_long: torch.Tensor,
        each: dict[str, Any] | None = None,
        last: dict[str, Any] | None = None,
    ) -> BaseModelOutputWithPast:
        """The library's loop over the layers without a mask or a cache, whose making would read from the device.

        Args:
            each, last: what the layers, and the last one, take besides.
        """
        position_embeddings = self.rotary_emb(hidden_states, position_ids, is_long)
        for layer in self.layers:
            more = (last if layer is self.layers[-1] else each) or {}
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings, **more)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))

    def _check_window(self, longest: int) -> None:
        if self.config.sliding_window is not None and longest > self.config.sliding_window:
            raise ValueError(f"a sample of {longest} tokens is longer than the window of {self.config.sliding_window}")


def _host_values(values: torch.Tensor | Sequence[Any] | None) -> list[Any]:
    """Sizes or indices as Python numbers; a tensor of the caller's is read, for which its device is waited for."""
    return values.tolist() if isinstance(values, torch.Tensor) else list(values or ())


@dataclass
class AnswersOutput(CausalLMOutputWithPast):
    """The output where ``answer_tokens`` are given: not the loss, but each answer's log-probability, (A,) float32."""

    answer_log_probs: torch.Tensor | None = None


@dataclass
class GroupsOutput(CausalLMOutputWithPast):
    """The output where ``target_groups`` are given: beside the loss `group_sums` of the targets, (2, G) float32."""

    group_sums: torch.Tensor | None = None


class Phi3VForCausalLM(Phi3VPreTrainedModel, Phi3VGenerationMixin):
    """Phi-3-vision and Phi-3.5-vision.

    Loads and saves the official layout. A second copy of the embeddings (``vision_embed_tokens.wte``) is
    accepted and never written.
    """

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_kernel: LossKernel = "chunked"
        self.post_init()
        self._set_stop_tokens()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint in the official layout; arguments as of `PreTrainedModel.from_pretrained`.

        Raises:
            UserError: a JSON file of a folder is damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        if kwargs.get("key_mapping") is None and folder.is_dir():
            kwargs["key_mapping"] = embedding_key_mapping(folder)
        if (file := folder / "generation_config.json").is_file():
            fields = read_json(file)  # a damaged one is as good as none to the library
            with content_of(file):
                GenerationConfig.from_dict(fields).validate()
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        # With output_loading_info=True the library returns the model and a report.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # The library undoes at saving what it renamed at loading; the second name is never to be written.
        model._weight_conversions = [c for c in model._weight_conversions or [] if EMBEDDING not in c.target_patterns]
        model._set_stop_tokens()
        return loaded

    def _set_stop_tokens(self) -> None:
        # The published generation_config.json stops at </s> (2), which the model never writes.
        if self.config.vocab_size == OFFICIAL_VOCABULARY and self.generation_config is not None:
            self.generation_config.eos_token_id = [END_TOKEN_ID, END_OF_TEXT_TOKEN_ID]
            self.generation_config.pad_token_id = END_OF_TEXT_TOKEN_ID

    def unused_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that the checkpoint carries but no forward pass runs: CLIP's last layer and final norm."""
        vision = self.model.vision_embed_tokens.img_processor.vision_model
        unused = {id(p) for module in (vision.encoder.layers[-1], vision.post_layernorm) for p in module.parameters()}
        return ((name, p) for name, p in self.named_parameters() if id(p) in unused)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        loss_normalizer: torch.Tensor | float | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: int | None = 0,
        target_positions: Sequence[int] | None = None,
        answer_tokens: Sequence[int] | None = None,
        target_groups: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where ``labels`` are given.

        Args:
            input_ids: (B, T) int64; an image is a run of ``config.image_token_id`` as long as it has tokens, or in the
                official form image k of a row a run of ``-k``.
            attention_mask: (B, T), 1 for tokens and 0 for padding on either side.
            position_ids: (B, T) int64; by default a sample's own tokens are counted.
            pixel_values: (N, C + 1, 3, 336, 336) float, normalised, global crop first, padded with any crops.
            image_sizes: (N, 2) int64, padded height and width in pixels; of each page where ``pages`` are given.
            labels: (B, T) int64, -100 where there is no target.
            loss_weights: (B, T) float, weight of each label (see ``loss.causal_lm_loss``).
            loss_normalizer: what the weighted sum is divided by; by default the sum of this batch's weights.
            num_items_in_batch: the same by the name of ``transformers.Trainer``, which counts a whole step's labels.
            logits_to_keep: logits of the last so many positions; 0 is all; ``None`` skips them (training).
            target_positions: places of the targets in (B, T) laid out flat (``loss.find_targets``), as plain numbers.
            answer_tokens: the number of labels of each answer, in the order in which they stand: the log-probability of
                each answer is wanted in place of the loss (`AnswersOutput`).
            target_groups: (G, targets) bool, the targets of each of some groups, whose shares of the loss are wanted
                beside it (`GroupsOutput`).
            kwargs: what our own batches give beside or in place of the above, so that nothing is read from the device:

                * ``pages``: (P, 3) uint8 in place of ``pixel_values``, distinct pages one after the other, each row by
                  row (see ``processing.hd_transform``); ``image_sizes`` are those of the pages;
                * ``page_index``: N numbers, the page that each image shows; by default image k shows page k. A page
                  that several images show is encoded once;
                * ``image_features``: what the vision part made of the pages earlier, in place of pixels: finished
                  tokens (tokens of all pages, H), or the tower's (distinct crops of all pages, 576, V);
                * ``image_positions``: (tokens of all images,) int64, places of the placeholders in (B, T) laid out
                  flat. Whoever gives them has checked that they fit the images;
                * ``lengths``: tokens of each row, padded on the right, in place of ``attention_mask``;
                * ``layout``: of ``input_ids`` (1, T) that are a packed row, the prefix and the branches of each group
                  (see ``attention.Layout``), in place of mask and positions. The model must have been loaded with an
                  ``attn_implementation`` of ``attention.BACKENDS``.

                ``image_sizes`` and ``page_index`` may be plain numbers.

        Raises:
            ImageAlignmentError: placeholders and images do not fit together.
        """
        on_segments = kwargs.get("layout") is not None and self.config._attn_implementation == "packed_segments"
        # Whether the last layer computes alone what targets are predicted from.
        selected = bool(target_positions) and on_segments and logits_to_keep is None
        if selected:
            kwargs["outputs"] = [place - 1 for place in target_positions or ()]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = log_probs = of_groups = None
        if labels is not None:
            how: dict[str, Any] = {"kernel": self.loss_kernel, "targets": None, "selected": selected}
            if target_positions is not None:
                how["targets"] = to_device(torch.tensor(target_positions, dtype=torch.int64), labels.device)
            if answer_tokens is not None:
                log_probs = answer_log_probs(hidden_states, self.lm_head, labels, answer_tokens, **how)
            else:
                normalizer = num_items_in_batch if loss_normalizer is None else loss_normalizer
                if target_groups is None:
                    loss = causal_lm_loss(hidden_states, self.lm_head, labels, loss_weights, normalizer, **how)
                else:
                    loss, each, weights = target_losses(hidden_states, self.lm_head, labels, loss_weights, **how)
                    loss = loss / (weights.sum() if normalizer is None else normalizer)
                    of_groups = group_sums(each, weights, target_groups)
        logits = None if logits_to_keep is None else self.lm_head(hidden_states[:, -logits_to_keep:])
        # Whatever else the decoder returned (the cache under its present name, hidden states) passes through.
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        if log_probs is not None:
            return AnswersOutput(logits=logits, answer_log_probs=log_probs, **rest)
        if of_groups is not None:
            return GroupsOutput(loss=loss, logits=logits, group_sums=of_groups, **rest)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)
