"""What is wrong with the model is said before anything is loaded or written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from run_helpers import Train, read_metrics
from safetensors.torch import load_file, save_file

from phi3v.config import ModelConfig, RunConfig, load_config
from phi3v.machine import Accelerator, abilities
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.presets import init_model
from phi3v.train.device import RuntimeDevice, choose_device
from phi3v.train.methods.loading import choose_attention


@pytest.fixture
def model(tmp_path: Path, small_model_dir: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(small_model_dir, tmp_path / "model"))


def refusal(train: Train, model: Path, capsys: pytest.CaptureFixture[str], *overrides: object) -> str:
    code, folder = train("model.path", model, *overrides)
    assert code == 2
    assert not folder.exists()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_missing_tensors_are_not_replaced_by_random_ones(
    train: Train, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.2." not in name or "vision" in name}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    error = refusal(train, model, capsys)
    assert f"{len(weights) - len(kept)} tensors are missing" in error
    assert "model.layers.2." in error


def test_weights_that_are_cut_short(train: Train, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "the weights are damaged" in refusal(train, model, capsys)


def test_no_weights(train: Train, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "model.safetensors").unlink()
    assert "there are no weights" in refusal(train, model, capsys)


def test_another_architecture(train: Train, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "config.json").read_text()) | {"model_type": "llama"}
    (model / "config.json").write_text(json.dumps(config))
    assert "is a 'llama' model" in refusal(train, model, capsys)


def test_an_adapter_is_no_model(train: Train, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "adapter_config.json").write_text("{}")
    assert "merge it into its base first" in refusal(train, model, capsys)


def test_a_lora_target_that_matches_nothing(train: Train, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(train, model, capsys, "method.name", "lora", "method.lora.targets", "[qkv_porj]")
    assert "did you mean 'qkv_proj'" in error


def test_flash_attention_where_it_cannot_run(train: Train, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "flash_attention_2 cannot run" in refusal(train, model, capsys, "model.attention", "flash_attention_2")


def test_auto_attention_says_why() -> None:
    runtime = choose_device("fp32")
    name, reason = choose_attention(RunConfig(), runtime)
    assert name == "sdpa"
    assert "needs a GPU" in reason
    assert choose_attention(RunConfig(ModelConfig(attention="eager")), runtime) == ("eager", "as configured")


def test_attention_of_rows_whose_samples_share_a_prompt() -> None:
    """The answers to a question share it in every packed row."""
    gpu = Accelerator(type="cuda", name="H100", **abilities((9, 0)), is_here=False)
    runtime = RuntimeDevice(torch.device("cuda"), "bf16", "", 0, 1, gpu=gpu)
    for name, packing, expected in (
        ("sft", "samples", "packed_varlen"),
        ("sft", "shared-image", "packed_flex"),
        ("dpo", "samples", "packed_flex"),
    ):
        config = load_config(None, ["--objective.name", name, "--data.packing", packing])
        assert choose_attention(config, runtime)[0] == expected


def test_a_run_does_not_replace_its_own_model(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder = train("training.max_steps", 2)
    assert code == 0
    weights = (folder / "final" / "model.safetensors").read_bytes()
    code, _ = train("model.path", folder / "final", "training.overwrite", "true")
    assert code == 2
    assert "which this run would replace" in capsys.readouterr().err
    assert (folder / "final" / "model.safetensors").read_bytes() == weights


def test_a_failed_start_leaves_the_old_run_alone(train: Train, tmp_path: Path) -> None:
    code, folder = train("training.max_steps", 2)
    assert code == 0
    code, _ = train("model.path", tmp_path / "typo", "training.overwrite", "true")
    assert code == 2
    assert (folder / "final" / "model.safetensors").exists()
    assert read_metrics(folder)


def test_frozen_weights_come_back_bit_by_bit(train: Train, small_model_dir: Path) -> None:
    """In half precision too: what is frozen is saved as it was, not as it was computed with."""
    small = ("training.max_steps", 2, "training.batch_size", 1, "training.micro_batch_size", 1, "data.eval", "null")
    code, folder = train("method.name", "frozen-vision", "training.precision", "bf16", *small)
    assert code == 0
    before = load_file(small_model_dir / "model.safetensors")
    after = load_file(folder / "final" / "model.safetensors")
    frozen = [name for name in before if "embed_tokens" in name]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


@pytest.mark.parametrize("part", ["projector", "vision"])
def test_a_part_trained_in_full_beside_qlora(train: Train, small_model_dir: Path, part: str) -> None:
    settings = ("method.name", "qlora", "method.lora.rank", 4, "method.lora.also_train", f"[{part}]")
    code, folder = train(*settings, "training.max_steps", 3)
    assert code == 0
    saved = load_file(folder / "final" / "adapter_model.safetensors")
    module = {"projector": "img_projection", "vision": "img_processor"}[part]
    start = load_file(small_model_dir / "model.safetensors")
    trained = [name for name in saved if module in name and "layers.2." not in name and "post_layernorm" not in name]
    assert trained
    for name in trained:
        assert not torch.equal(saved[name], start[name.removeprefix("base_model.model.")].float())
    loaded = PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained(small_model_dir), folder / "final")
    held = dict(loaded.named_parameters())
    weight = next(name for name in held if f"{module}.modules_to_save" in name)
    assert torch.equal(held[weight], saved[weight.replace(".modules_to_save.default", "")])


def test_a_model_with_the_embeddings_under_their_second_name_is_whole(train: Train, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.vision_embed_tokens.wte.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    code, folder = train("model.path", model, "training.max_steps", 1)
    assert code == 0
    assert "model.embed_tokens.weight" in load_file(folder / "final" / "model.safetensors")


def test_shards_are_read(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init_model("tiny", tmp_path / "whole")
    sharded = tmp_path / "sharded"
    Phi3VForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(sharded, max_shard_size="2MB")
    for file in (tmp_path / "whole").iterdir():
        if file.suffix != ".safetensors" and not (sharded / file.name).exists():
            shutil.copy(file, sharded)
    assert train("model.path", sharded, "training.max_steps", 1)[0] == 0
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    assert train("model.path", sharded, out="second")[0] == 2
    assert "the weights are damaged" in capsys.readouterr().err
