"""The whole tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from phi3v.config.bounds import require_bounds
from phi3v.config.data import DataConfig, Sources
from phi3v.config.evaluation import EvaluationConfig
from phi3v.config.method import MethodConfig, ObjectiveConfig
from phi3v.config.training import CheckpointConfig, DistributedConfig, TrainingConfig
from phi3v.config.yaml_files import YamlDumper
from phi3v.errors import UserError
from phi3v.paths import absolute, is_hub_id, now_at, url_of

Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex", "varlen"]


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
        require_bounds(self, "model", at_least_1="num_crops")


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
