"""How much autograd keeps from the forward pass to the backward pass, and what comes and goes in between.

Counted from the operations of the layers as they are (transformers' Phi-3 decoder and CLIP blocks, products under
autocast), in the manner of Korthikanti et al. 2022 (arXiv 2205.05198), whose closed form is for another block.
`benchmarks/plan_accuracy.py` holds the sums to what the allocator counts.

Shapes: ``T`` tokens of a micro-batch, ``C`` crops, ``H`` and ``I`` the decoder's widths, ``V`` and ``M`` the tower's.
All sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from phi3v.config import MethodConfig, Packing
from phi3v.data.lengths import RecordLengths
from phi3v.model.shape import ModelShape
from phi3v.processing.hd_transform import CROP_SIZE

Policy = Literal["none", "vision", "selective", "full", "offload"]
RECOMPUTES_ALL: tuple[Policy, ...] = ("full", "offload")
AttentionKind = Literal["eager", "sdpa", "flash_attention_2"]


@dataclass(frozen=True)
class MicroBatch:
    """What a rank computes at once: the largest of a run decides the peak.

    Attributes:
        rows: samples or packs.
        tokens: of all rows, padding included.
        image_tokens: those of images.
        crops: that run through the tower, global views included.
        answer_tokens: supervised tokens, for which there are logits.
        branch_pairs: of a packed row with shared prefixes, queries of branches times the keys of their group, which
            need a mask where no kernel takes the layout itself.
    """

    rows: int
    tokens: int
    image_tokens: int
    crops: int
    answer_tokens: int
    branch_pairs: int = 0

    @classmethod
    def largest_of(cls, lengths: RecordLengths, rows: int) -> MicroBatch:
        """The most of everything that ``rows`` records may have together, padded to the longest."""

        def most(values: npt.NDArray[np.int64]) -> int:
            top = np.sort(values)[-rows:]
            return int(top.sum() * rows / len(top))

        samples = most(lengths.answers)
        return cls(
            rows=samples,
            tokens=samples * int(lengths.longest.max()),
            image_tokens=most(lengths.image_tokens),
            crops=most(lengths.crops),
            answer_tokens=most(lengths.targets),
        )

    @property
    def longest(self) -> int:
        """Tokens of a row."""
        return -(-self.tokens // max(1, self.rows))


@dataclass(frozen=True)
class Gradients:
    """How far back gradients go.

    Attributes:
        tower_trained: something in the tower learns, so that all of the decoder and the projector pass gradients on.
        norms_trained: the decoder's norms learn.
        adapters: number of adapters that a decoder layer and a tower layer has.
    """

    tower_trained: bool
    norms_trained: bool
    adapters: tuple[int, int]

    @classmethod
    def of(cls, model: nn.Module) -> Gradients:
        """Those of a model to which a method was applied."""
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        layer, tower_layer = "model.layers.0.", "encoder.layers.0."
        return cls(
            tower_trained=any("img_processor" in name for name in trained),
            norms_trained=any(f"{layer}input_layernorm" in name for name in trained),
            adapters=(
                sum(layer in name and ".lora_A." in name for name in trained),
                sum(tower_layer in name and ".lora_A." in name for name in trained),
            ),
        )


def kind_of_attention(name: str) -> AttentionKind:
    """Which of three an implementation is by the matrices that it makes: flash attention, flex and varlen make none."""
    if name in ("eager", "packed_mask"):
        return "eager"
    return "sdpa" if name in ("sdpa", "packed_segments") else "flash_attention_2"


def residual_bytes(precision: str, method: MethodConfig) -> int:
    """Bytes of a number of the decoder's residual stream: float32 where the embeddings are."""
    return 4 if precision == "fp32" or method.name == "full" else 2


