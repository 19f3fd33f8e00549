"""The configuration: official files in, official files out, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from phi3v import Phi3VConfig
from phi3v.model.configuration import CLIP_VIT_L_14_336
from phi3v.model.presets import preset_config


def test_defaults_are_the_released_tower() -> None:
    config = Phi3VConfig()
    assert config.clip_vision_config is None
    assert config.img_processor["image_dim_out"] == 1024
    vision = config.vision_config()
    assert {name: getattr(vision, name) for name in CLIP_VIT_L_14_336} == CLIP_VIT_L_14_336


def test_tower_of_another_size(golden: Path) -> None:
    vision = Phi3VConfig.from_pretrained(golden).vision_config()
    assert (vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size) == (32, 4, 96)
    assert (vision.image_size, vision.patch_size, vision.hidden_act) == (336, 14, "quick_gelu")


def test_saved_without_clip_fields_where_the_source_has_none(tmp_path: Path) -> None:
    preset_config("phi-3.5-vision").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "clip_vision_config" not in saved
    assert saved["model_type"] == "phi3_v"


def test_the_published_config_comes_back(real_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Every field of Phi-3.5-vision's own config.json, but for the kernels its authors used and the version."""
    source = json.loads((real_tokenizer_dir / "config.json").read_text())
    Phi3VConfig.from_pretrained(real_tokenizer_dir).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for field in source.keys() - {"_attn_implementation", "transformers_version", "_name_or_path"}:
        assert saved[field] == source[field], field
    assert saved["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}


def test_the_preset_is_the_published_config(real_tokenizer_dir: Path) -> None:
    """Field by field, the LongRoPE factors among them."""
    published = Phi3VConfig.from_pretrained(real_tokenizer_dir)
    preset = preset_config("phi-3.5-vision")
    mine, theirs = (
        json.loads(preset.to_json_string(use_diff=False)),
        json.loads(published.to_json_string(use_diff=False)),
    )
    own = {"_name_or_path", "auto_map", "torch_dtype", "transformers_version"}
    assert {k: v for k, v in mine.items() if k not in own} == {k: v for k, v in theirs.items() if k not in own}


@pytest.mark.parametrize("spelling", [{"type": "longrope"}, {"rope_type": "longrope"}, {"type": "su"}])
def test_spellings_of_longrope(spelling: dict[str, str], golden: Path, tmp_path: Path) -> None:
    fields = json.loads((golden / "config.json").read_text())
    del fields["rope_scaling"]["type"]
    fields["rope_scaling"] |= spelling
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = Phi3VConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["rope_type"] == "longrope"
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.long_context_start == 4096
    config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["rope_scaling"]
    assert saved["type"] == next(iter(spelling.values()))
    assert saved["short_factor"] == fields["rope_scaling"]["short_factor"]
    assert saved["long_factor"] == fields["rope_scaling"]["long_factor"]


def test_copies_save_alike(golden: Path, tmp_path: Path) -> None:
    """The library copies configurations in many places (generation, PEFT, the Trainer)."""
    config = Phi3VConfig.from_pretrained(golden)
    assert copy.deepcopy(config).to_json_string() == config.to_json_string()
    assert Phi3VConfig.from_dict(config.to_dict()).rope_parameters == config.rope_parameters
    assert isinstance(json.dumps(config.to_dict()), str)


@pytest.mark.parametrize(
    ("field", "value"), [("hd_transform_order", "glb_sub"), ("projection_cls", "linear"), ("use_hd_transform", False)]
)
def test_arrangements_that_were_never_released_are_an_error(field: str, value: object, golden: Path) -> None:
    fields = json.loads((golden / "config.json").read_text())
    fields["embd_layer"][field] = value
    with pytest.raises(ValueError, match=f"embd_layer.{field} is {value!r}; only"):
        Phi3VConfig(**fields)


def test_tower_of_another_width_than_named_is_an_error(golden: Path) -> None:
    fields = json.loads((golden / "config.json").read_text())
    fields["img_processor"]["image_dim_out"] = 1024
    with pytest.raises(ValueError, match="image_dim_out is 1024, but the vision tower is 32 wide"):
        Phi3VConfig(**fields)
