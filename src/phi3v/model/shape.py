"""The sizes of a model that memory and time depend on, and what a step costs that follows from them."""

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

    @property
    def forward_costs(self) -> Costs:
        """Of a forward pass."""
        return Costs(
            token=self.token_flops,
            pair=2 * self.layers * self.hidden,
            crop=sum(self.crop_flops),
            image_token=2 * (4 * self.tower_width * self.hidden + self.hidden**2),
            target=2 * self.hidden * self.vocabulary,
        )

    def training_costs(
        self,
        *,
        tower_trained: bool = True,
        adapters: bool = False,
        features_kept: bool = False,
        decoder_again: bool = False,
        tower_again: bool = False,
    ) -> Costs:
        """Of a forward and a backward pass.

        The backward pass of a trained layer is two more forward passes, of a frozen one that gradients pass through one
        more; attention has no weights, so its backward pass is always two.

        Args:
            adapters: the weights of products need no gradients.
            features_kept: what the frozen vision part makes of images is not computed again.
            decoder_again, tower_again: what is computed a second time for the backward pass (checkpointing).
        """
        forward, products = self.forward_costs, 2 if adapters else 3
        crop, image_token = float(not features_kept) * forward.crop, float(not features_kept) * forward.image_token
        if tower_trained:
            linear, attention = self.crop_flops
            crop = (products + tower_again) * linear + (3 + tower_again) * attention
            image_token *= products
        return Costs(
            token=(products + decoder_again) * forward.token,
            pair=(3 + decoder_again) * forward.pair,
            crop=crop,
            image_token=image_token,
            target=products * forward.target,
        )


@dataclass(frozen=True)
class Costs:
    """Operations that one more of each costs; a product of (m, k) by (k, n) is 2·m·k·n.

    Attributes:
        token: through the decoder's products with weights.
        pair: of attention. T tokens that see each other causally are T² pairs, of which half are computed.
        crop: through the tower.
        image_token: through the projector.
        target: a token whose logits are computed.
    """

    token: float = 1.0
    pair: float = 0.0
    crop: float = 0.0
    image_token: float = 0.0
    target: float = 0.0

    def of(self, *, tokens: float, pairs: float, crops: float, image_tokens: float, targets: float) -> float:
        """Of so many of each."""
        decoder = self.token * tokens + self.pair * pairs + self.target * targets
        return decoder + self.crop * crops + self.image_token * image_tokens
