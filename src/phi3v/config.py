"""The configuration of a run: a typed tree, read from a recipe (YAML) and the command line.

The docstring of a field is its help text. Unknown keys are errors that suggest the nearest key. The resolved tree is
written into every run folder.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import itertools
import math
import re
import types
import typing
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from phi3v.errors import UserError
from phi3v.grammar import RECIPES, Parser, find_recipe, suggestion, words_of
from phi3v.paths import absolute, is_hub_id, now_at, url_of

if TYPE_CHECKING:
    import torch

BOOLEAN, INTEGER, FLOAT = ("tag:yaml.org,2002:" + name for name in ("bool", "int", "float"))
NUMBER = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:e[-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$", re.IGNORECASE
)


class YamlLoader(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2: ``[yes, no]`` are two strings, 1e-3 is a number, 010 is ten, 1:30 is a string.

    A duplicate key is an error; PyYAML takes the last one.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML defines it
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                keys.add(key.value)
        return node


class YamlDumper(yaml.SafeDumper):
    """Quotes strings that YAML 1.1 or 1.2 would read as something else."""


YamlLoader.add_implicit_resolver(BOOLEAN, re.compile(r"^(?:[Tt]rue|TRUE|[Ff]alse|FALSE)$"), "tTfF")
YamlLoader.add_implicit_resolver(INTEGER, re.compile(r"^[-+]?[0-9][0-9_]*$"), "-+0123456789")
YamlLoader.add_constructor(INTEGER, lambda loader, node: int(node.value))
for kind in (YamlLoader, YamlDumper):
    kind.add_implicit_resolver(FLOAT, NUMBER, "-+.0123456789")


def read_yaml(text: str) -> Any:
    """The value of a YAML document, see `YamlLoader`."""
    return yaml.load(text, YamlLoader)  # a SafeLoader


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a precision (``bf16``), or of torch's own name for it (``bfloat16``)."""
    import torch  # takes seconds, and most readers of a configuration need none

    dtype: torch.dtype = getattr(torch, DTYPES.get(name, name))
    return dtype


# Pillow's own warning threshold: a quarter of a GiB at 3 bytes per pixel.
SHUFFLE_WINDOW = 32
CACHE_LIMIT = 100.0
DEFAULT_MAX_PIXELS = 89_478_485

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Checkpointing = Literal["auto", "none", "vision", "selective", "full", "offload"]
FeatureCache = Literal["off", "memory", "disk"]
METRIC_NAMES = (
    "accuracy",
    "anls",
    "exact_match",
    "relaxed_accuracy",
    "token_f1",
    "per_class_accuracy",
    "auroc",
    "consistency",
)
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex", "varlen"]
MethodName = Literal["full", "frozen-vision", "lora", "qlora"]
ObjectiveName = Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo"]
PRECISIONS: tuple[Precision, ...] = typing.get_args(Precision)
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # of torch, by precision
METHODS: tuple[MethodName, ...] = typing.get_args(MethodName)
Packing = Literal["none", "samples", "shared-image"]
Part = Literal["decoder", "head", "vision", "projector"]
CheckpointFormat = Literal["auto", "whole", "sharded"]
EngineName = Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
Tracker = Literal["wandb", "mlflow", "trackio"]


def _require(
    group: Any, name: str, *, above_0: str = "", at_least_0: str = "", at_least_1: str = "", **share: float
) -> None:
    """Refuse values of keys (several in one text) that are out of bounds; keys that are not set pass.

    Args:
        share: keys from 0 to this value.
    """
    bounds = [(key, 0.0, None) for key in at_least_0.split()] + [(key, 1.0, None) for key in at_least_1.split()]
    for key, low, high in [*bounds, *((key, 0.0, most) for key, most in share.items())]:
        value = getattr(group, key)
        if value is not None and value < low:
            raise UserError(f"must be at least {low:g}, got {value}", where=f"{name}.{key}")
        if value is not None and high is not None and value > high:
            raise UserError(f"must be at most {high:g}, got {value}", where=f"{name}.{key}")
    for key in above_0.split():
        value = getattr(group, key)
        if value is not None and value <= 0:
            raise UserError(f"must be above 0, got {value}", where=f"{name}.{key}")


