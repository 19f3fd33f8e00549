"""Peak memory of a rank, by part.

Activations are counted as in `phi3v.train.compute.activations`; sharding follows Rajbhandari et al. 2020 (ZeRO, arXiv
1910.02054). `benchmarks/plan_accuracy.py` holds the sums to what the allocator counts. All sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi3v.model.loss import LOGITS_PER_CHUNK
from phi3v.model.shape import ModelShape
from phi3v.plan.inputs import Engine, TrainSetup
from phi3v.plan.parameters import Parameters
from phi3v.train.compute.activations import RECOMPUTES_ALL, Activations, MicroBatch, residual_bytes
from phi3v.train.methods.optimizers import SLICE

# Assumptions, where nothing can be counted.
CUDA_CONTEXT = 0.8e9  # context, cuBLAS workspaces
COLLECTIVES = 0.6e9  # NCCL's buffers, on several ranks
FRAGMENTATION = 0.05  # of what comes and goes
INTERPRETER = 0.7e9  # a CPU process with torch and transformers, before any model
ZERO_BUCKET = 5e8  # elements of DeepSpeed's buckets, as in the public recipe
UPDATE_BYTES = 20  # of an element that is stepped in bf16: float32 weight, gradient, two moments, random bits
ZERO3_LIVE = 1e9  # elements that ZeRO-3 keeps gathered at most (its default)


@dataclass(frozen=True)
class Memory:
    """The peak and what it is made of.

    Attributes:
        parts: bytes of each part at the peak.
        moment: when that is.
        pinned: bytes of the host's memory beside them.
    """

    parts: dict[str, int]
    moment: str
    pinned: int = 0

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def activations_of(shape: ModelShape, counts: Parameters, setup: TrainSetup) -> Activations:
    """What a set-up keeps of its model's activations."""
    return Activations(
        shape,
        counts.gradients,
        compute_bytes=setup.compute_bytes,
        residual_bytes=residual_bytes(setup.precision, setup.method),
        attention=setup.attention,
        packing=setup.packing,
        adapter_rank=setup.method.lora.rank if setup.is_adapter else None,
    )


def predict_memory(shape: ModelShape, counts: Parameters, setup: TrainSetup, batch: MicroBatch, *, cpu: bool) -> Memory:
    """The peak of a training step that is not the first (the optimizer has its moments).

    Args:
        cpu: the device is a CPU, with the process's own memory in place of a GPU's context.
    """
    a, policy = setup.compute_bytes, setup.checkpointing
    if cpu and policy == "offload":  # from the host to the host
        policy = "full"
    static = _static(shape, counts, setup)
    activations = activations_of(shape, counts, setup)
    pages = activations.pages(batch)
    kept_tower, kept_decoder = activations.kept_tower(policy, batch), activations.kept_decoder(policy, batch)
    kept = {"tower": pages + kept_tower + activations.kept_projector(batch), "decoder": kept_decoder}

    # What comes and goes.
    recomputes = policy == "selective" or policy in RECOMPUTES_ALL
    # Of one chunk of answer tokens: float32 log-probabilities, their gradient, the logits'.
    logits = 12 * min(batch.answer_tokens * shape.vocabulary, LOGITS_PER_CHUNK)
    casts_weights = a == 2 and setup.engine == "ddp" and not setup.keeps_bf16_weights
    weight_casts = a * counts.cast_elements if casts_weights else 0
    layer_casts = a * counts.decoder_layer_cast if casts_weights else 0
    late_casts = layer_casts if recomputes else weight_casts
    one_gradient: float = counts.largest_matrix * (a + 4 if a == 2 else 4)
    if setup.lean:  # used up where it is made
        one_gradient += _optimizer_work(counts, setup)

    step = static["gradients"]
    early = step if setup.accumulates else 0  # gradients that are there before the backward pass
    # They come from the back of the model to its front.
    behind_decoder = early or step * counts.trainable_but("vision", "projector", "embeddings")
    behind_tower = early or step * counts.trainable_but("vision")
    moments: dict[str, dict[str, float]] = {
        "tower, forward": {"gradients": early, "tower": activations.tower_forward(policy, batch)},
        "end of the forward pass": kept | {"gradients": early, "weight casts": weight_casts, "logits": logits * 2 / 3},
        "loss, backward": kept | {"gradients": early, "weight casts": late_casts, "logits": logits},
        "decoder, backward": {
            "gradients": early or one_gradient,
            "weight casts": late_casts,
            "tower": kept["tower"],
            "decoder": kept_decoder + activations.decoder_backward(policy, batch),
        },
        "first decoder layer, backward": {
            "gradients": behind_decoder + one_gradient,
            "weight casts": layer_casts,
            "tower": kept["tower"],
            "decoder": activations.boundary(batch) + activations.layer_backward(policy, batch),
        },
        "optimizer step": {"gradients": step, "optimizer work": _optimizer_work(counts, setup), "tower": pages},
    }
    if counts.gradients.tower_trained:
        moments["tower, backward"] = {
            "gradients": behind_tower + one_gradient,
            "tower": pages + kept_tower + activations.tower_backward(policy, batch),
        }
    constant = {name: size for name, size in static.items() if name != "gradients"}
    best = max(moments, key=lambda name: sum(moments[name].values()))
    parts = constant | moments[best]
    if cpu:
        parts["overhead"] = INTERPRETER
    else:
        coming = sum(moments[best].values()) - moments[best].get("gradients", 0)
        parts["overhead"] = CUDA_CONTEXT + FRAGMENTATION * coming + (COLLECTIVES if setup.gpus > 1 else 0)
    pinned = activations.pinned(batch) if policy == "offload" else 0
    return Memory({name: int(size) for name, size in parts.items() if size}, best, pinned)


def _optimizer_work(counts: Parameters, setup: TrainSetup) -> float:
    """Temporaries of a step: none of fused AdamW; ZeRO's plain one holds the root of its second moments at once."""
    if setup.keeps_bf16_weights:
        return UPDATE_BYTES * min(SLICE, counts.largest_matrix)
    is_plain = setup.optimizer == "adamw" and setup.engine.startswith("zero") and setup.gpus > 1
    return 4 * counts.trainable / setup.gpus if is_plain and not setup.offload_optimizer else 0.0


def _static(shape: ModelShape, counts: Parameters, setup: TrainSetup) -> dict[str, float]:
    """What is there all the time, on a rank of ``setup.gpus``.

    DDP and FSDP2 keep float32 weights and cast them for products; DeepSpeed's ZeRO computes on half-precision weights
    and keeps float32 masters beside the moments.
    """
    a, n, trained = setup.compute_bytes, setup.gpus, counts.trainable
    moments = counts.optimizer_bytes(setup.optimizer)
    weight = 2 if setup.keeps_bf16_weights else 4
    gradient = 0 if setup.lean else weight
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
        shards = n // setup.replicas
        return {
            "weights": (frozen + weight * trained) / shards,
            "gradients": gradient * trained / shards,
            "optimizer": moments / shards,
            "communication": gathered + (2 if setup.reduces_bf16 else 4) * shape.layer_parameters,
        }
    masters = 0 if setup.precision == "fp32" else 4 * trained
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
