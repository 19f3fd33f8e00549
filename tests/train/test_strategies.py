"""What each method trains, by name and by gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_helpers import load

from phi3v.config import LoraConfig, MethodConfig
from phi3v.errors import UserError
from phi3v.model.presets import init_model
from phi3v.train.methods.strategies import part_of, summarize, target_modules

UNUSED = ("encoder.layers.2.", "post_layernorm.")  # the tiny tower has three layers; the last never runs


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_unused(name: str) -> bool:
    return "vision_model" in name and any(part in name for part in UNUSED)


def test_full_trains_everything_that_runs(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir, MethodConfig("full"))
    everything = {name for name, _ in model.named_parameters()}
    assert trainable(model) == {name for name in everything if not is_unused(name)}
    assert {name for name in everything if is_unused(name)} == {name for name, _ in model.unused_parameters()}


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_frozen_vision_trains_the_decoder(tiny_model_dir: Path, train_embeddings: bool) -> None:
    model = load(tiny_model_dir, MethodConfig("frozen-vision", train_embeddings=train_embeddings), "bf16")
    parts = {part_of(name) for name in trainable(model)}
    assert parts == {"decoder", "head"} | ({"embeddings"} if train_embeddings else set())
    assert all(p.requires_grad == (part_of(n) in parts) for n, p in model.named_parameters())
    # What is frozen stays as it is stored: it is saved again and must not be rounded.
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["frozen-vision", "lora"])
def test_trained_tensors_are_float32_and_frozen_ones_are_not_widened(tmp_path: Path, method: str) -> None:
    init_model("tiny", tmp_path / "bf16", dtype=torch.bfloat16)
    model = load(tmp_path / "bf16", MethodConfig(method), "bf16")  # type: ignore[arg-type]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_lora_adapts_the_recipes_layers_and_nothing_else(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir, MethodConfig("lora", lora=LoraConfig(rank=4)))
    expected = {
        "decoder": {"qkv_proj": 4, "o_proj": 4, "gate_up_proj": 4, "down_proj": 4},
        "head": {"lm_head": 1},
        "vision": dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), 2),
        "projector": {"img_projection.0": 1, "img_projection.2": 1},
    }
    assert {part.part: part.adapters for part in summarize(model) if part.adapters} == expected
    names = trainable(model)
    assert all("lora_" in name for name in names)
    assert not any(is_unused(name) for name in names)
    assert len(names) == 2 * sum(sum(layers.values()) for layers in expected.values())


def test_lora_parts_leave_vision_alone(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir, MethodConfig("lora", lora=LoraConfig(rank=4, parts=["decoder", "head"])))
    assert {part_of(name) for name in trainable(model)} == {"decoder", "head"}


def test_lora_scale_and_gaussian_start(tiny_model_dir: Path) -> None:
    lora = LoraConfig(rank=8, alpha_ratio=0.5)
    model = load(tiny_model_dir, MethodConfig("lora", lora=lora))
    layer = model.base_model.model.model.layers[0].self_attn.qkv_proj
    assert layer.scaling["default"] == pytest.approx(0.5)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert not b.any()
    # PEFT's Gaussian start has a standard deviation of 1 / rank; 8 x 128 draws are within 10 % of it.
    assert a.std().item() == pytest.approx(1 / 8, rel=0.1)


@pytest.mark.parametrize("part", ["projector", "vision"])
def test_a_part_trained_in_full_beside_lora(tiny_model_dir: Path, part: str) -> None:
    lora = LoraConfig(rank=4, also_train=[part])  # type: ignore[list-item]
    model = load(tiny_model_dir, MethodConfig("lora", lora=lora))
    full = {name for name in trainable(model) if "lora_" not in name}
    module = {"projector": "img_projection", "vision": "img_processor"}[part]
    copies = {name for name, _ in model.named_parameters() if f"{module}.modules_to_save" in name}
    assert full == {name for name in copies if not is_unused(name)}
    assert full
    assert not any("lora_" in name for name in trainable(model) if part_of(name) == part)


@pytest.mark.parametrize(
    ("targets", "hint"),
    [(["qkv_porj"], "qkv_proj"), (["q_proj", "up_gate"], "gate_up_proj"), (["embed_tokens"], "layers are called")],
)
def test_a_target_that_matches_nothing_is_an_error(tiny_model_dir: Path, targets: list[str], hint: str) -> None:
    with pytest.raises(UserError, match="matches no linear layer") as error:
        load(tiny_model_dir, MethodConfig("lora", lora=LoraConfig(targets=targets)))
    assert hint in str(error.value)


def test_targets_of_the_layer_that_never_runs_do_not_count(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir, MethodConfig("full"))
    names = target_modules(model, LoraConfig(targets=["fc1"]))
    assert [name.split("encoder.")[1] for name in names] == ["layers.0.mlp.fc1", "layers.1.mlp.fc1"]


def test_qlora_quantises_the_decoder_and_trains_adapters(tiny_model_dir: Path) -> None:
    import bitsandbytes

    model = load(tiny_model_dir, MethodConfig("qlora", lora=LoraConfig(rank=4)))
    base = model.base_model.model
    layer = base.model.layers[0].mlp.down_proj.base_layer
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.dtype == torch.uint8
    assert not isinstance(base.lm_head.base_layer, bitsandbytes.nn.Linear4bit)
    assert all("lora_" in name for name in trainable(model))
    # Sizes are counted unpacked: as many parameters as the model that was quantised.
    full = load(tiny_model_dir, MethodConfig("full"))
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert sum(part.total for part in summarize(model)) - adapters == sum(p.numel() for p in full.parameters())