@dataclass
class ModelConfig:
    """The model to fine-tune, and how it reads images."""

    path: str = "microsoft/Phi-3.5-vision-instruct"
    """A folder in the official layout, or a hub id."""
    num_crops: int | None = None
    """Maximum number of crops per image (recommended: 16 for one image, 4 for several); default: the model's own."""
    attention: Attention = "auto"
    """Attention of the decoder; auto chooses the fastest available and prints the reason. flex: torch's FlexAttention,
    on a GPU. varlen: torch's variable-length flash attention, on a GPU, for packed rows only."""

    def __post_init__(self) -> None:
        _require(self, "model", at_least_1="num_crops")


@dataclass(frozen=True)
class DataSource:
    """One of several data files; takes one of ``weight``, ``epochs`` and ``max_records`` at most.

    Attributes:
        path: of the file.
        name: in logs and reports; default: the file's name without its ending.
        weight: its share of an epoch's records, in proportion to the weights of the others.
        epochs: how often an epoch takes each record; default: once.
        max_records: how many records an epoch takes, others each time.
    """

    path: str
    name: str = ""
    weight: float | None = None
    epochs: float | None = None
    max_records: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or Path(self.path).stem)


Sources = str | list[DataSource] | None
AMOUNTS = ("weight", "epochs", "max_records")
SOURCES_HINT = "'[{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]'"
# What all trackers take in the name of a metric.
_SOURCE_NAME = re.compile(r"[A-Za-z0-9_.-]+( [A-Za-z0-9_.-]+)*")


def _list_sources(value: Sources) -> list[DataSource]:
    return [DataSource(value)] if isinstance(value, str) else list(value or ())


def _check_sources(sources: Sequence[DataSource], where: str, amounts: Sequence[str]) -> None:
    """Refuse sources that contradict themselves or each other."""
    if not sources:
        raise UserError("lists no source", where=where, hint=f"give a file, or a list such as {SOURCES_HINT}")
    named: dict[str, int] = {}
    for index, source in enumerate(sources):
        here = f"{where}[{index}]"
        _require(source, here, above_0="weight epochs", at_least_1="max_records")
        given = [name for name in AMOUNTS if getattr(source, name) is not None]
        for name in given:
            if name not in amounts:
                hint = f"leave it out; an evaluation source takes {', '.join(amounts)}"
                raise UserError("an evaluation asks every question once", where=f"{here}.{name}", hint=hint)
        if len(given) > 1:
            what = f"{' and '.join(given)} each say how much of a source an epoch takes"
            raise UserError(what, where=here, hint="give one of them")
        if not _SOURCE_NAME.fullmatch(source.name):
            what = f"{source.name!r} has characters that trackers do not take in a name"
            raise UserError(what, where=f"{here}.name", hint="give it one of letters, digits and . _ -")
        if source.name in named:
            what = f"{source.name!r} is the name of {where}[{named[source.name]}] too"
            raise UserError(what, where=f"{here}.name", hint="give each source a name of its own, e.g. name: receipts")
        named[source.name] = index
    weighted = [index for index, source in enumerate(sources) if source.weight is not None]
    if len(weighted) == 1:
        raise UserError(
            "it is the only source with a weight, and a weight says how much of it there is beside the others",
            where=f"{where}[{weighted[0]}].weight",
            hint="give the others weights too, or use epochs or max_records",
        )


