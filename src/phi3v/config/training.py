"""``training``, ``distributed`` and ``checkpoint``: how it is trained, on what, and what is saved."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from phi3v.config.bounds import require_bounds

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Checkpointing = Literal["auto", "none", "vision", "selective", "full", "offload"]
FeatureCache = Literal["off", "memory", "disk"]
CheckpointFormat = Literal["auto", "whole", "sharded"]
EngineName = Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
Tracker = Literal["wandb", "mlflow", "trackio"]
PRECISIONS: tuple[Precision, ...] = typing.get_args(Precision)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # of torch, by precision


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a precision (``bf16``), or of torch's own name for it (``bfloat16``)."""
    import torch  # takes seconds, and most readers of a configuration need none

    dtype: torch.dtype = getattr(torch, DTYPES.get(name, name))
    return dtype


@dataclass
class LearningRates:
    """Peak learning rates by part; all follow the same schedule."""

    vision: float | None = None
    """Of the vision tower; default: training.learning_rate."""
    projector: float | None = None
    """Of the projector; default: training.learning_rate."""
    decoder: float | None = None
    """Of the decoder, its embeddings and the LM head; default: training.learning_rate."""

    def __post_init__(self) -> None:
        require_bounds(self, "training.learning_rates", above_0="vision projector decoder")


@dataclass
class TrainingConfig:
    """Optimization. Defaults are those of the public recipe."""

    output_dir: str = "output"
    """The run folder."""
    overwrite: bool = False
    """Replace a finished run in output_dir."""
    seed: int = 0
    """Seed of the data order and of new weights."""
    precision: Precision = "auto"
    """Precision of computation; auto is bf16 if the GPU supports it, otherwise fp16, and fp32 on the CPU."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps; overrides epochs."""
    batch_size: int = 16
    """Samples per optimizer step, over all devices."""
    batch_tokens: int | None = None
    """With data.packing: approximate tokens per step over all devices, instead of batch_size samples."""
    micro_batch_size: int = 1
    """Samples that a device computes at once; gradients are accumulated up to batch_size."""
    learning_rate: float = 4e-5
    """Peak learning rate."""
    learning_rates: LearningRates = field(default_factory=LearningRates)
    """Other peak learning rates for some parts."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    adam_beta1: float = 0.9
    """AdamW's beta 1."""
    adam_beta2: float = 0.95
    """AdamW's beta 2."""
    adam_epsilon: float = 1e-7
    """AdamW's epsilon."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Learning rate after the warm-up."""
    warmup_steps: int | None = None
    """Steps of learning-rate warm-up; default: 50, as in the public recipe, but at most a tenth of the run."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: no clipping."""
    kernels: Literal["torch", "liger"] = "torch"
    """liger: Liger's fused norm, rotary embedding, MLP and loss (extra gpu); equal up to rounding."""
    compile: bool = False
    """Compile the layers with torch.compile; the first steps take minutes."""
    fp8: bool = False
    """Compute the decoder's linear layers in float8: faster, but not exact. Needs a GPU of compute capability 8.9 or
    newer (extra gpu); not with qlora."""
    self_check: Literal["auto", "off", "always"] = "auto"
    """Before training, compare each fast kernel with the plain computation on a small row, and use the plain one where
    they disagree. auto: once for each kind of GPU, driver and versions; always: each time, on the CPU too."""
    feature_cache: FeatureCache = "off"
    """With a frozen vision tower: compute the features of each image once and keep them in memory or on disk (in
    PHI3V_CACHE; safe to delete). Useful for several epochs; the size is printed first."""
    loss_weighting: Literal["sample", "token"] = "sample"
    """sample: every record has the same weight (as in the public recipe); token: every answer token has."""
    activation_checkpointing: Checkpointing = "auto"
    """Activations recomputed in the backward pass to save memory: none, those of the vision tower, selective (the
    tower's, and in the decoder all but matrix products and attention) or full; offload: full, and the inputs of layers
    wait in host memory; auto: as few as memory allows."""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16"] = "adamw"
    """adamw: float32 weights and moments; adamw_8bit: bitsandbytes' 8-bit moments; adamw_bf16: weights and moments in
    bf16 with stochastic rounding."""
    lean: bool = False
    """Least memory: bf16 weights with stochastic rounding, optimizer step inside the backward pass, full checkpointing
    or offload; with adamw_8bit or adamw_bf16, on one device, without clipping and accumulation."""
    max_nonfinite_steps: int = 3
    """Steps with a non-finite loss or gradient are skipped; stop after this many in a row."""
    logging_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    report_to: list[Tracker] = field(default_factory=list)
    """Trackers that also get the metrics, in addition to metrics.jsonl and TensorBoard: wandb, mlflow, trackio."""
    progress_bar: bool = True
    """Show progress bars in a terminal; without them, as in a log file, one line per logging step."""

    def __post_init__(self) -> None:
        require_bounds(
            self,
            "training",
            at_least_1="batch_size batch_tokens micro_batch_size logging_steps max_steps max_nonfinite_steps",
            at_least_0="seed weight_decay warmup_steps max_grad_norm",
            above_0="epochs learning_rate adam_epsilon",
            adam_beta1=1,
            adam_beta2=1,
        )


@dataclass
class DistributedConfig:
    """How several processes (GPUs, machines) train one model together."""

    engine: EngineName = "auto"
    """ddp: nothing is sharded; zero1, zero2, zero3: DeepSpeed shards the optimizer state, also the gradients, also the
    weights; fsdp2: torch shards all three. auto: as in the public recipe, zero2 for full and frozen-vision, ddp for
    adapters."""
    offload_optimizer: bool = False
    """zero1, zero2, zero3: keep the optimizer state in host memory."""
    replicas: int = 1
    """fsdp2: copies of the model, each sharded over an equal part of the ranks (HSDP); with the number of machines,
    only gradients travel between them."""
    reduce_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision in which gradients are summed over the ranks: bf16 halves what is sent and rounds each gradient; auto:
    zero1 to zero3 as training.precision, otherwise that of the weights, usually fp32."""
    timeout_minutes: float = 30.0
    """How long a process waits for the others before it gives up."""

    def __post_init__(self) -> None:
        require_bounds(self, "distributed", above_0="timeout_minutes", at_least_1="replicas")


@dataclass
class CheckpointConfig:
    """Checkpoints, from which phi3v train --resume continues an interrupted run."""

    save_steps: int | None = None
    """Optimizer steps between saves, also after the last step; default: by time only."""
    save_minutes: float | None = 30.0
    """Save at the first step after this many minutes without a save; null: by steps only."""
    keep_last: int = 2
    """Number of checkpoints to keep; older ones are deleted. The best weights: see evaluation.keep_best."""
    asynchronous: bool = True
    """Copy to host memory and write while training continues, if the engine and memory allow it."""
    format: CheckpointFormat = "auto"
    """whole: rank 0 gathers and writes everything; sharded: each rank writes its own part to a disk that all share.
    auto: sharded where the engine divides a fully trained model over ranks that share the disk."""

    def __post_init__(self) -> None:
        require_bounds(self, "checkpoint", at_least_1="save_steps keep_last", above_0="save_minutes")
