"""Peak memory of a rank, by part.

Activations are counted by what autograd keeps of each operation of the layers as they are (transformers' Phi-3 decoder
and CLIP blocks, products under autocast), in the manner of Korthikanti et al. 2022 (arXiv 2205.05198), whose closed
form is for another block. Sharding follows Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054).
`benchmarks/plan_accuracy.py` holds the sums to what the allocator counts.

Shapes: ``T`` tokens of a micro-batch, ``C`` crops, ``H`` and ``I`` the decoder's widths, ``V`` and ``M`` the tower's.
All sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi3v.model.loss import LOGITS_PER_CHUNK
from phi3v.plan.inputs import Engine, TrainSetup
from phi3v.plan.parameters import Parameters
from phi3v.plan.shape import ModelShape
from phi3v.processing.hd_transform import CROP_SIZE

# Assumptions, where nothing can be counted.
CUDA_CONTEXT = 0.8e9  # context, cuBLAS workspaces
COLLECTIVES = 0.6e9  # NCCL's buffers, on several ranks
FRAGMENTATION = 0.05  # of what comes and goes
INTERPRETER = 0.7e9  # a CPU process with torch and transformers, before any model
ZERO_BUCKET = 5e8  # elements of DeepSpeed's buckets, as in the public recipe
ZERO3_LIVE = 1e9  # elements that ZeRO-3 keeps gathered at most (its default)


@dataclass(frozen=True)
class MicroBatch:
    """What a rank computes at a time: the largest of a run decides the peak.

    Attributes:
        rows: samples or packs.
        tokens: of all rows, padding included.
        image_tokens: those that are pictures.
        crops: that run through the tower, global views included.
        answer_tokens: that are learnt, for which there are logits.
        is_padded: rows are of uneven length, so that attention needs a mask.
        branch_pairs: of a packed row with shared prefixes, queries of branches times the keys of their group, which
            need a mask where no kernel takes the layout itself.
    """

    rows: int
    tokens: int
    image_tokens: int
    crops: int
    answer_tokens: int
    is_padded: bool = False
    branch_pairs: int = 0

    @property
    def longest(self) -> int:
        """Tokens of a row."""
        return -(-self.tokens // max(1, self.rows))


@dataclass(frozen=True)
class Memory:
    """The peak and what it is made of.

    Attributes:
        parts: bytes of each part at the peak.
        moment: when that is.
    """

    parts: dict[str, int]
    moment: str

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def decoder_layer(shape: ModelShape, setup: TrainSetup, counts: Parameters, batch: MicroBatch) -> int:
    """What autograd keeps of one decoder layer that is not recomputed."""
    a, r = setup.compute_bytes, residual_bytes(setup)
    H, I = shape.hidden, shape.intermediate  # noqa: N806, E741
    norm = 4 * H + (r * H if counts.norms_trained else 0) + a * H  # float32 input, normalised, cast for the product
    qkv = a * (shape.qkv_width + H + shape.kv_width)  # values lie in the product's output; rotated queries and keys
    # Laid out by heads, and again by tokens for the product (or cast for an adapter); the log-sum-exp.
    out = 2 * a * H + 4 * shape.heads
    mlp = a * 4 * I  # gate and up, activation, product
    adapters = a * setup.method.lora.rank * counts.adapters[0]
    kept = batch.tokens * (2 * norm + qkv + out + mlp + adapters)
    kept += a * mask_elements(setup, batch)  # each layer makes numbers of the mask's booleans
    if setup.attention == "eager" and setup.packing == "none":
        kept += batch.rows * shape.heads * batch.longest**2 * (a + 4)  # softmax in float32 and its cast
    return kept


def selective_layer(shape: ModelShape, setup: TrainSetup, batch: MicroBatch) -> int:
    """What is kept of a decoder layer of which norms, rotation and activation are recomputed."""
    a, r = setup.compute_bytes, residual_bytes(setup)
    products = a * (shape.qkv_width + shape.hidden + 2 * shape.intermediate)
    return batch.tokens * (2 * r * shape.hidden + products + 4 * shape.heads)


def tower_layer(shape: ModelShape, setup: TrainSetup, counts: Parameters, batch: MicroBatch) -> int:
    """What autograd keeps of one tower layer that is not recomputed."""
    a = setup.compute_bytes
    V, M = shape.tower_width, shape.tower_mlp  # noqa: N806
    casts = 3 if a == 2 else 1  # each of the three products casts its input anew
    attention = 4 * V + a * (casts * V + 3 * V + V) + 4 * shape.tower_heads
    if setup.is_adapter and a == 2:
        attention += a * V
    mlp = 4 * V + a * V + a * 3 * M  # product, sigmoid, activation
    adapters = a * setup.method.lora.rank * counts.adapters[1]
    return batch.crops * shape.patches * (attention + mlp + adapters)


def mask_elements(setup: TrainSetup, batch: MicroBatch) -> int:
    """Elements of attention's mask: none where all is causal or the kernel takes lengths or layouts."""
    if setup.attention == "flash_attention_2":
        return 0
    if setup.packing == "none":
        return batch.rows * batch.longest**2 if batch.is_padded else 0
    return batch.tokens**2 if setup.attention == "eager" else batch.branch_pairs


