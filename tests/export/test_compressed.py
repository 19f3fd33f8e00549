"""fp8, w8a16 and w4a16: what is stored is what plain rounding gives, of the decoder's linear layers and no others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from phi3v.data.collate import Collator, PageReader, Sample, make_sample
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.export.formats import FormatOptions, compressed, files, gptq
from phi3v.model.checkpoint import EMBEDDING, SECOND_EMBEDDING, checkpoint_shapes, stored_tensors
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.presets import PRETRAINED_TINY
from phi3v.processing.conversation import IGNORE_INDEX
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.methods.loading import make_skeleton

CASES = {
    "fp8": FormatOptions("fp8"),
    "w8a16": FormatOptions("w8a16"),
    "w8a16 in groups": FormatOptions("w8a16", group_size=32),
    "w4a16": FormatOptions("w4a16"),
    "w4a16 by channel": FormatOptions("w4a16", group_size=0),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path_factory.getbasetemp() / "phi3v-cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny base as released models are: bf16, in several files, beside other files."""
    folder = tmp_path_factory.mktemp("models") / "phi-3.5.tiny"
    Phi3VForCausalLM.from_pretrained(PRETRAINED_TINY, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="1MB"
    )
    Phi3VProcessor.from_pretrained(PRETRAINED_TINY).save_pretrained(folder)
    (folder / "modeling_phi3_v.py").write_text("# the official code\n")
    (folder / "README.md").write_text("The card of another model.\n")
    return folder


def made(model: Path, folder: Path, options: FormatOptions) -> Path:
    folder.mkdir()
    compressed.check(str(model), options)
    compressed.make(model, folder, options)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for _, name, tensor in stored_tensors(folder)}


def rounded(weight: torch.Tensor, options: FormatOptions) -> torch.Tensor:
    """Plain rounding: each group to its largest absolute value; scales in the weight's dtype."""
    group_size = 64 if options.group_size is None and options.format == "w4a16" else options.group_size
    groups = weight.float().unflatten(1, (-1, group_size or weight.shape[1]))
    largest = groups.abs().amax(-1, keepdim=True)
    if options.format == "fp8":
        scale = (largest / 448).to(weight.dtype).float()
        return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1)
    half = 2 ** (int(options.format[1]) - 1)
    scale = (largest / (half - 0.5)).to(weight.dtype).float()
    return ((groups / scale).round().clamp(-half, half - 1) * scale).flatten(1)


def load(folder: Path, **settings: Any) -> Any:
    """A model whose weights are floats again, as they are after its first forward pass."""
    loaded = Phi3VForCausalLM.from_pretrained(folder, **settings).eval()
    loaded(torch.tensor([[1, 2]]))
    return loaded


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_plain_rounding(case: str, model: Path, tmp_path: Path) -> None:
    folder = made(model, tmp_path / case, CASES[case])
    float_weights, stored = tensors(model), tensors(folder)
    linears = {name for name in float_weights if re.search(r"model\.layers\.\d\.\w+\.\w+_proj\.weight", name)}
    assert len(linears) == 16
    others = set(float_weights) - linears
    for name in others:
        assert stored[name].dtype == torch.bfloat16
        assert torch.equal(stored[name], float_weights[name])
    layers = {name.removesuffix(".weight") for name in linears}
    parts = ("weight", "weight_scale") if case == "fp8" else ("weight_packed", "weight_scale", "weight_shape")
    assert set(stored) - others == {f"{layer}.{part}" for layer in layers for part in parts}
    loaded = load(folder, dtype=torch.float32)
    quantised = {name for name, module in loaded.named_modules() if hasattr(module, "quantization_scheme")}
    assert quantised == layers
    for name in linears:
        assert torch.equal(loaded.get_parameter(name), rounded(float_weights[name], CASES[case])), name


def test_other_files_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    folder = made(model, tmp_path / "w4a16", FormatOptions("w4a16"))
    kept = {path.name for path in model.iterdir()} - {"README.md", "model.safetensors.index.json", "config.json"}
    kept = {name for name in kept if not name.endswith(".safetensors")}
    assert {path.name for path in folder.iterdir()} == kept | {"config.json", "model.safetensors"}
    for name in kept:
        assert (folder / name).read_bytes() == (model / name).read_bytes()
    config, before = (json.loads((place / "config.json").read_text()) for place in (folder, model))
    quantization = config.pop("quantization_config")
    assert config == before
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "pack-quantized"


def test_auto_classes_and_generation(model: Path, tmp_path: Path) -> None:
    """In bf16, as it is stored; also weights in float16, whose smallest numbers are few, and an empty row."""
    folder = made(model, tmp_path / "w4a16", FormatOptions("w4a16"))
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert isinstance(loaded, Phi3VForCausalLM)
    assert loaded.dtype == torch.bfloat16
    processor = Phi3VProcessor.from_pretrained(folder)
    inputs = processor("<|user|>\nHello<|end|>\n<|assistant|>\n", return_tensors="pt")
    assert loaded.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["fp8", "w4a16"])
