"""nf4 and int8: which layers are quantised, that a folder computes what was saved, and what is refused of it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from phi3v.cli import main
from phi3v.config import torch_dtype
from phi3v.export.formats import FormatOptions, libraries
from phi3v.model.checkpoint import stored_tensors
from phi3v.model.quantised import Quantisation, decoder_linears, quantisation_of
from phi3v.train.device import RuntimeDevice, choose_device
from phi3v.train.finetuned import load_tuned, resolve_model
from phi3v.train.methods.loading import load_weights, make_skeleton

pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
pytest.importorskip("torchao", reason="needs the extra torchao")
KINDS = ("nf4", "int8")


@pytest.fixture(scope="module")
def model(small_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16 and in shards, as released ones are, with weights that differ from their bf16 neighbours."""
    folder = tmp_path_factory.mktemp("float") / "phi-3.5.tiny"
    Phi3VForCausalLM.from_pretrained(small_model_dir, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="100KB"
    )
    Phi3VProcessor.from_pretrained(small_model_dir).save_pretrained(folder)
    (folder / "modeling_phi3_v.py").write_text("# the official code\n")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp("made") / f"small-{kind}.v1" for kind in KINDS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libraries, "SHARD_SIZE", "100KB")
        for kind, folder in folders.items():
            folder.mkdir()
            libraries.make(model, folder, FormatOptions(kind))
    return folders


@pytest.fixture
def inputs(model: Path) -> Any:
    processor = Phi3VProcessor.from_pretrained(model, num_crops=4)
    page = Image.linear_gradient("L").convert("RGB").resize((500, 300))
    return processor("<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\n", [page], return_tensors="pt")


def quantisation(folder: Path) -> Quantisation:
    found = quantisation_of(Phi3VConfig.from_pretrained(folder), str(folder))
    assert found is not None
    return found