@dataclass(frozen=True)
class Activations:
    """What is kept, and what comes and goes, where a model of ``shape`` learns in one way.

    Attributes:
        compute_bytes: of a number that products are computed in.
        residual_bytes: as of `residual_bytes`.
        attention: as of `kind_of_attention`.
        adapter_rank: None where whole weights are trained.
    """

    shape: ModelShape
    gradients: Gradients
    compute_bytes: int
    residual_bytes: int
    attention: AttentionKind
    packing: Packing
    adapter_rank: int | None

    def decoder_layer(self, batch: MicroBatch, outputs: int | None = None) -> int:
        """What is kept of one decoder layer that is not recomputed.

        Args:
            outputs: tokens whose output is computed; by default all.
        """
        outputs = batch.tokens if outputs is None else outputs
        a, r, shape = self.compute_bytes, self.residual_bytes, self.shape
        H, I = shape.hidden, shape.intermediate  # noqa: N806, E741
        # float32 input, normalised, cast for the product
        norm = 4 * H + (r * H if self.gradients.norms_trained else 0) + a * H
        qkv = a * (shape.qkv_width + shape.kv_width)  # values lie in the product's output; rotated keys
        # Rotated queries; attention laid out by heads, and again by tokens for the product (or cast for an adapter);
        # the log-sum-exp.
        out = 3 * a * H + 4 * shape.heads
        mlp = a * 4 * I  # gate and up, activation, product
        adapters = a * (self.adapter_rank or 0) * self.gradients.adapters[0]
        kept = batch.tokens * (norm + qkv) + outputs * (norm + out + mlp + adapters)
        kept += a * self.mask_elements(batch)  # each layer makes numbers of the mask's booleans
        if self.attention == "eager" and self.packing == "none":
            kept += batch.rows * shape.heads * batch.longest**2 * (a + 4)  # softmax in float32 and its cast
        return kept

    def selective_layer(self, batch: MicroBatch, outputs: int | None = None) -> int:
        """What is kept of a decoder layer of which norms, rotation and activation are recomputed; else as above."""
        outputs = batch.tokens if outputs is None else outputs
        a, shape = self.compute_bytes, self.shape
        # Attention's output, the products of o_proj, gate_up_proj and down_proj, the adapters' narrow ones.
        products = 3 * shape.hidden + 2 * shape.intermediate + (self.adapter_rank or 0) * self.gradients.adapters[0]
        kept = batch.tokens * (self.residual_bytes * shape.hidden + a * shape.qkv_width)
        return kept + outputs * (a * products + 4 * shape.heads)

    def tower_layer(self, batch: MicroBatch) -> int:
        """What is kept of one tower layer that is not recomputed."""
        a, shape = self.compute_bytes, self.shape
        V, M = shape.tower_width, shape.tower_mlp  # noqa: N806
        casts = 3 if a == 2 else 1  # each of the three products casts its input anew
        attention = 4 * V + a * (casts * V + 3 * V + V) + 4 * shape.tower_heads
        if self.adapter_rank is not None and a == 2:
            attention += a * V
        mlp = 4 * V + a * V + a * 3 * M  # product, sigmoid, activation
        adapters = a * (self.adapter_rank or 0) * self.gradients.adapters[1]
        return batch.crops * shape.patches * (attention + mlp + adapters)

    def mask_elements(self, batch: MicroBatch) -> int:
        """Elements of attention's mask: none where all is causal or the kernel takes lengths or layouts."""
        if self.attention == "flash_attention_2" or self.packing == "none":
            return 0
        return batch.tokens**2 if self.attention == "eager" else batch.branch_pairs

    def boundary(self, batch: MicroBatch) -> int:
        """The input of a decoder layer."""
        return self.residual_bytes * batch.tokens * self.shape.hidden

    def tower_boundary(self, batch: MicroBatch) -> int:
        """The input of a tower layer."""
        return 4 * batch.crops * self.shape.patches * self.shape.tower_width

    def real_crops(self, batch: MicroBatch) -> int:
        """Crops in float32, cut out of the pages."""
        return 4 * self.pages(batch)

    def pages(self, batch: MicroBatch) -> int:
        """Pages of uint8, a little less than their crops."""
        return 3 * CROP_SIZE**2 * batch.crops

    def kept_decoder(self, policy: Policy, batch: MicroBatch) -> int:
        """By the decoder: its layers, rotary tables, the last norm, the head's input, the padding mask."""
        H, r = self.shape.hidden, self.residual_bytes  # noqa: N806
        around = batch.tokens * (4 * H + (r * H if self.gradients.norms_trained else 0) + 2 * r * H // self.shape.heads)
        around += batch.answer_tokens * self.compute_bytes * H + self.mask_elements(batch)
        # The last layer of a row of segments computes what targets are predicted from (`OutputBackend`).
        on_segments = self.packing != "none" and self.attention == "sdpa"
        last = self._layer(policy, batch, batch.answer_tokens if on_segments else None)
        others = 1 if policy == "offload" else self.shape.layers - 1  # one input comes while another is used
        return others * self._layer(policy, batch) + last + around

    def kept_tower(self, policy: Policy, batch: MicroBatch) -> int:
        """By the tower, its inputs apart; nothing where it does not learn."""
        if not self.gradients.tower_trained:
            return 0
        layers = self.shape.tower_layers
        if policy == "offload":  # one comes while another is used; an adapted tower's first has no gradient, and stays
            layers = 2 if self.adapter_rank is None else 3
        kept = layers * (self.tower_layer(batch) if policy == "none" else self.tower_boundary(batch))
        if self.adapter_rank is None:
            # Inputs of the first convolution and of the first norm.
            kept += self.real_crops(batch) + self.tower_boundary(batch)
        return kept

    def kept_projector(self, batch: MicroBatch) -> int:
        """By the projector; nothing where nothing before it learns."""
        if not self.gradients.tower_trained:
            return 0
        return batch.image_tokens * self.compute_bytes * (4 * self.shape.tower_width + 2 * self.shape.hidden)

    def layer_backward(self, policy: Policy, batch: MicroBatch) -> int:
        """Beside what is kept, while gradients go through a decoder layer that is recomputed."""
        layer = self.decoder_layer(batch)
        again = layer - self.selective_layer(batch) if policy == "selective" else layer
        # The gradient of gate and up; under autocast an adapter of down_proj has its input in float32 besides.
        input_copy = 4 if self.gradients.adapters[0] and self.compute_bytes == 2 else 0
        return again + (2 * self.compute_bytes + input_copy) * batch.tokens * self.shape.intermediate

    def decoder_backward(self, policy: Policy, batch: MicroBatch) -> int:
        """Beside what is kept, at most, while gradients go through the decoder."""
        norm = 16 * batch.tokens * self.shape.hidden
        recomputes = policy == "selective" or policy in RECOMPUTES_ALL
        return max(norm, self.layer_backward(policy, batch)) if recomputes else norm

    def tower_forward(self, policy: Policy, batch: MicroBatch) -> int:
        """While the tower runs: its pages, their crops, what is kept and a layer's own."""
        shape, real_crops = self.shape, self.real_crops(batch)
        layer = batch.crops * shape.patches * (3 * self.compute_bytes * shape.tower_mlp + 12 * shape.tower_width)
        return self.pages(batch) + real_crops + max(2 * real_crops, self.kept_tower(policy, batch) + layer)

    def tower_backward(self, policy: Policy, batch: MicroBatch) -> int:
        """Beside what is kept, while gradients go through the tower."""
        shape = self.shape
        back = batch.crops * shape.patches * (2 * self.compute_bytes * shape.tower_mlp + 4 * shape.tower_width)
        return back if policy == "none" else back + self.tower_layer(batch) - self.tower_boundary(batch)

    def moved(self, batch: MicroBatch) -> int:
        """What `offload` copies to the host, and back: the inputs of all layers that gradients go through."""
        tower = self.shape.tower_layers * self.tower_boundary(batch) if self.gradients.tower_trained else 0
        return self.shape.layers * self.boundary(batch) + tower

    def pinned(self, batch: MicroBatch) -> int:
        """Pinned host memory for that: torch rounds each tensor up to a power of two."""
        tower = _power_of_two(self.tower_boundary(batch)) if self.gradients.tower_trained else 0
        return self.shape.layers * _power_of_two(self.boundary(batch)) + self.shape.tower_layers * tower

    def peak(self, policy: Policy, batch: MicroBatch) -> int:
        """The most that activations take at a time, without the loss's own."""
        tower = self.pages(batch) + self.kept_tower(policy, batch) + self.kept_projector(batch)
        moments = [
            self.tower_forward(policy, batch),
            tower + self.kept_decoder(policy, batch) + self.decoder_backward(policy, batch),
        ]
        if self.gradients.tower_trained:
            kept = self.pages(batch) + self.kept_tower(policy, batch)
            moments.append(kept + self.tower_backward(policy, batch))
        return max(moments)

    def _layer(self, policy: Policy, batch: MicroBatch, outputs: int | None = None) -> int:
        if policy in RECOMPUTES_ALL:
            return self.boundary(batch)
        return (self.selective_layer if policy == "selective" else self.decoder_layer)(batch, outputs)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length() if size > 0 else 0