def test_tiny_weights_of_float16(name: str) -> None:
    """Scales below float16's numbers would be 0, and a weight divided by them no number."""
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)).half()
    weight[0] = 0.0
    weight[1] *= 1e-5
    layer = compressed.Layer(name, None)
    stored = layer.compress(weight)
    back = layer._compressor.decompress(stored, layer._scheme)["weight"]
    assert back.dtype == torch.float16
    assert torch.isfinite(back).all()
    assert not back[0].any()
    assert (back[1] - weight[1]).abs().max() < 1e-4
    assert (back[2:] - weight[2:]).abs().max() < 0.3


def test_files_are_split_and_the_second_name_of_the_embeddings_is_not_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(model, tmp_path / "whole", FormatOptions("w8a16"))
    source = tmp_path / "source"
    source.mkdir()
    writer = files.WeightFiles(source)
    for name, tensor in tensors(model).items():
        writer.add(SECOND_EMBEDDING if name == EMBEDDING else name, tensor)
    writer.close()
    files.copy_other_files(model, source)
    monkeypatch.setattr(files, "SHARD_BYTES", 300_000)
    folder = made(source, tmp_path / "split", FormatOptions("w8a16"))
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 5
    assert names == [f"model-{k + 1:05}-of-{len(names):05}.safetensors" for k in range(len(names))]
    assert all((folder / name).stat().st_size < 350_000 for name in names)
    assert checkpoint_shapes(folder) == checkpoint_shapes(whole)
    assert all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in tensors(folder).items())
    Phi3VForCausalLM.from_pretrained(folder)
    samples = [Sample([1, 5, 9, 17, 33], [], [])]
    name = "model.layers.0.mlp.down_proj.weight"
    fitted = [next(gptq.fit_weights(of, samples, [name], compressed.Layer("w4a16", 64))) for of in (model, source)]
    assert torch.equal(fitted[0][1], fitted[1][1])


@pytest.fixture(scope="module")
def batches(easy_vqa: Path) -> list[dict[str, Any]]:
    """Held-out questions with their answers."""
    processor = Phi3VProcessor.from_pretrained(PRETRAINED_TINY)
    table = open_table(easy_vqa / "test.jsonl")
    reader = PageReader(table, processor.image_processor)
    collate = Collator(processor.tokenizer.pad_token_id)
    return [collate([make_sample(reader, table[index], processor)]) for index in range(0, 76, 13)]


@torch.inference_mode()
def predictions(loaded: Any, batches: list[dict[str, Any]]) -> torch.Tensor:
    """Log-probabilities (positions of answers, V)."""
    rows = []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "loss_weights", "counts")}
        is_target = batch["labels"][0, 1:] != IGNORE_INDEX
        rows.append(loaded(**inputs | {"target_positions": None}).logits[0, :-1][is_target].log_softmax(-1))
    return torch.cat(rows)


