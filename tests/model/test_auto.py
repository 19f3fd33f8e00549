"""transformers' Auto classes know the model, without trust_remote_code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor


@pytest.fixture
def official_folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A model folder whose files point at remote code, as the published ones do; the code itself is not there."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    auto_map = {
        "config.json": {
            "AutoConfig": "configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
        },
        "preprocessor_config.json": {
            "AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor",
            "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
        },
    }
    for name, entries in auto_map.items():
        fields = json.loads((folder / name).read_text()) | {"auto_map": entries}
        (folder / name).write_text(json.dumps(fields))
    return folder


def test_the_reference_checkpoint(golden: Path) -> None:
    assert type(AutoConfig.from_pretrained(golden)) is Phi3VConfig
    assert type(AutoModelForCausalLM.from_pretrained(golden)) is Phi3VForCausalLM


def test_a_folder_that_points_at_remote_code(official_folder: Path) -> None:
    assert type(AutoConfig.from_pretrained(official_folder)) is Phi3VConfig
    assert type(AutoModelForCausalLM.from_pretrained(official_folder)) is Phi3VForCausalLM
    processor = AutoProcessor.from_pretrained(official_folder)
    assert type(processor) is Phi3VProcessor
    assert type(processor.image_processor) is Phi3VImageProcessor
    tokenizer = AutoTokenizer.from_pretrained(official_folder)
    text = "what is this?<|end|>\n<|assistant|>\n"
    assert tokenizer(text)["input_ids"] == processor.tokenize_text(text, starts_text=True)


def test_the_image_processor(official_folder: Path) -> None:
    try:
        processor = AutoImageProcessor.from_pretrained(official_folder)
    except ImportError as error:
        if "Torchvision" not in str(error):
            raise
        pytest.skip("this version of transformers has no AutoImageProcessor without torchvision (see phi3v.auto)")
    assert type(processor) is Phi3VImageProcessor


def test_saved_by_us_it_still_points_at_remote_code(official_folder: Path, tmp_path: Path) -> None:
    source = json.loads((official_folder / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(official_folder).save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(official_folder).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == source["auto_map"]
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        before, after = ((folder / name).read_bytes() for folder in (official_folder, tmp_path / "saved"))
        if name == "preprocessor_config.json":
            assert json.loads(after) == json.loads(before)
        else:
            assert after == before, name
