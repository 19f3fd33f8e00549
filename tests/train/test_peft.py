"""PEFT's own ways to load, join and merge adapters take those of our runs, with the numbers of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from peft import AutoPeftModelForCausalLM, PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.cli import main
from phi3v.train.device import choose_device
from phi3v.train.finetuned import load_tuned, resolve_model

# The same weights in the same order of float32 operations; merged, W x + B (A x) becomes (W + B A) x.
SAME = {"rtol": 0.0, "atol": 0.0}
REORDERED = {"rtol": 1e-5, "atol": 1e-5}

RUNS = {
    "projector": ("method.lora.also_train", "[projector]"),
    "vision": ("method.lora.also_train", "[vision]"),
    "head": ("method.lora.parts", "[decoder, head]"),
    "other": ("method.lora.parts", "[decoder, head]", "training.seed", 7),
    "dora": ("method.lora.dora", "true"),
    "pissa": ("method.lora.init", "pissa"),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, small_model_dir: Path, easy_vqa: Path) -> dict[str, Path]:
    """``final/`` of a short run each."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, more in RUNS.items():
        settings: dict[str, Any] = {
            "model.path": small_model_dir,
            "data.train": easy_vqa / "train.jsonl",
            "data.num_workers": 0,
            "method.name": "lora",
            "method.lora.rank": 4,
            "training.output_dir": folder / name,
            "training.max_steps": 2,
            "training.batch_size": 2,
            "training.micro_batch_size": 2,
            "training.learning_rate": 2e-2,
            "training.warmup_steps": 0,
        }
        settings |= dict(zip(more[::2], more[1::2], strict=True))
        assert main(["train", *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]) == 0
    return {name: folder / name / "final" for name in RUNS}


@pytest.fixture(scope="module")
def inputs(small_model_dir: Path) -> Any:
    processor = Phi3VProcessor.from_pretrained(small_model_dir)
    image = Image.effect_mandelbrot((500, 340), (-2, -1, 1, 1), 20).convert("RGB")
    return processor("<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\n", [image], return_tensors="pt")


def base(folder: Path) -> Phi3VForCausalLM:
    return Phi3VForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(model: Any, inputs: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**inputs).logits
    return found


def ours(adapter: Path, inputs: Any) -> torch.Tensor:
    model, _ = load_tuned(resolve_model(str(adapter)), choose_device("fp32"))
    return logits(model, inputs)


@pytest.mark.parametrize("name", RUNS)
def test_every_way_to_load_an_adapter(
    name: str, adapters: dict[str, Path], small_model_dir: Path, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapters[name]
    expected = ours(adapter, inputs)
    assert (expected - logits(base(small_model_dir), inputs)).abs().max() > 0.05  # it does something
    # From the folder alone, wherever one is.
    monkeypatch.chdir(adapter.anchor)
    found = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    torch.testing.assert_close(logits(found, inputs), expected, **SAME)
    found = PeftModel.from_pretrained(base(small_model_dir), adapter)
    torch.testing.assert_close(logits(found, inputs), expected, **SAME)
    merged = found.merge_and_unload(safe_merge=True)
    assert type(merged) is Phi3VForCausalLM
    torch.testing.assert_close(logits(merged, inputs), expected, **REORDERED)


@pytest.mark.parametrize("name", ["projector", "vision", "head", "pissa"])  # it does not read DoRA's magnitudes
def test_the_library_s_own_way(name: str, adapters: dict[str, Path], small_model_dir: Path, inputs: Any) -> None:
    """transformers loads adapters without a ``PeftModel``, also where the adapter's folder is named as a model's."""
    if name in ("projector", "vision") and version.parse(transformers.__version__) < version.parse("5.24"):
        pytest.skip("transformers 5.17 leaves out what was trained in full")
    expected = ours(adapters[name], inputs)
    model = base(small_model_dir)
    model.load_adapter(str(adapters[name]))
    torch.testing.assert_close(logits(model, inputs), expected, **SAME)
    found = AutoModelForCausalLM.from_pretrained(adapters[name], dtype=torch.float32)
    torch.testing.assert_close(logits(found, inputs), expected, **SAME)


@pytest.mark.parametrize("part", ["projector", "vision"])
def test_what_is_trained_in_full_travels_with_the_adapter(
    part: str, adapters: dict[str, Path], small_model_dir: Path
) -> None:
    held = load_file(adapters[part] / "adapter_model.safetensors")
    module = {"projector": "img_projection", "vision": "img_processor"}[part]
    full = {name: tensor for name, tensor in held.items() if module in name and "lora_" not in name}
    assert full
    merged = PeftModel.from_pretrained(base(small_model_dir), adapters[part]).merge_and_unload().state_dict()
    before = base(small_model_dir).state_dict()
    moved = 0
    for name, tensor in full.items():
        own = name.removeprefix("base_model.model.")
        torch.testing.assert_close(merged[own], tensor, **SAME)
        moved += not torch.equal(tensor, before[own])
    assert moved > len(full) / 2  # all but what no forward pass runs


# None trains in full what another adapts: PEFT does not find the layers of the second in the copy of the first.
@pytest.mark.parametrize("names", [("projector", "head", "other"), ("vision", "head"), ("dora", "head", "pissa")])
def test_several_at_once(names: tuple[str, ...], adapters: dict[str, Path], small_model_dir: Path, inputs: Any) -> None:
    model = PeftModel.from_pretrained(base(small_model_dir), adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(adapters[name], name)
    for name in (*reversed(names), names[-1]):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model, inputs), ours(adapters[name], inputs), **SAME)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, inputs), logits(base(small_model_dir), inputs), **SAME)


def test_weighted_merges(adapters: dict[str, Path], small_model_dir: Path, inputs: Any) -> None:
    """``cat`` adds the weighted differences exactly."""
    model = PeftModel.from_pretrained(base(small_model_dir), adapters["head"], adapter_name="head")
    model.load_adapter(adapters["other"], "other")
    model.add_weighted_adapter(["head", "other"], [0.7, 0.4], "both", combination_type="cat")
    model.set_adapter("both")
    joined = logits(model, inputs)
    plain = base(small_model_dir)
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with torch.no_grad():
        for name, weight in (("head", 0.7), ("other", 0.4)):
            merged = PeftModel.from_pretrained(base(small_model_dir), adapters[name]).merge_and_unload().state_dict()
            for key, tensor in plain.state_dict().items():
                tensor += weight * (merged[key] - start[key])
    torch.testing.assert_close(joined, logits(plain, inputs), **REORDERED)
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs), joined, **REORDERED)
