"""What is saved is what was loaded, in the official layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3v import Phi3VForCausalLM
from phi3v.model.checkpoint import EMBEDDING, SECOND_EMBEDDING, checkpoint_shapes, embedding_key_mapping

# What the official remote code, vLLM and others read of config.json.
OFFICIAL_FIELDS = {
    "architectures": ["Phi3VForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_phi3_v.Phi3VConfig",
        "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    },
    "_attn_implementation": "flash_attention_2",
    "torch_dtype": "float32",
}
READ_BY_OTHERS = (
    "architectures",
    "auto_map",
    "model_type",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    "img_processor",
    "embd_layer",
    "clip_vision_config",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "sliding_window",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def write_source(
    golden: Path, folder: Path, kind: str, config: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """The reference checkpoint with the fields of the official config, its embeddings under the names of ``kind``."""
    folder.mkdir()
    fields = json.loads((golden / "config.json").read_text()) | OFFICIAL_FIELDS | (config or {})
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = load_file(golden / "model.safetensors")
    tensors.pop(SECOND_EMBEDDING, None)
    if kind in ("both", "only wte"):
        tensors[SECOND_EMBEDDING] = tensors[EMBEDDING].clone()
    if kind == "only wte":
        del tensors[EMBEDDING]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert tensors.keys().isdisjoint(part)
        tensors |= part
    return tensors


def check_bit_identical(saved: dict[str, torch.Tensor], source: dict[str, torch.Tensor]) -> None:
    assert saved.keys() == source.keys()
    for key, tensor in source.items():
        assert saved[key].dtype == tensor.dtype, key
        assert torch.equal(saved[key], tensor), key


@pytest.mark.parametrize("shards", ["single", "sharded"])
@pytest.mark.parametrize("kind", ["one name", "both", "only wte"])
def test_saved_equals_the_source(kind: str, shards: str, golden: Path, tmp_path: Path) -> None:
    """Same keys but for ``wte``, bit-identical tensors, through two rounds of loading and saving."""
    write_source(golden, tmp_path / "source", kind)
    expected = load_file(golden / "model.safetensors")
    expected.pop(SECOND_EMBEDDING, None)
    source = tmp_path / "source"
    for number in range(2):
        model, report = Phi3VForCausalLM.from_pretrained(source, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["mismatched_keys"]
        folder = tmp_path / f"saved{number}"
        if shards == "sharded":
            model.save_pretrained(folder, max_shard_size="200KB")
            assert len(list(folder.glob("*.safetensors"))) > 3
            assert (folder / "model.safetensors.index.json").is_file()
        else:
            model.save_pretrained(folder)
            assert [file.name for file in folder.glob("*.safetensors*")] == ["model.safetensors"]
        check_bit_identical(saved_tensors(folder), expected)
        assert checkpoint_shapes(folder).keys() == expected.keys()
        source = folder


def test_sharded_source_with_only_wte(golden: Path, tmp_path: Path) -> None:
    """What tools write that drop one of two names of a shared tensor, in shards."""
    tensors = write_source(golden, tmp_path / "source", "only wte")
    half = len(tensors) // 2
    parts = {"model-00001-of-00002.safetensors": list(tensors)[:half]}
    parts["model-00002-of-00002.safetensors"] = list(tensors)[half:]
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / "source" / name, metadata={"format": "pt"})
    (tmp_path / "source" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (tmp_path / "source" / "model.safetensors.index.json").write_text(json.dumps(index))
    model, report = Phi3VForCausalLM.from_pretrained(tmp_path / "source", output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(model.model.embed_tokens.weight, tensors[SECOND_EMBEDDING])


def test_the_reference_checkpoint_is_its_own_source(golden: Path, tmp_path: Path) -> None:
    model, report = Phi3VForCausalLM.from_pretrained(golden, output_loading_info=True)
    assert not report["missing_keys"]
    model.save_pretrained(tmp_path)
    source = load_file(golden / "model.safetensors")
    source.pop(SECOND_EMBEDDING, None)
    check_bit_identical(saved_tensors(tmp_path), source)


def test_second_name_is_needed_only_where_the_first_is_missing(golden: Path, tmp_path: Path) -> None:
    expected = {"one name": None, "both": None, "only wte": EMBEDDING}
    for kind, name in expected.items():
        write_source(golden, tmp_path / kind, kind)
        mapping = embedding_key_mapping(tmp_path / kind)
        assert (mapping is None) if name is None else (list((mapping or {}).values()) == [name])
    assert checkpoint_shapes(tmp_path) == {}


def test_no_two_names_share_storage(golden: Path, tmp_path: Path) -> None:
    write_source(golden, tmp_path / "source", "both")
    model = Phi3VForCausalLM.from_pretrained(tmp_path / "source")
    state = model.state_dict()
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    assert SECOND_EMBEDDING not in state
    assert not model.config.tie_word_embeddings
    assert not [key for key in state if "rotary" in key or "position_ids" in key]


@pytest.mark.parametrize("rope_type", ["su", "longrope"])
def test_config_stays_the_official_one(rope_type: str, golden: Path, tmp_path: Path) -> None:
    rope = json.loads((golden / "config.json").read_text())["rope_scaling"] | {"type": rope_type}
    write_source(golden, tmp_path / "source", "one name", {"rope_scaling": rope})
    model = Phi3VForCausalLM.from_pretrained(tmp_path / "source")
    assert torch.equal(
        model.model.rotary_emb.frequencies(torch.device("cpu")),
        Phi3VForCausalLM.from_pretrained(golden).model.rotary_emb.frequencies(torch.device("cpu")),
    )
    model.save_pretrained(tmp_path / "saved")
    source, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "saved"))
    for field in READ_BY_OTHERS:
        assert saved[field] == source[field], field
    # Names of transformers 5 that older readers do not know, and the demand for flash-attn.
    assert saved.keys().isdisjoint({"rope_parameters", "dtype", "_attn_implementation", "_official_rope_type"})
    again = Phi3VForCausalLM.from_pretrained(tmp_path / "saved")
    own = {"_name_or_path"}
    assert {k: v for k, v in again.config.to_dict().items() if k not in own} == {
        k: v for k, v in model.config.to_dict().items() if k not in own
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_in_half_precision(dtype: torch.dtype, golden: Path, tmp_path: Path) -> None:
    model = Phi3VForCausalLM.from_pretrained(golden, dtype=dtype)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    source = load_file(golden / "model.safetensors")
    source.pop(SECOND_EMBEDDING, None)
    check_bit_identical(saved_tensors(tmp_path), {key: tensor.to(dtype) for key, tensor in source.items()})
    assert Phi3VForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == dtype


def test_flash_attention_in_the_config_is_not_demanded(golden: Path, tmp_path: Path) -> None:
    """The published config names it; cards and machines without flash-attn must load all the same (trouble 19)."""
    write_source(golden, tmp_path / "source", "one name")
    assert "flash_attention_2" in (tmp_path / "source" / "config.json").read_text()
    model = Phi3VForCausalLM.from_pretrained(tmp_path / "source")
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("way", ["loaded", "cast"])
def test_half_precision_keeps_rotary_frequencies(way: str, golden: Path) -> None:
    """bfloat16 has 8 bits: position 4000 would be off by radians. They stay float32, bit for bit."""
    exact = Phi3VForCausalLM.from_pretrained(golden, dtype=torch.float32)
    device = torch.device("cpu")
    expected = exact.model.rotary_emb.frequencies(device).clone()
    half = exact.to(torch.bfloat16) if way == "cast" else Phi3VForCausalLM.from_pretrained(golden, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    found = half.model.rotary_emb.frequencies(device)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_half_precision_is_near(golden: Path, load_golden: Any, sample: Any) -> None:
    """bfloat16 has 3 decimal digits: on logits of about 1, 5e-2 is some ten roundings; wrong angles give 1 and more."""
    given = sample("model", "one_image").inputs()
    with torch.no_grad():
        exact = load_golden()(**given).logits
        half = Phi3VForCausalLM.from_pretrained(golden, dtype=torch.bfloat16)(**given).logits.float()
    assert float((half - exact).abs().max()) < 5e-2 * max(1.0, float(exact.abs().max()))
