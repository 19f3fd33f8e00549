"""Registration with transformers' Auto classes, and what vLLM needs besides to read our folders without remote code."""

from __future__ import annotations

from contextlib import suppress

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from phi3v.model.configuration import Phi3VConfig
from phi3v.model.modeling import Phi3VForCausalLM, Phi3VModel
from phi3v.processing.chat_template import NUMBERED_CHAT_TEMPLATE
from phi3v.processing.image_processor import Phi3VImageProcessor
from phi3v.processing.processor import Phi3VProcessor

# `exist_ok`: the package has announced some of the names already.
AutoConfig.register("phi3_v", Phi3VConfig, exist_ok=True)
AutoModel.register(Phi3VConfig, Phi3VModel, exist_ok=True)
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
# Pipelines and trainers ask this table which models take images.
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["phi3_v"] = "Phi3VForCausalLM"
AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)
AutoTokenizer.register(Phi3VConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
# Some versions of transformers cannot import this class without torchvision, which ours never needs.
with suppress(ImportError):
    AutoImageProcessor.register(Phi3VConfig, image_processor_classes={"pil": Phi3VImageProcessor}, exist_ok=True)
# Of the published files a pipeline infers a class for videos, and would ask whether to run their code for it.
VIDEO_PROCESSOR_MAPPING.register(Phi3VConfig, {}, exist_ok=True)


def for_vllm() -> None:
    """vLLM calls this in each of its processes (entry point ``vllm.general_plugins``): it looks for numbered tags."""
    Phi3VProcessor.default_chat_template = NUMBERED_CHAT_TEMPLATE


__all__ = ["Phi3VConfig", "Phi3VForCausalLM", "Phi3VImageProcessor", "Phi3VProcessor"]
