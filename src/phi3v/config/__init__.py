"""The configuration of a run: a typed tree, read from a recipe (YAML) and the command line.

The docstring of a field is its help text. Unknown keys are errors that suggest the nearest key. The resolved tree is
written into every run folder.
"""

from phi3v.config.data import (
    CACHE_LIMIT,
    DEFAULT_MAX_PIXELS,
    SHUFFLE_WINDOW,
    DataConfig,
    DataSource,
    Packing,
    Sources,
)
from phi3v.config.evaluation import METRIC_NAMES, EvaluationConfig
from phi3v.config.load import (
    LATER_GROUPS,
    add_keys,
    add_recipe,
    build_parser,
    known_keys,
    lacking_groups,
    load_config,
)
from phi3v.config.method import (
    METHODS,
    LoraConfig,
    MethodConfig,
    MethodName,
    ObjectiveConfig,
    ObjectiveName,
    Part,
)
from phi3v.config.run import Attention, ModelConfig, RunConfig
from phi3v.config.training import (
    DTYPES,
    PRECISIONS,
    CheckpointConfig,
    Checkpointing,
    DistributedConfig,
    EngineName,
    FeatureCache,
    LearningRates,
    Precision,
    Tracker,
    TrainingConfig,
    torch_dtype,
)
from phi3v.config.yaml_files import read_yaml

__all__ = [
    "CACHE_LIMIT",
    "DEFAULT_MAX_PIXELS",
    "DTYPES",
    "LATER_GROUPS",
    "METHODS",
    "METRIC_NAMES",
    "PRECISIONS",
    "SHUFFLE_WINDOW",
    "Attention",
    "CheckpointConfig",
    "Checkpointing",
    "DataConfig",
    "DataSource",
    "DistributedConfig",
    "EngineName",
    "EvaluationConfig",
    "FeatureCache",
    "LearningRates",
    "LoraConfig",
    "MethodConfig",
    "MethodName",
    "ModelConfig",
    "ObjectiveConfig",
    "ObjectiveName",
    "Packing",
    "Part",
    "Precision",
    "RunConfig",
    "Sources",
    "Tracker",
    "TrainingConfig",
    "add_keys",
    "add_recipe",
    "build_parser",
    "known_keys",
    "lacking_groups",
    "load_config",
    "read_yaml",
    "torch_dtype",
]
