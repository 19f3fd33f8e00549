"""Registration with transformers' Auto classes."""

from __future__ import annotations

from contextlib import suppress

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from phi3v.model.configuration import Phi3VConfig
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.processing.image_processor import Phi3VImageProcessor
from phi3v.processing.processor import Phi3VProcessor

AutoConfig.register("phi3_v", Phi3VConfig)
AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM)
AutoProcessor.register(Phi3VConfig, Phi3VProcessor)
AutoTokenizer.register(Phi3VConfig, fast_tokenizer_class=PreTrainedTokenizerFast)
# Some versions of transformers cannot import this class without torchvision, which ours never needs.
with suppress(ImportError):
    AutoImageProcessor.register(Phi3VConfig, image_processor_classes={"pil": Phi3VImageProcessor})

__all__ = ["Phi3VConfig", "Phi3VForCausalLM", "Phi3VImageProcessor", "Phi3VProcessor"]
