"""The reference checkpoint, loaded, and the reference inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_inputs import PAD, Sample
from PIL import Image

from phi3v import Phi3VForCausalLM, Phi3VImageProcessor

LoadGolden = Callable[..., Any]
GetSample = Callable[..., Sample]


@pytest.fixture
def load_golden(golden: Path) -> LoadGolden:
    """The reference checkpoint in float32, for evaluation; keywords override its configuration."""

    def load(**overrides: Any) -> Any:
        model = Phi3VForCausalLM.from_pretrained(golden, dtype=torch.float32, **overrides)
        model.generation_config.eos_token_id = None  # the reference continuations have no stop token
        model.generation_config.pad_token_id = PAD
        return model.eval()

    return load


@pytest.fixture
def sample(
    golden_cases: dict[str, Any],
    golden_arrays: dict[str, torch.Tensor],
    golden_images: Callable[[str], Image.Image],
) -> GetSample:
    """``sample("model" or "generate", name)``: a case of the reference; ``sample("text")``: one without an image."""

    def get(kind: str, name: str = "") -> Sample:
        if kind == "text":
            ids = torch.randint(3, 500, (1, 37), generator=torch.Generator().manual_seed(7))
            return Sample(ids)
        (case,) = [c for c in golden_cases[kind] if c["name"] == name]
        features = Phi3VImageProcessor(num_crops=case["num_crops"])([golden_images(n) for n in case["images"]])
        return Sample(
            golden_arrays[f"{kind}/{name}/input_ids"],
            features["pixel_values"],
            features["image_sizes"],
            golden_arrays.get(f"{kind}/{name}/labels"),
        )

    return get