def test_fitting_to_data_beats_rounding(
    easy_vqa: Path, batches: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other questions than it was fitted to; the layout is the same."""
    monkeypatch.setattr(gptq, "RECORDS", 16)
    reference = predictions(Phi3VForCausalLM.from_pretrained(PRETRAINED_TINY).eval(), batches)
    divergences, layouts = [], []
    for calibration in (None, easy_vqa / "train.jsonl"):
        options = FormatOptions("w4a16", calibration=calibration)
        folder = made(PRETRAINED_TINY, tmp_path / str(calibration is not None), options)
        layouts.append({name: (tensor.dtype, tensor.shape) for name, tensor in tensors(folder).items()})
        found = predictions(Phi3VForCausalLM.from_pretrained(folder).eval(), batches)
        divergences.append(float((reference.exp() * (reference - found)).sum(-1).mean()))
    assert layouts[0] == layouts[1]
    by_rounding, fitted = divergences
    print(f"KL {by_rounding:.1e} by rounding, {fitted:.1e} fitted")
    assert fitted < by_rounding / 2


def test_a_column_without_correlation_is_rounded_to_the_nearest() -> None:
    """With uncorrelated inputs, one of them always 0, there is nothing that another column could make up for."""
    layer = compressed.Layer("w4a16", 32)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    diagonal = torch.linspace(0, 1, 64)
    fitted, scales = gptq.fit(weight, torch.diag(diagonal), layer, torch.float32)
    assert torch.equal(fitted, rounded(weight, FormatOptions("w4a16", group_size=32)))
    assert scales.shape == (8, 2)


def test_what_was_fitted_is_what_is_stored() -> None:
    """In bf16, to the last bit."""
    layer = compressed.Layer("w4a16", 32)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator).bfloat16()
    inputs = torch.randn(100, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    fitted, scales = gptq.fit(weight, inputs.T @ inputs, layer, torch.bfloat16)
    stored = layer.compress(fitted, scales)
    assert stored["weight_scale"].dtype == torch.bfloat16
    back = layer._compressor.decompress(stored | {"weight_scale": scales.float()}, layer._scheme)["weight"]
    assert torch.equal(back, fitted)
    loss = [float((inputs @ (other - weight.float()).T).pow(2).mean()) for other in (fitted, _plain(weight))]
    assert loss[0] < loss[1] / 2


def _plain(weight: torch.Tensor) -> torch.Tensor:
    return rounded(weight, FormatOptions("w4a16", group_size=32))


@pytest.fixture
def text_only(tmp_path: Path) -> Iterator[Path]:
    line = {"id": "{}", "conversations": [{"user": "What is two and two?", "assistant": "Four"}]}
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(line | {"id": str(k)}) + "\n" for k in range(20)))
    return path


def test_calibration_data_must_be_of_use(text_only: Path, easy_vqa: Path, tmp_path: Path) -> None:
    def fault(data: Path, model: Path = PRETRAINED_TINY) -> UserError:
        with pytest.raises(UserError) as raised:
            compressed.check(str(model), FormatOptions("w4a16", calibration=data))
        return raised.value

    assert "0 of its 20 records have an image, and at least 16 are needed" in fault(text_only).what
    few = tmp_path / "few.jsonl"
    few.write_text("".join((easy_vqa / "train.jsonl").read_text().splitlines(keepends=True)[:5]))
    assert "5 of its 5 records" in fault(few).what
    literal = tmp_path / "literal.jsonl"  # read as a run may have read it, data.special_text: escape
    literal.write_text(few.read_text().replace("Yes", "<|end|>").replace("yes", "<|end|>").replace("?", " <|end|>?"))
    assert "5 of its 5 records" in fault(literal).what
    assert "no such file" in str(fault(tmp_path / "none.jsonl"))
    short = tmp_path / "short"
    shutil.copytree(PRETRAINED_TINY, short)
    fields = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 300}))
    assert "tokens, and the model reads 300" in fault(easy_vqa / "train.jsonl", short).what


def test_groups_that_vllm_has_no_kernels_for() -> None:
    with pytest.raises(UserError, match="no kernels"):
        compressed.check(str(PRETRAINED_TINY), FormatOptions("w4a16", group_size=16))


def test_targets_in_vllm(model: Path) -> None:
    """It matches names from their start and builds its tower with layers whose names end alike."""
    layers = [name for name, _ in make_skeleton(Phi3VForCausalLM.config_class.from_pretrained(model)).named_modules()]
    chosen = [name for name in layers if compressed.is_quantised(f"{name}.weight")]
    assert len(chosen) == 16
    assert all(compressed.is_quantised(f"language_model.{name}.weight") for name in chosen)
    tower = "vision_embed_tokens.img_processor.vision_model.encoder.layers.0.self_attn.qkv_proj"
    for name in (tower, f"model.{tower}"):
        assert not re.match(compressed.LINEARS, name)
        assert re.match(compressed.IGNORED[1].removeprefix("re:"), name)


FULL_SIZE = """
import sys
from pathlib import Path
from phi3v.export.formats import FormatOptions
from phi3v.export.formats.compressed import make
make(Path(sys.argv[1]), Path(sys.argv[2]), FormatOptions("w4a16"))
# Not ru_maxrss, which a child inherits from the process that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_the_real_size_is_made_under_6_gigabytes(tmp_path: Path) -> None:
    """Takes some minutes, 12 GB of disk and 9 GB of memory, for making the float model first."""
    if shutil.disk_usage(tmp_path).free < 14e9:
        pytest.skip(f"needs 14 GB of disk in {tmp_path}")
    create = "import sys; from phi3v.cli import main; sys.exit(main(sys.argv[1:]))"
    init = ["model", "init", "--preset", "phi-3.5-vision", "--dtype", "bfloat16", "--out", str(tmp_path / "model")]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    try:
        subprocess.run([sys.executable, "-c", create, *init], check=True, env=environment)
        (tmp_path / "w4a16").mkdir()
        command = [sys.executable, "-c", FULL_SIZE, str(tmp_path / "model"), str(tmp_path / "w4a16")]
        done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
        peak = int(done.stdout.splitlines()[-1]) * 1024
        print(f"peak {peak / 1e9:.2f} GB")
        assert peak < 6e9
        size = sum(path.stat().st_size for path in (tmp_path / "w4a16").glob("*.safetensors"))
        assert 2.9e9 < size < 3.1e9
    finally:
        for name in ("model", "w4a16"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