@dataclass
class DataConfig:
    """The data files, and how they are read."""

    train: Sources = None
    """JSONL file to train on; its images are in the folder images/ next to it. Or a folder or URL of shards
    (`phi3v data shard`). Or several as a list, each with one of weight, epochs, max_records, and a name:
    '[{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]'."""
    eval: Sources = None
    """JSONL file to evaluate on before and after training; none: no evaluation. Or several as a list, each with
    max_records and a name, which get a score each."""
    mixture_ends: Literal["first", "all"] = "first"
    """Where sources have weights, an epoch ends when the first of them has been seen whole, or when all have, for which
    the smaller ones repeat."""
    image_check: Literal["decode", "header", "off"] = "decode"
    """How images are checked before the model loads: decoded in full (finds truncated files), header only, or not."""
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    """Larger images are refused without decoding them."""
    exif_orientation: bool = True
    """Rotate images by their EXIF orientation, as viewers do; false: use the pixels as stored."""
    special_text: Literal["refuse", "escape"] = "refuse"
    """Text such as <|end|> in the data: refuse it with its line, or break it up with a space."""
    num_workers: int | None = None
    """Processes that read images; default: with a GPU the number of cores minus one, at most 8; otherwise none."""
    packing: Packing = "none"
    """none: padded batches; samples: whole records packed into rows without padding; shared-image: also, records with
    the same images share them, computed once. Neither changes a record's loss or gradient."""
    pack_tokens: int = 8192
    """Maximum tokens of a packed row, which a device computes at once; a longer record gets a row of its own."""
    shared_image_max: int = 8
    """shared-image: maximum number of records with the same images in one step; the others go into other steps."""
    shuffle_window: int = SHUFFLE_WINDOW
    """Of shards (`phi3v data shard`): number of shards whose records are shuffled together; at least the number of
    ranks, each of which then reads shards of its own."""
    cache_limit: float = CACHE_LIMIT
    """GB of local disk (in $PHI3V_CACHE) for shards that are fetched from a URL."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """An image that cannot be read during training: stop, or leave out its record, count it and list it."""

    def __post_init__(self) -> None:
        counts = "max_image_pixels pack_tokens shared_image_max shuffle_window"
        _require(self, "data", at_least_1=counts, at_least_0="num_workers cache_limit")
        if isinstance(self.train, list):
            _check_sources(self.train, "data.train", AMOUNTS)
        if isinstance(self.eval, list):
            _check_sources(self.eval, "data.eval", ("max_records",))
        if self.mixture_ends != "first" and not any(source.weight for source in self.train_sources):
            raise UserError(
                "no source has a weight, so an epoch ends when it has taken what each source says",
                where="data.mixture_ends",
                hint="give the sources of data.train weights, or leave it out",
            )

    @property
    def paths(self) -> list[tuple[str, str]]:
        """The key and the path of every data file, those to train on first."""
        found = []
        for key, data in (("data.train", self.train), ("data.eval", self.eval)):
            if isinstance(data, str):
                found.append((key, data))
            elif data is not None:
                found += [(f"{key}[{index}]", source.path) for index, source in enumerate(data)]
        return found

    @property
    def train_sources(self) -> list[DataSource]:
        """The files to train on; none if there is none."""
        return _list_sources(self.train)

    @property
    def eval_sources(self) -> list[DataSource]:
        """The files to evaluate on; none if there is none."""
        return _list_sources(self.eval)

    @property
    def reading(self) -> dict[str, Any]:
        """How to read a data file: the keyword arguments that all readers share."""
        return {
            "special_text": self.special_text,
            "max_pixels": self.max_image_pixels,
            "exif_orientation": self.exif_orientation,
            "cache_limit": self.cache_limit,
            "shuffle_window": self.shuffle_window,
        }


@dataclass
class LoraConfig:
    """Adapters, for the methods lora and qlora."""

    rank: int = 64
    """Rank of every adapter."""
    alpha_ratio: float = 2.0
    """LoRA's alpha divided by its rank."""
    dropout: float = 0.0
    """Dropout before the adapters."""
    parts: list[Part] = field(default_factory=lambda: ["decoder", "head", "vision", "projector"])
    """Parts of the model that get adapters; without vision and projector, the vision part is frozen."""
    targets: list[str] | None = None
    """Names of linear layers to adapt, instead of parts; each must match a layer."""
    also_train: list[Literal["vision", "projector"]] = field(default_factory=list)
    """Parts trained in full instead of with adapters; the separators sub_GN and glb_GN stay frozen."""
    double_quant: bool = False
    """qlora: also quantise the quantisation constants."""
    dora: bool = False
    """DoRA: also learn the magnitude of every column of an adapted weight (arXiv 2402.09353)."""
    rslora: bool = False
    """rsLoRA: scale adapters by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)."""
    init: Literal["gaussian", "default", "pissa"] = "gaussian"
    """Initial adapters. gaussian: as in the public recipe; default: PEFT's; with both the model starts unchanged.
    pissa: the principal singular vectors of the weights (arXiv 2404.02948); saved as a plain LoRA."""
    lora_plus_ratio: float | None = None
    """LoRA+: the learning rate of the B matrices divided by that of the A matrices, e.g. 16 (arXiv 2402.12354)."""

    def __post_init__(self) -> None:
        _require(self, "method.lora", at_least_1="rank", above_0="alpha_ratio lora_plus_ratio", dropout=0.99)
        if self.dora and self.init == "pissa":
            raise UserError(
                "a PiSSA adapter is saved as the difference from its start, which DoRA does not allow",
                where="method.lora.init",
                hint="use gaussian, or set method.lora.dora to false",
            )
        if not (self.parts if self.targets is None else self.targets):
            raise UserError("there is no layer to adapt", where="method.lora.parts", hint="name at least one part")

    @property
    def alpha(self) -> float:
        return self.rank * self.alpha_ratio


