"""`phi3v model init`: random weights in the official layout, with everything that belongs to a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.errors import UserError
from phi3v.model.preset_fields import NUM_CROPS, PRESET_FIELDS
from phi3v.model.presets import PRETRAINED_TINY, copy_pretrained, init_model, preset_config
from phi3v.processing.conversation import user_prompt


@pytest.mark.parametrize("preset", ["phi-3.5-vision", "phi-3-vision"])
def test_parameter_count_of_the_real_size(preset: str) -> None:
    with torch.device("meta"):
        model = Phi3VForCausalLM(preset_config(preset))
    assert sum(p.numel() for p in model.parameters()) == 4_146_621_440
    vision = sum(p.numel() for p in model.model.vision_embed_tokens.parameters())
    assert 300e6 < vision < 340e6


def test_real_sizes_differ_in_their_rope_only() -> None:
    newer, older = (json.loads(preset_config(name).to_json_string()) for name in ("phi-3.5-vision", "phi-3-vision"))
    assert {key for key in newer if newer[key] != older[key]} == {"rope_scaling", "sliding_window"}
    for config in (newer, older):
        assert len(config["rope_scaling"]["short_factor"]) == len(config["rope_scaling"]["long_factor"]) == 48


def test_every_preset_has_its_crops() -> None:
    assert NUM_CROPS.keys() == PRESET_FIELDS.keys()


def test_tiny_folder_is_complete(tiny_model_dir: Path) -> None:
    assert {file.name for file in tiny_model_dir.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tiny_model_dir / "config.json").read_text())
    assert config["model_type"] == "phi3_v"
    assert config["architectures"] == ["Phi3VForCausalLM"]
    assert config["rope_scaling"]["type"] == "su"
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    assert config["vocab_size"] > max(processor.tokenizer.get_vocab().values())
    assert json.loads((tiny_model_dir / "preprocessor_config.json").read_text())["processor_class"] == "Phi3VProcessor"


def test_tiny_answers_a_question(tiny_model_dir: Path) -> None:
    """From its folder to an answer, untrained as it is: processor and model fit together."""
    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir)
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    inputs = processor(
        user_prompt("what color is the shape?", [1]), Image.new("RGB", (64, 64), "red"), return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert isinstance(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]), str)


def test_number_of_parameters_is_returned(tmp_path: Path) -> None:
    count = init_model("tiny", tmp_path / "model")
    assert count == sum(tensor.numel() for tensor in load_file(tmp_path / "model" / "model.safetensors").values())
    assert 1e6 < count < 2e6


def test_same_seed_same_bytes(tiny_model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(12345)  # the state of the generator before does not matter
    init_model("tiny", tmp_path / "again")
    for file in tiny_model_dir.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    init_model("tiny", tmp_path / "other", seed=1)
    name = "model.safetensors"
    assert (tmp_path / "other" / name).read_bytes() != (tiny_model_dir / name).read_bytes()


def test_weights_are_drawn_sensibly(tiny_model_dir: Path) -> None:
    """No NaN, no forgotten tensor of zeros or of uninitialised memory."""
    zeros = ("bias", "_GN")
    for name, tensor in load_file(tiny_model_dir / "model.safetensors").items():
        assert tensor.isfinite().all(), name
        assert tensor.abs().max() <= 5, name
        assert bool(tensor.any()) != name.endswith(zeros), name
        if tensor.dim() > 1 and not name.endswith(zeros):
            assert 1e-3 < float(tensor.std()) < 0.5, name


def test_dtype(tmp_path: Path) -> None:
    init_model("tiny", tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_existing_model_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="there is a model already"):
        init_model("tiny", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_unknown_preset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown preset 'small'\n.*tiny, phi-3.5-vision, phi-3-vision"):
        init_model("small", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no tokenizer\.json here"):
        init_model("tiny", tmp_path / "model", tokenizer=tmp_path / "empty")
    assert not (tmp_path / "model").exists()


def test_tiny_with_the_real_tokenizer(real_tokenizer_dir: Path, tmp_path: Path) -> None:
    init_model("tiny", tmp_path, tokenizer=real_tokenizer_dir)
    assert (tmp_path / "tokenizer.json").read_bytes() == (real_tokenizer_dir / "tokenizer.json").read_bytes()
    model = Phi3VForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size >= 32045
    assert model.generation_config.eos_token_id == [32007, 32000]
    processor = Phi3VProcessor.from_pretrained(tmp_path)
    ids = processor(user_prompt("What is 2+2?"), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    copy_pretrained("tiny", folder)
    return folder


def test_the_pretrained_base_is_complete_and_small(pretrained: Path, tiny_model_dir: Path) -> None:
    held = {file.name for file in pretrained.iterdir()}
    assert held == {file.name for file in tiny_model_dir.iterdir()} | {"README.md"}
    weights = load_file(pretrained / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) < 5e6
    assert (pretrained / "model.safetensors").stat().st_size < 12e6
    # The official layout: the very keys of a new model of that size, and its tokenizer.
    assert weights.keys() == load_file(tiny_model_dir / "model.safetensors").keys()
    assert (pretrained / "tokenizer.json").read_bytes() == (tiny_model_dir / "tokenizer.json").read_bytes()
    assert not (pretrained / "README.md").read_text().count("{rows}")


def test_the_pretrained_base_sees(pretrained: Path) -> None:
    """Names of large coloured shapes; guessing gets one of twelve colours and one of seven shapes."""
    model = Phi3VForCausalLM.from_pretrained(pretrained)
    processor = Phi3VProcessor.from_pretrained(pretrained)
    colours = {"red": (214, 40, 40), "green": (40, 150, 60), "blue": (40, 80, 210), "yellow": (240, 210, 40)}
    colours |= {"black": (25, 25, 25), "purple": (130, 50, 160)}
    right = {"color": 0, "shape": 0}
    for colour, ink in colours.items():
        for shape in ("circle", "square"):
            page = Image.new("RGB", (336, 336), (225, 220, 225))
            draw = ImageDraw.Draw(page)
            (draw.ellipse if shape == "circle" else draw.rectangle)((90, 90, 246, 246), fill=ink)
            for asked, question, expected in (
                ("color", "What color is the shape?", colour),
                ("shape", "What shape is shown?", shape),
            ):
                inputs = processor(user_prompt(question, [1]), page, return_tensors="pt")
                output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
                answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                right[asked] += answer.strip() == expected
    assert right["color"] >= 5, right
    assert right["shape"] >= 8, right


def test_only_tiny_comes_pretrained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pretrained phi"):
        copy_pretrained("phi-3.5-vision", tmp_path / "model")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="a model already"):
        copy_pretrained("tiny", tmp_path / "there")
    assert PRETRAINED_TINY.is_dir()
