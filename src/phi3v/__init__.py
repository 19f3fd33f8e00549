"""Fine-tune Phi-3.5-vision and Phi-3-vision.

Importing the package makes transformers' Auto classes know ``model_type`` ``phi3_v``; ``trust_remote_code`` is never
needed. They find the classes below by name and import them when a checkpoint is loaded, as they do with the library's
own models, so that commands without a model start fast.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

if TYPE_CHECKING:
    from phi3v.auto import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor

__version__ = "0.1.0"
__all__ = ["Phi3VConfig", "Phi3VForCausalLM", "Phi3VImageProcessor", "Phi3VProcessor"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("phi3v.auto"), name)
    raise AttributeError(f"module 'phi3v' has no attribute {name!r}")


class _AutoModule(ModuleType):
    """Where the Auto classes look for the classes of ``phi3_v``."""

    def __getattr__(self, name: str) -> Any:
        return __getattr__(name)


sys.modules["transformers.models.phi3_v"] = _AutoModule("transformers.models.phi3_v")


@when_imported("transformers.models.auto.configuration_auto")
def _name_config(module: Any) -> None:
    module.CONFIG_MAPPING_NAMES["phi3_v"] = "Phi3VConfig"


@when_imported("transformers.models.auto.processing_auto")
def _name_processor(module: Any) -> None:
    module.PROCESSOR_MAPPING_NAMES["phi3_v"] = "Phi3VProcessor"


@when_imported("transformers.models.auto.image_processing_auto")
def _name_image_processor(module: Any) -> None:
    module.IMAGE_PROCESSOR_MAPPING_NAMES["phi3_v"] = {"pil": "Phi3VImageProcessor"}