@dataclass
class MethodConfig:
    """What is trained."""

    name: MethodName = "full"
    """full: everything; frozen-vision: decoder and LM head; lora, qlora: adapters on a frozen (4-bit) model."""
    train_embeddings: bool = False
    """frozen-vision: also train the token embeddings (the public recipe freezes them with the vision part)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""

    def __post_init__(self) -> None:
        if self.name == "qlora" and self.lora.init == "pissa":
            raise UserError(
                "PiSSA moves part of the weights into the adapters, and the remainder cannot be kept in 4 bits",
                where="method.lora.init",
                hint="use gaussian, or method.name lora",
            )

    @property
    def uses_adapters(self) -> bool:
        """Whether adapters on a frozen model are trained."""
        return self.name in ("lora", "qlora")


# By objective, where objective.beta is not given: as in the papers.
BETAS: dict[ObjectiveName, float] = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}


@dataclass
class ObjectiveConfig:
    """What is learned: the answers, or to prefer some answers to others."""

    name: ObjectiveName = "sft"
    """sft: supervised, the answers as they are. From pairs of a chosen and a rejected answer: dpo (arXiv 2305.18290),
    ipo (arXiv 2310.12036), and without a reference model orpo (arXiv 2403.07691), simpo (arXiv 2405.14734). From
    answers judged one by one, or from pairs: kto (arXiv 2402.01306)."""
    beta: float | None = None
    """How closely the model stays to the reference (small: freely); of ipo its regularization, of simpo the scale of
    the rewards, of orpo the weight of the odds ratio; default: 0.1, and 2.0 for simpo."""
    label_smoothing: float = 0.0
    """dpo, simpo: the probability that a pair is the wrong way round (conservative DPO)."""
    gamma: float = 1.0
    """simpo: the margin by which the chosen answer's reward should be higher."""
    length_normalised: bool | None = None
    """dpo, ipo: divide the log-probability of an answer by its number of tokens; default: as TRL, for ipo alone. orpo
    and simpo always do, kto never does."""
    preference_weight: float = 1.0
    """dpo, ipo, simpo: weight of the preference loss, beside the two that follow; MPO (arXiv 2411.10442): 0.8."""
    quality_weight: float = 0.0
    """dpo, ipo: weight of a loss that each answer is good or bad by itself (BCO, arXiv 2404.04656); MPO: 0.2."""
    sft_weight: float | None = None
    """Weight of the supervised loss of the chosen answer, not of kto; default: 0, and 1 for orpo. MPO: 1."""
    desirable_weight: float = 1.0
    """kto: weight of good answers."""
    undesirable_weight: float = 1.0
    """kto: weight of bad answers."""

    def __post_init__(self) -> None:
        weights = "preference_weight quality_weight sft_weight desirable_weight undesirable_weight"
        _require(self, "objective", above_0="beta", at_least_0=f"gamma {weights}", label_smoothing=0.5)
        takers = {
            "label_smoothing": ("dpo", "simpo"),
            "gamma": ("simpo",),
            "length_normalised": ("dpo", "ipo"),
            "preference_weight": ("dpo", "ipo", "simpo"),
            "quality_weight": ("dpo", "ipo"),
            "sft_weight": ("dpo", "ipo", "orpo", "simpo"),
            "desirable_weight": ("kto",),
            "undesirable_weight": ("kto",),
            "beta": tuple(BETAS),
        }
        for key, names in takers.items():
            default = ObjectiveConfig.__dataclass_fields__[key].default
            if self.name not in names and getattr(self, key) != default:
                hint = f"leave it out; it belongs to {', '.join(names)}"
                raise UserError(f"{self.name} does not take it", where=f"objective.{key}", hint=hint)

    @property
    def is_preference(self) -> bool:
        """Whether it learns from preferences."""
        return self.name != "sft"

    @property
    def takes_pairs(self) -> bool:
        """Whether every record must have a chosen and a rejected answer."""
        return self.name in ("dpo", "ipo", "orpo", "simpo")

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the model that training begins with."""
        return self.name in ("dpo", "ipo", "kto")

    @property
    def scale(self) -> float:
        """``beta``, or its default."""
        return self.beta if self.beta is not None else BETAS[self.name]

    @property
    def divides_by_length(self) -> bool:
        """Whether a score is an answer's mean over its tokens."""
        if self.length_normalised is not None:
            return self.length_normalised
        return self.name in ("ipo", "orpo", "simpo")

    @property
    def supervised_weight(self) -> float:
        """``sft_weight``, or its default."""
        return self.sft_weight if self.sft_weight is not None else float(self.name == "orpo")


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
        _require(self, "training.learning_rates", above_0="vision projector decoder")


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
        _require(
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
        _require(self, "distributed", above_0="timeout_minutes", at_least_1="replicas")


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
        _require(self, "checkpoint", at_least_1="save_steps keep_last", above_0="save_minutes")


@dataclass
class EvaluationConfig:
    """Evaluation by generating answers: before, during and after training, and in phi3v eval."""

    before: bool = True
    """Evaluate before training."""
    after: bool = True
    """Evaluate after training."""
    metrics: list[str] = field(default_factory=lambda: ["accuracy"])
    """Metrics, the primary one first (it selects the best weights): accuracy, anls, exact_match, relaxed_accuracy,
    token_f1, per_class_accuracy, auroc, consistency."""
    answer_words: list[str] = field(default_factory=list)
    """Answers whose probabilities are computed, for auroc; the positive one first, e.g. [yes, no]."""
    max_questions: int | None = None
    """Number of questions, sampled once from the whole file with the seed; default: all."""
    batch_size: int = 8
    """Questions answered at once on a device."""
    batch_tokens: int = 32768
    """Maximum prompt tokens of such a batch, including padding; longer prompts make smaller batches."""
    max_new_tokens: int | None = None
    """Maximum tokens of an answer; default: a quarter more than the longest reference answer, from 64 to 2048."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations during training, also after the last step; default: none."""
    eval_steps_questions: int | None = None
    """Number of questions of an evaluation during training; default: as before and after."""
    keep_best: bool = False
    """Keep the weights with the best score of eval_steps in best/ and use them for final/, instead of the last ones."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without a better score; default: never."""

    def __post_init__(self) -> None:
        counts = "max_questions batch_size batch_tokens max_new_tokens"
        during = "eval_steps eval_steps_questions early_stopping_patience"
        _require(self, "evaluation", at_least_1=f"{counts} {during}")
        self._check_metrics()
        for key in ("eval_steps_questions", "keep_best", "early_stopping_patience"):
            if getattr(self, key) and self.eval_steps is None:
                hint = "set evaluation.eval_steps, e.g. to 100"
                raise UserError("there is no evaluation during training", where=f"evaluation.{key}", hint=hint)

    def _check_metrics(self) -> None:
        where = "evaluation.metrics"
        if not self.metrics:
            raise UserError("no metric is named", where=where, hint=f"choose from {', '.join(METRIC_NAMES)}")
        for name in self.metrics:
            if name not in METRIC_NAMES:
                hint = suggestion(name, METRIC_NAMES, f"choose from {', '.join(METRIC_NAMES)}")
                raise UserError(f"there is no metric {name!r}", where=where, hint=hint)
            if self.metrics.count(name) > 1:
                raise UserError(f"{name} is named twice", where=where, hint="name it once")
        where = "evaluation.answer_words"
        if self.answer_words and (len(set(self.answer_words)) < max(2, len(self.answer_words))):
            raise UserError("needs at least two different words", where=where, hint="e.g. [yes, no]")
        if not all(word.strip() for word in self.answer_words):
            raise UserError("holds an empty word", where=where, hint="e.g. [yes, no]")
        if "auroc" in self.metrics and not self.answer_words:
            raise UserError(
                "auroc needs the answers whose probabilities it compares",
                where=where,
                hint="name them, the positive one first, e.g. [yes, no]",
            )


@dataclass
class RunConfig:
    """A run of ``phi3v train``."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """What is trained."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is learned."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it is trained."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How several processes train together."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is saved during training."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How it is evaluated."""

    def __post_init__(self) -> None:
        packed = self.data.packing != "none"
        if packed and self.training.micro_batch_size != 1:
            raise UserError(
                f"packed rows are filled by tokens, not by {self.training.micro_batch_size} samples",
                where="training.micro_batch_size",
                hint="set it to 1, and data.pack_tokens to what fits into device memory",
            )
        if self.training.batch_tokens is not None and not packed:
            raise UserError(
                "only packed rows can be counted in tokens",
                where="training.batch_tokens",
                hint="set data.packing to samples or shared-image, or use training.batch_size",
            )

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that a device accumulates per step; 1 if rows are packed.

        Raises:
            UserError: ``batch_size`` is not divisible.
        """
        if self.data.packing != "none":
            return 1
        share = world_size * self.training.micro_batch_size
        if self.training.batch_size % share:
            raise UserError(
                f"{self.training.batch_size} samples per step cannot be split over {world_size} devices in "
                f"micro-batches of {self.training.micro_batch_size}",
                where="training.batch_size",
                hint=f"use a multiple of {share}, or change training.micro_batch_size",
            )
        return self.training.batch_size // share

    def with_paths(self, change: Callable[[str], str]) -> RunConfig:
        """A copy with ``change`` applied to the paths of model and data."""

        def changed(data: Sources) -> Sources:
            if isinstance(data, list):
                return [dataclasses.replace(source, path=change(source.path)) for source in data]
            return change(data) if data else data

        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, path=change(self.model.path)),
            data=dataclasses.replace(self.data, train=changed(self.data.train), eval=changed(self.data.eval)),
        )

    def absolute(self) -> RunConfig:
        """A copy with absolute paths to model and data, so that the run can be used from any folder."""
        return self.with_paths(
            lambda path: path if not path or url_of(path) or is_hub_id(path) else str(absolute(path))
        )

    def now_in(self, folder: Path) -> RunConfig:
        """A copy of a configuration read from a run folder, with the current paths of model and data; see `now_at`."""
        return self.with_paths(lambda path: now_at(path, self.training.output_dir, folder))

    def with_keys(self, values: Mapping[str, Any]) -> RunConfig:
        """A copy with other values for keys such as ``training.seed``.

        Raises:
            UserError: a value is out of range, or conflicts with another.
        """
        groups: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            group, name = key.split(".")
            groups.setdefault(group, {})[name] = value
        changed = {group: dataclasses.replace(getattr(self, group), **keys) for group, keys in groups.items()}
        return dataclasses.replace(self, **changed)

    def to_yaml(self) -> str:
        """The whole tree as YAML, from which the same configuration can be read."""
        return yaml.dump(dataclasses.asdict(self), Dumper=YamlDumper, sort_keys=False, allow_unicode=True)


@functools.cache
def _fields(cls: type) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    return [(entry.name, hints[entry.name]) for entry in dataclasses.fields(cls)]


def _kinds(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of every leaf and branch below ``cls``, with their types."""
    for name, kind in _fields(cls):
        yield prefix + name, kind
        if dataclasses.is_dataclass(kind):
            yield from _kinds(typing.cast(type, kind), f"{prefix}{name}.")


def known_keys() -> Iterator[str]:
    """Dotted names of every leaf and branch of the tree."""
    return (name for name, _ in _kinds(RunConfig))


def build_parser() -> Parser:
    """A parser with an option for every key of the tree."""
    parser = Parser(prog="phi3v train", add_help=False)
    add_keys(parser)
    return parser


def add_keys(parser: argparse.ArgumentParser, only: Container[str] | None = None, *, shown: bool = True) -> None:
    """Add options for keys of the tree to a parser; their values are the overrides of `load_config`.

    Args:
        only: the keys; by default all, in groups.
        shown: whether the help lists them.
    """
    _add_keys(parser, parser, RunConfig(), "", only, shown)


def add_recipe(command: argparse.ArgumentParser, *, shown: bool = False) -> None:
    """Give a command a recipe and options for every key of the tree, which are ``shown`` in its help text or not."""
    more = "" if shown else " (phi3v train --help lists the keys)"
    text = f"a YAML file, or a name of `phi3v recipes`; --key.subkey value overrides it, or stands alone{more}"
    command.add_argument("recipe", type=find_recipe, nargs="?", metavar="RECIPE", help=text)
    add_keys(command, shown=shown)


def _add_keys(parser: Any, group: Any, branch: Any, prefix: str, only: Container[str] | None, shown: bool) -> None:
    owner: type = type(branch)
    for name, kind in _fields(owner):
        key, default = prefix + name, getattr(branch, name)
        if dataclasses.is_dataclass(kind):
            is_titled = shown and only is None
            below = parser.add_argument_group(key, _docstrings()[owner.__name__, name]) if is_titled else group
            _add_keys(parser, below, default, f"{key}.", only, shown)
        elif only is None or key in only:
            kind = _required(kind)
            settings: dict[str, Any] = {"dest": key, "default": argparse.SUPPRESS, "metavar": _metavar(kind)}
            if typing.get_origin(kind) is list:
                settings |= {"nargs": "+", "action": "extend"}
            elif kind is bool:
                settings |= {"nargs": "?", "const": "true"}
            settings["help"] = argparse.SUPPRESS
            if shown:
                settings["help"] = _help(_docstrings()[owner.__name__, name], default)
            group.add_argument(f"--{key}", **settings)


def _help(text: str, default: Any) -> str:
    if default is None and "default: " in text:
        return text.replace("%", "%%")
    # As in YAML: null, true, [a, b].
    shown = f"[{', '.join(default)}]" if isinstance(default, list) else str(default)
    shown = {"None": "null", "True": "true", "False": "false"}.get(shown, shown)
    return f"{text} (default: {shown})".replace("%", "%%")


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is list:
        return _metavar(typing.get_args(kind)[0])
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    return {bool: "{true,false}", int: "N", float: "X", str: "TEXT"}[kind]


@functools.cache
def _docstrings() -> dict[tuple[str, str], str]:
    """The docstring below each field of each class, which Python does not keep."""
    texts = {}
    for owner in ast.parse(Path(__file__).read_text(encoding="utf-8")).body:
        if isinstance(owner, ast.ClassDef):
            for entry, text in itertools.pairwise(owner.body):
                match entry, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                        texts[owner.name, name] = " ".join(words.split())
    return texts


def _required(kind: Any) -> Any:
    """A type without ``| None``."""
    return next(each for each in typing.get_args(kind) if each is not types.NoneType) if _may_be_none(kind) else kind


def _may_be_none(kind: Any) -> bool:
    return types.NoneType in typing.get_args(kind)


def load_config(
    recipe: Path | None, overrides: Sequence[str] | Mapping[str, Any] = (), *, of_run: bool = False
) -> RunConfig:
    """Read a recipe and apply ``--key.subkey value`` overrides.

    Args:
        recipe: a YAML file; None for the defaults.
        overrides: command-line words, or values by key.
        of_run: ``recipe`` was written by a run and must have every group; otherwise it was truncated.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown or duplicated, or a value has the wrong type or is
            out of range.
    """
    kinds = dict(_kinds(RunConfig))
    values = {} if recipe is None else _read_recipe(recipe, kinds)
    if of_run and (lacking := lacking_groups(name.split(".")[0] for name in values)):
        what = f"is incomplete: the configuration of a run has all groups, but {lacking} is missing"
        raise UserError(what, where=str(recipe), hint="copy it again")
    if not isinstance(overrides, Mapping):
        overrides = vars(build_parser().parse_args(list(overrides)))
    for name, value in overrides.items():
        values[name] = _typed(value, kinds[name], f"--{name}")
    return _build(RunConfig, values)


LATER_GROUPS = ("objective",)  # which runs of older versions lack


def lacking_groups(there: Iterable[str]) -> str:
    """The names of the groups of the tree that are missing, comma-separated."""
    there = {*there, *LATER_GROUPS}
    return ", ".join(name for name, kind in _fields(RunConfig) if dataclasses.is_dataclass(kind) and name not in there)


def _build(cls: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    settings = {}
    for name, kind in _fields(cls):
        if dataclasses.is_dataclass(kind):
            settings[name] = _build(kind, values, f"{prefix}{name}.")
        elif prefix + name in values:
            settings[name] = values[prefix + name]
    return cls(**settings)


def _typed(value: Any, kind: Any, where: str) -> Any:
    """A YAML value, or a command-line word, converted to the type of its key."""
    is_none = value is None or value in ("none", "null", ["none"], ["null"])
    if is_none and _may_be_none(kind):
        return None
    if kind == Sources:
        return _typed_sources(value, where)
    kind = _required(kind)
    if typing.get_origin(kind) is list:
        if is_none:
            return []
        values = list(value) if isinstance(value, list | tuple) else [value]
        if all(isinstance(each, str) for each in values):
            values = words_of(values)
        return [_typed(each, typing.get_args(kind)[0], where) for each in values]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            wrong = f"must be one of {', '.join(choices)}, got {value!r}"
            raise UserError(wrong, where=where, hint=suggestion(str(value), choices))
        return value
    if kind is str:
        if not isinstance(value, str):
            raise UserError(f"must be text, got {value!r}", where=where, hint="put it in quotes")
        if not value.strip():
            raise UserError("is empty", where=where, hint="leave it out, or give a value")
        return value
    if isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
            value = read_yaml(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        wanted = {bool: "true or false", int: "a whole number", float: "a finite number"}[kind]
        raise UserError(f"must be {wanted}, got {value!r}", where=where)
    return value


def _typed_sources(value: Any, where: str) -> str | list[DataSource]:
    """A path, or a list of paths and mappings; on the command line as YAML."""
    if isinstance(value, str) and re.fullmatch(r"\s*(\[.*\]|\{.*\})\s*", value, re.DOTALL):
        try:
            value = read_yaml(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"cannot be read as a list: {value}", where=where, hint=f"write {SOURCES_HINT}") from None
    if isinstance(value, dict):
        raise UserError(f"must be a path or a list, got {value!r}", where=where, hint=f"e.g. {SOURCES_HINT}")
    if not isinstance(value, list | tuple):
        path: str = _typed(value, str, where)
        return path
    return [_typed_source(entry, f"{where}[{index}]") for index, entry in enumerate(value)]


def _typed_source(entry: Any, where: str) -> DataSource:
    if isinstance(entry, DataSource):
        return entry
    kinds = dict(_fields(DataSource))
    given = entry if isinstance(entry, dict) else {"path": entry}
    for name in given:
        if name not in kinds:
            known = f"a source has the keys {', '.join(kinds)}"
            raise UserError(f"unknown key {name}", where=where, hint=suggestion(str(name), kinds, known))
    if given.get("path") is None:
        raise UserError("has no path", where=where, hint="name its file: {path: a.jsonl}")
    values = {name: _typed(value, kinds[name], f"{where}.{name}") for name, value in given.items() if value is not None}
    return DataSource(**values)


def _read_recipe(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe by dotted key."""
    try:
        loader = YamlLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise UserError("a recipe is a mapping of keys", where=str(path))
        values: dict[str, Any] = {}
        for name, value, line in _leaves(loader, node, kinds, str(path)):
            where = f"{path}:{line}: {name}"
            if name in values:
                raise UserError("is given twice", where=where, hint="name it once")
            values[name] = _typed(value, kinds[name], where)
    except FileNotFoundError:
        hint = suggestion(path.stem, RECIPES, "`phi3v recipes` lists those that come with phi3v")
        raise UserError("no such file, and no recipe of that name", where=str(path), hint=hint) from None
    except yaml.MarkedYAMLError as error:
        place = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise UserError(f"cannot be read as YAML: {error.problem}", where=place) from None
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"cannot be read as YAML: {error}", where=str(path)) from None
    return values


def _leaves(
    loader: YamlLoader, node: yaml.MappingNode, kinds: Mapping[str, Any], path: str, prefix: str = ""
) -> Iterator[tuple[str, Any, int]]:
    """(name, value, line) of every key below a node."""
    loader.flatten_mapping(node)
    for key, below in node.value:
        name, line = f"{prefix}{loader.construct_object(key, deep=True)}", key.start_mark.line + 1
        if name not in kinds:
            hint = suggestion(name, kinds, "see `phi3v train --help` for every key")
            raise UserError(f"unknown key {name}", where=f"{path}:{line}", hint=hint)
        is_branch = dataclasses.is_dataclass(kinds[name])
        if is_branch and isinstance(below, yaml.MappingNode):
            yield from _leaves(loader, below, kinds, path, f"{name}.")
            continue
        value = loader.construct_object(below, deep=True)
        if not is_branch:
            yield name, value, line
        elif value is not None:  # None: all keys of the group are commented out
            raise UserError(f"{name} is a group of keys, got {value!r}", where=f"{path}:{line}")
