"""The sizes of a model that memory and time depend on."""

from __future__ import annotations

from dataclasses import dataclass

from phi3v.model.configuration import Phi3VConfig
from phi3v.processing.hd_transform import CROP_SIZE


@dataclass(frozen=True)
class ModelShape:
    """Layers and widths. ``tower_layers`` are those that run: CLIP's last one never does."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_width: int
    vocabulary: int
    tower_layers: int
    tower_width: int
    tower_mlp: int
    tower_heads: int
    patches: int  # of a crop, the class token included

    @classmethod
    def of(cls, config: Phi3VConfig) -> ModelShape:
        vision = config.vision_config()
        head_width = config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_width=config.num_key_value_heads * head_width,
            vocabulary=config.vocab_size,
            tower_layers=vision.num_hidden_layers - 1,
            tower_width=vision.hidden_size,
            tower_mlp=vision.intermediate_size,
            tower_heads=vision.num_attention_heads,
            patches=(CROP_SIZE // vision.patch_size) ** 2 + 1,
        )

    @property
    def qkv_width(self) -> int:
        return self.hidden + 2 * self.kv_width

    @property
    def layer_parameters(self) -> int:
        """Weights of a decoder layer's products."""
        attention = self.hidden * (self.qkv_width + self.hidden)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def tower_layer_parameters(self) -> int:
        """Weights of a tower layer's products."""
        return 4 * self.tower_width**2 + 2 * self.tower_width * self.tower_mlp

    @property
    def token_flops(self) -> int:
        """Operations of the decoder's products for a token, forward; attention over others apart."""
        return 2 * self.layers * self.layer_parameters

    @property
    def crop_flops(self) -> tuple[int, int]:
        """Operations of the tower for a crop, forward: products with weights, and attention."""
        products = 2 * self.tower_layers * self.patches * self.tower_layer_parameters
        return products, 4 * self.tower_layers * self.patches**2 * self.tower_width

    def crop_cost(self, *, tower_trained: bool = True, adapters: bool = False) -> float:
        """What a crop costs in a training step, in tokens: about 50 for the released models, if the tower is trained.

        Args:
            adapters: the weights of products need no gradients.
        """
        forward = sum(self.crop_flops) / self.token_flops
        # The decoder runs forward, back to its inputs and, but for adapters, back to its weights.
        return forward if tower_trained else forward / (2 if adapters else 3)