def residual_bytes(setup: TrainSetup) -> int:
    """Bytes of a number of the decoder's residual stream: float32 where the embeddings are."""
    return 4 if setup.precision == "fp32" or setup.method.name == "full" else 2


def predict_memory(shape: ModelShape, counts: Parameters, setup: TrainSetup, batch: MicroBatch, *, cpu: bool) -> Memory:
    """The peak of a training step that is not the first (the optimizer has its moments).

    Args:
        cpu: the device is a CPU, with the process's own memory in place of a GPU's context.
    """
    a, r = setup.compute_bytes, residual_bytes(setup)
    static = _static(shape, counts, setup)
    tokens, patches = batch.tokens, batch.crops * shape.patches

    # Kept from the forward pass to the backward pass.
    layer, tower = decoder_layer(shape, setup, counts, batch), tower_layer(shape, setup, counts, batch)
    boundary, tower_boundary = r * tokens * shape.hidden, 4 * patches * shape.tower_width
    per_layer = {"none": layer, "vision": layer, "selective": selective_layer(shape, setup, batch), "full": boundary}
    kept_decoder = shape.layers * per_layer[setup.checkpointing] + _around_decoder(shape, setup, counts, batch)
    kept_tower = kept_projector = 0
    inputs = 3 * CROP_SIZE**2 * batch.crops  # uint8 pages, a little less than their crops
    real_crops = 4 * inputs  # cut out of them in float32
    if counts.tower_trained:
        kept_tower = shape.tower_layers * (tower if setup.checkpointing == "none" else tower_boundary)
        kept_projector = batch.image_tokens * a * (4 * shape.tower_width + 2 * shape.hidden)
        if not setup.is_adapter:
            kept_tower += real_crops + tower_boundary  # inputs of the first convolution and of the first norm
    kept = {"tower": inputs + kept_tower + kept_projector, "decoder": kept_decoder}

    # What comes and goes.
    recomputes = setup.checkpointing in ("selective", "full")
    norm_back = 16 * tokens * shape.hidden
    layer_back = (layer - per_layer["selective"] if setup.checkpointing == "selective" else layer) + (
        2 * a * tokens * shape.intermediate
    )
    decoder_back = max(norm_back, layer_back) if recomputes else norm_back
    tower_forward = patches * (3 * a * shape.tower_mlp + 12 * shape.tower_width)
    tower_back = patches * (2 * a * shape.tower_mlp + 4 * shape.tower_width)
    if setup.checkpointing != "none":
        tower_back += tower - tower_boundary
    # Of one chunk of answer tokens: float32 log-probabilities, their gradient, the logits'.
    logits = 12 * min(batch.answer_tokens * shape.vocabulary, LOGITS_PER_CHUNK)
    casts_weights = a == 2 and setup.engine == "ddp" and not setup.is_adapter and setup.optimizer != "adamw_bf16"
    weight_casts = a * counts.cast_elements if casts_weights else 0
    layer_casts = a * counts.decoder_layer_cast if casts_weights else 0
    late_casts = layer_casts if recomputes else weight_casts
    one_gradient = counts.largest_matrix * (a + 4 if a == 2 else 4)

    step = static["gradients"]
    early = step if setup.accumulates else 0  # gradients that are there before the backward pass
    moments: dict[str, dict[str, float]] = {
        "tower, forward": {"gradients": early, "tower": inputs + real_crops + max(2 * real_crops, tower_forward)},
        "end of the forward pass": kept | {"gradients": early, "weight casts": weight_casts, "logits": logits * 2 / 3},
        "loss, backward": kept | {"gradients": early, "weight casts": late_casts, "logits": logits},
        "decoder, backward": {
            "gradients": early or one_gradient,
            "weight casts": late_casts,
            "tower": kept["tower"],
            "decoder": kept_decoder + decoder_back,
        },
        "first decoder layer, backward": {
            "gradients": step + one_gradient,
            "weight casts": layer_casts,
            "tower": kept["tower"],
            "decoder": boundary + layer_back,
        },
        "optimizer step": {"gradients": step, "optimizer work": _optimizer_work(counts, setup), "tower": inputs},
    }
    if counts.tower_trained:
        moments["tower, backward"] = {
            "gradients": step + one_gradient,
            "tower": inputs + kept_tower + tower_back,
        }
    constant = {name: size for name, size in static.items() if name != "gradients"}
    best = max(moments, key=lambda name: sum(moments[name].values()))
    parts = constant | moments[best]
    if cpu:
        parts["overhead"] = INTERPRETER
    else:
        coming = sum(moments[best].values()) - moments[best].get("gradients", 0)
        parts["overhead"] = CUDA_CONTEXT + FRAGMENTATION * coming + (COLLECTIVES if setup.gpus > 1 else 0)
    return Memory({name: int(size) for name, size in parts.items() if size}, best)