@torch.inference_mode()
def logits(model: Any, inputs: Any, autocast: torch.dtype | None = None) -> torch.Tensor:
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        answer: torch.Tensor = model.eval()(**inputs).logits
    return answer


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoders_linear_layers_are_quantised_and_nothing_else(
    model: Path, made: dict[str, Path], kind: str
) -> None:
    folder = made[kind]
    assert len(list(folder.glob("*.safetensors"))) > 1
    wanted = decoder_linears(make_skeleton(Phi3VConfig.from_pretrained(model)))
    assert len(wanted) == 4 * Phi3VConfig.from_pretrained(model).num_hidden_layers
    stored = {name: tensor for _, name, tensor in stored_tensors(folder)}
    original = {name: tensor for _, name, tensor in stored_tensors(model)}
    assert quantisation(folder).layers(stored) == wanted
    assert quantisation(folder).float_names(stored) == set(original)
    for layer in wanted:
        codes = stored[f"{layer}.weight" if kind == "nf4" else f"{layer}._weight_qdata"]
        values = codes.numel() * (2 if kind == "nf4" else 1)
        assert (codes.dtype, values) == (
            torch.uint8 if kind == "nf4" else torch.int8,
            original[f"{layer}.weight"].numel(),
        )
    for name in set(original) - {f"{layer}.weight" for layer in wanted}:
        assert stored[name].dtype == torch.bfloat16
        assert torch.equal(stored[name], original[name]), name
    loaded = Phi3VForCausalLM.from_pretrained(folder)
    types = {name: type(module.weight).__name__ for name, module in loaded.named_modules() if hasattr(module, "weight")}
    quantised = {"nf4": "Params4bit", "int8": "Int8Tensor"}[kind]
    assert {name for name, of in types.items() if of == quantised} == wanted
    assert {of for name, of in types.items() if name not in wanted} == {"Parameter"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_the_library_passes_over_is_noticed(
    model: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "FLOAT_PARTS", ["lm_head", "vision_embed_tokens"])
    with pytest.raises(RuntimeError, match="vision_embed_tokens"):
        libraries.make(model, tmp_path, FormatOptions(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_computes_bit_by_bit_what_was_saved(
    model: Path, made: dict[str, Path], kind: str, inputs: Any
) -> None:
    how = libraries._nf4(torch.bfloat16) if kind == "nf4" else libraries._int8()
    in_memory = load_weights(str(model), dtype=torch.bfloat16, quantization_config=how, device_map={"": "cpu"})
    saved = logits(in_memory, inputs)
    tuned, _ = load_tuned(resolve_model(str(made[kind])), choose_device("fp32"))
    assert torch.equal(logits(tuned, inputs), saved)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(made[kind], dtype="auto"), inputs), saved)
    floats = logits(load_weights(str(model), dtype=torch.bfloat16), inputs)
    assert not torch.equal(floats, saved)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_beside_the_weights_stay_as_they_are(model: Path, made: dict[str, Path], kind: str) -> None:
    for path in model.iterdir():
        if path.name != "config.json" and not path.name.startswith("model"):
            assert (made[kind] / path.name).read_bytes() == path.read_bytes(), path.name
    config = json.loads((made[kind] / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((model / "config.json").read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_precision_fits(made: dict[str, Path], kind: str, precision: str, inputs: Any) -> None:
    runtime = RuntimeDevice(torch.device("cpu"), precision, "as a GPU would", 0, 1)
    loaded, _ = load_tuned(resolve_model(str(made[kind])), runtime)
    dtype = torch.bfloat16 if precision == "fp32" else torch_dtype(precision)  # the folder's own, or autocast's
    plain = {p.dtype for p in loaded.parameters() if type(p) is torch.nn.Parameter}
    assert plain == {dtype}
    values = logits(loaded, inputs, runtime.autocast_dtype)
    assert torch.isfinite(values).all()
    assert values.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_eval_and_chat_take_it(
    made: dict[str, Path], kind: str, easy_vqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--max-questions", "2", "--max-new-tokens", "2")
    assert main(["eval", str(made[kind]), "--data", str(easy_vqa / "test.jsonl"), *few]) == 0
    assert f"quantised ({kind})" in capsys.readouterr().out
    assert main(["chat", str(made[kind]), "--prompt", "Hello?", "--max-new-tokens", "2"]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err + captured.out


def test_it_is_not_trained(
    made: dict[str, Path], easy_vqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"model.path": made["nf4"], "data.train": easy_vqa / "train.jsonl", "training.output_dir": tmp_path / "run"}
    options = [part for name, value in keys.items() for part in (f"--{name}", value)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("")
    for words in (["train", recipe], ["doctor", recipe], ["plan", recipe, "--gpu", "h100"]):
        said = refused(capsys, *words, *options)
        assert "quantised" in said
        assert "float model" in said
    assert not (tmp_path / "run").exists()


def test_it_is_not_exported_again(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--format", "int8"]):
        said = refused(capsys, "export", made["nf4"], "--out", tmp_path / "again", *more)
        assert "quantised (nf4)" in said
        assert "export the run again" in said
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("kind", "library", "extra"), [("nf4", "bitsandbytes", "qlora"), ("int8", "torchao", "torchao")]
)
def test_a_library_that_is_missing_is_named(
    made: dict[str, Path],
    kind: str,
    library: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == library else find(name, *more))
    assert f"phi3v[{extra}]" in refused(capsys, "chat", made[kind], "--prompt", "Hello?")


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_weight_that_are_missing(
    made: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(made[kind], tmp_path / "damaged"))
    part = {"nf4": "model.layers.0.mlp.down_proj.weight.absmax", "int8": "model.layers.0.mlp.down_proj._weight_scale"}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if tensors.pop(part[kind], None) is not None:
            save_file(tensors, path, metadata={"format": "pt"})
    said = refused(capsys, "chat", folder, "--prompt", "Hello?")
    assert "1 tensors are missing from the weights, first model.layers.0.mlp.down_proj.weight" in said


def test_a_configuration_that_does_not_fit_the_weights(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(made["nf4"], tmp_path / "mixed"))
    config = json.loads((folder / "config.json").read_text())

    def ask(**fields: Any) -> str:
        (folder / "config.json").write_text(json.dumps(config | fields))
        return refused(capsys, "chat", folder, "--prompt", "Hello?")

    assert "not known here" in ask(quantization_config={"quant_method": "gptq", "bits": 4})
    assert "cannot be used" in ask(quantization_config=4)
    other = json.loads((made["int8"] / "config.json").read_text())["quantization_config"]
    assert "16 tensors are of another shape" in ask(quantization_config=other)
    more = config["quantization_config"] | {"llm_int8_skip_modules": ["lm_head"]}
    assert "does not fit the weights" in ask(quantization_config=more)
    del config["quantization_config"]
    assert "16 tensors are of another shape" in ask()
