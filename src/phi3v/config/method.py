"""``method`` and ``objective``: what is trained, and what is learned."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Literal

from phi3v.config.bounds import require_bounds
from phi3v.errors import UserError

MethodName = Literal["full", "frozen-vision", "lora", "qlora"]
ObjectiveName = Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo"]
METHODS: tuple[MethodName, ...] = typing.get_args(MethodName)
Part = Literal["decoder", "head", "vision", "projector"]


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
        require_bounds(self, "method.lora", at_least_1="rank", above_0="alpha_ratio lora_plus_ratio", dropout=0.99)
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
        require_bounds(self, "objective", above_0="beta", at_least_0=f"gamma {weights}", label_smoothing=0.5)
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