def _around_decoder(shape: ModelShape, setup: TrainSetup, counts: Parameters, batch: MicroBatch) -> int:
    """Kept outside the decoder's layers: rotary tables, the last norm, the head's input, the padding mask."""
    a, r = setup.compute_bytes, residual_bytes(setup)
    H = shape.hidden  # noqa: N806
    kept = batch.tokens * (4 * H + (r * H if counts.norms_trained else 0) + 2 * r * H // shape.heads)
    kept += batch.answer_tokens * a * H
    return kept + mask_elements(setup, batch)


def _optimizer_work(counts: Parameters, setup: TrainSetup) -> float:
    """Temporaries of a step: the plain AdamW of a GPU holds the root of all second moments at once."""
    if setup.offload_optimizer:
        return 0.0
    if setup.optimizer != "adamw" or setup.fused_optimizer:
        return 4 * counts.largest_matrix
    if setup.engine == "ddp":
        return 4 * counts.trainable
    return 4 * counts.trainable / setup.gpus


def _static(shape: ModelShape, counts: Parameters, setup: TrainSetup) -> dict[str, float]:
    """What is there all the time, on a rank of ``setup.gpus``.

    DDP and FSDP2 keep float32 weights and cast them for products; DeepSpeed's ZeRO computes on half-precision weights
    and keeps float32 masters beside the moments.
    """
    a, n, trained = setup.compute_bytes, setup.gpus, counts.trainable
    moments = counts.optimizer_bytes(setup.optimizer)
    weight, gradient = (2, 2) if setup.optimizer == "adamw_bf16" else (4, 4)
    frozen = counts.frozen_bytes
    engine: Engine = setup.engine if n > 1 else "ddp"
    if engine == "ddp":
        # Its buckets are a second copy of the gradients.
        buckets = gradient * trained if n > 1 else 0
        return {
            "weights": frozen + weight * trained,
            "gradients": gradient * trained,
            "optimizer": moments,
            "communication": buckets,
        }
    if engine == "fsdp2":
        # Two layers are gathered at a time, the head and the embeddings as groups of their own.
        gathered = a * (2 * shape.layer_parameters + 2 * shape.hidden * shape.vocabulary)
        return {
            "weights": (frozen + weight * trained) / n,
            "gradients": gradient * trained / n,
            "optimizer": moments / n,
            "communication": gathered + 4 * shape.layer_parameters,
        }
    masters = 0 if setup.precision == "fp32" or setup.optimizer == "adamw_bf16" else 4 * trained
    sharded_gradients = engine in ("zero2", "zero3")
    static = {
        "weights": frozen + a * trained,
        "gradients": a * trained / (n if sharded_gradients else 1),
        "optimizer": 0 if setup.offload_optimizer else (masters + moments) / n,
        # Reduce and gather buckets, and the partition's gradients in float32 for the step.
        "communication": 2 * a * min(ZERO_BUCKET, trained) + (0 if setup.offload_optimizer else 4 * trained / n),
    }
    if engine == "zero3":
        static["weights"] /= n
        static["communication"] += a * min(ZERO3_LIVE, counts.total)
    return static
