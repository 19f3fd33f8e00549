"""Fine-tune Phi-3.5-vision and Phi-3-vision.

Importing any of the four names below registers them with transformers' Auto classes for ``model_type``
``phi3_v``; ``trust_remote_code`` is never needed. They are imported on first use, so that commands
without a model start fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3v.auto import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor

__version__ = "0.1.0"
__all__ = ["Phi3VConfig", "Phi3VForCausalLM", "Phi3VImageProcessor", "Phi3VProcessor"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("phi3v.auto"), name)
    raise AttributeError(f"module 'phi3v' has no attribute {name!r}")
