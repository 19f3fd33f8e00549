"""ONNX graphs against the model itself, in float32 and with rounded weights, by onnxruntime and onnxruntime-genai."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from phi3v import Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor
from phi3v.errors import UserError
from phi3v.evaluate.decoding import TorchDecoder
from phi3v.export.formats import FormatOptions
from phi3v.export.formats import onnx as onnx_format
from phi3v.export.formats.onnx_graph import GraphWriter, Value
from phi3v.model.checkpoint import EMBEDDING, SECOND_EMBEDDING
from phi3v.model.configuration import Phi3VConfig
from phi3v.model.presets import PRETRAINED_TINY
from phi3v.processing.hd_transform import cut_pages, num_img_tokens
from phi3v.processing.tiny_tokenizer import save_tiny_tokenizer
from phi3v.runtime import Runtime, load_runtime
from phi3v.runtime.onnx import DECODER, VISION
from phi3v.train.device import choose_device
from phi3v.train.finetuned import inspect_tuned, resolve_model

ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime (extra onnx)")
pytest.importorskip("onnx", reason="needs onnx (extra onnx)")

# Sums are in another order than torch's: 1e-6 on logits of 2, 1e-5 on those of the trained model, up to 25.
EXACT = 1e-4


def make_float(model: Path, folder: Path, **changes: Any) -> Path:
    """The graphs of a model with its weights as they are; ``changes`` are to its configuration."""
    source = folder.with_name(f"{folder.name}-source")
    shutil.copytree(model, source, dirs_exist_ok=True)
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(fields | changes), encoding="utf-8")
    folder.mkdir()
    onnx_format.make(source, folder, FormatOptions("onnx", bits=8, group_size=16))
    tensors = load_file(source / "model.safetensors")
    config = Phi3VConfig.from_pretrained(source)
    onnx_format.write_decoder(folder / DECODER, tensors.__getitem__, config, None, 16, 8192)
    return folder


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    """The trained tiny base, and its processor."""
    model = Phi3VForCausalLM.from_pretrained(PRETRAINED_TINY, dtype=torch.float32).eval()
    return model, Phi3VProcessor.from_pretrained(PRETRAINED_TINY)


@pytest.fixture(scope="module")
def float_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of the trained tiny base."""
    return make_float(PRETRAINED_TINY, tmp_path_factory.mktemp("onnx") / "float")


@pytest.fixture(scope="module")
def golden_graphs(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Runtime]:
    """Of the reference checkpoint, by the number of tokens from which LongRoPE's long factors hold."""
    parent = tmp_path_factory.mktemp("golden")
    model = parent / "model"
    shutil.copytree(golden, model, ignore=shutil.ignore_patterns("images", "cases.*"))
    save_tiny_tokenizer(model)  # none of its tokens is looked at
    Phi3VImageProcessor(num_crops=4).save_pretrained(model)

    def load(switch: int) -> Runtime:
        folder = parent / str(switch)
        if not folder.exists():
            make_float(model, folder, original_max_position_embeddings=switch)
        return load_runtime(folder)

    return load


def pages_of(case: dict[str, Any], images: Callable[[str], Image.Image]) -> list[Any]:
    processor = Phi3VImageProcessor(num_crops=case["num_crops"])
    return [processor.page(images(name)).numpy() for name in case["images"]]


@pytest.mark.parametrize("name", ["one_image", "two_images", "long_rope"])
def test_logits_of_the_reference(
    name: str, golden_graphs: Any, golden_cases: dict[str, Any], golden_arrays: dict[str, Any], golden_images: Any
) -> None:
    (case,) = [case for case in golden_cases["model"] if case["name"] == name]
    ids = golden_arrays[f"model/{name}/input_ids"][0].tolist()
    runtime = golden_graphs(case["original_max_position_embeddings"])
    logits = runtime.start(ids, pages_of(case, golden_images))
    torch.testing.assert_close(
        torch.from_numpy(logits), golden_arrays[f"model/{name}/logits"][-1], atol=EXACT / 4, rtol=0
    )


@pytest.mark.parametrize("name", ["one_image", "two_images", "crossing_long_rope"])
def test_continuations_of_the_reference(
    name: str, golden_graphs: Any, golden_cases: dict[str, Any], golden_arrays: dict[str, Any], golden_images: Any
) -> None:
    (case,) = [case for case in golden_cases["generate"] if case["name"] == name]
    runtime = golden_graphs(case["original_max_position_embeddings"])
    logits = runtime.start(golden_arrays[f"generate/{name}/input_ids"][0].tolist(), pages_of(case, golden_images))
    new = []
    for _ in range(case["max_new_tokens"]):
        new.append(int(logits.argmax()))
        logits = runtime.step(new[-1])
    assert new == golden_arrays[f"generate/{name}/new_ids"].flatten().tolist()


def drawn_pages(*grids: tuple[int, int]) -> list[Any]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (rows * 336, columns * 336, 3), dtype=np.uint8) for rows, columns in grids]


def prompt_of(pages: Sequence[Any], text: Sequence[int]) -> list[int]:
    """A BOS and each image, and text."""
    ids = [1]
    for number, page in enumerate(pages, start=1):
        ids += [-number] * num_img_tokens(page.shape[0] // 336, page.shape[1] // 336) + [1]
    return [*ids, *text]


@pytest.mark.parametrize(
    "grids", [((1, 1),), ((1, 2),), ((2, 1),), ((4, 4),), ((1, 2), (2, 1)), ()], ids=lambda grids: str(grids)
)
def test_pages_of_every_grid(grids: Any, base: Any, float_graphs: Path) -> None:
    """The prompt in one run, then one token at a time behind it."""
    pages = drawn_pages(*grids)
    ids = prompt_of(pages, range(3, 12))
    ours, theirs = TorchDecoder(*base), load_runtime(float_graphs)
    worst = [np.abs(ours.start(ids, pages) - theirs.start(ids, pages)).max()]
    worst += [np.abs(ours.step(token) - theirs.step(token)).max() for token in (40, 41, 42)]
    assert max(worst) < EXACT


def test_several_images_at_once(base: Any, float_graphs: Path) -> None:
    """One call of the vision graph, as onnxruntime-genai makes it; one image's global view is not its only crop."""
    model, _ = base
    grids = [(1, 1), (2, 2), (1, 1), (1, 3)]
    pixels = torch.zeros(len(grids), 5, 3, 336, 336)
    for index, page in enumerate(drawn_pages(*grids)):
        crops = cut_pages(torch.from_numpy(page)[None])[0]
        pixels[index, : len(crops)] = crops
    pixels[2, 0] += 0.5
    sizes = torch.tensor(grids) * 336
    (features,) = ort.InferenceSession(float_graphs / VISION).run(
        None, {"pixel_values": pixels.numpy(), "image_sizes": sizes.numpy()}
    )
    ids = torch.tensor([prompt_of(drawn_pages(*grids), [])])
    with torch.no_grad():
        expected = model.model.embed(ids, pixels, sizes)[ids < 0]
    torch.testing.assert_close(torch.from_numpy(features), expected, atol=EXACT / 4, rtol=0)


def test_a_cache_that_grows(float_graphs: Path) -> None:
    """Past the room it was given at first; read at once, the same tokens need no growing."""
    runtime = load_runtime(float_graphs)
    ids = [1, *np.random.default_rng(0).integers(3, 600, 300).tolist()]
    logits = runtime.start(ids[:5], [])
    for token in ids[5:]:
        logits = runtime.step(token)
    assert np.abs(logits - load_runtime(float_graphs).start(ids, [])).max() < EXACT


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_rounded_to_the_nearest(bits: int, block: int, tmp_path: Path) -> None:
    """What the operator computes with: half a step away at most, and zeros are zeros."""
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    weight[:, ::7] = 0
    weight[0, :block] = 0
    weight[1] = weight[1].abs() + 1
    parts = onnx_format.quantise_blocks(weight, bits, block)
    graph = GraphWriter(tmp_path / "one.onnx")
    inputs = [graph.tensor(name, part) for name, part in parts.items()]
    sizes = {"N": 24, "K": 96, "bits": bits, "block_size": block}
    graph.node("MatMulNBits", Value(graph, "x"), *inputs, outputs=["y"], **sizes)
    graph.save({"x": (torch.float32, ["rows", 96])}, {"y": (torch.float32, ["rows", 24])})
    (rounded,) = ort.InferenceSession(tmp_path / "one.onnx").run(None, {"x": np.eye(96, dtype=np.float32)})
    rounded = torch.from_numpy(rounded).T
    step = parts["scales"].repeat_interleave(block, 1)
    assert ((rounded - weight).abs() <= step * 0.5001).all()
    assert (rounded[weight == 0] == 0).all()


def test_data_beyond_the_sizes_of_protobuf(tmp_path: Path) -> None:
    """The real model's data file has gigabytes; here they are a hole in the file."""
    graph = GraphWriter(tmp_path / "one.onnx")
    graph._data.seek(5 * 2**30)
    weight = graph.tensor("weight", torch.arange(6.0).view(2, 3))
    graph.node("MatMul", Value(graph, "x"), weight, outputs=["y"])
    graph.save({"x": (torch.float32, [1, 2])}, {"y": (torch.float32, [1, 3])})
    (y,) = ort.InferenceSession(tmp_path / "one.onnx").run(None, {"x": np.array([[1, 10]], np.float32)})
    assert y.tolist() == [[30, 41, 52]]


def test_a_sharded_model_of_16_bits(base: Any, tmp_path: Path) -> None:
    """Tensors stay in 16 bits on the disk, and what is computed is what they hold, under whichever name."""
    Phi3VForCausalLM.from_pretrained(PRETRAINED_TINY, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "model", max_shard_size="1MB"
    )
    base[1].save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    for name in ("graphs", "float"):
        (tmp_path / name).mkdir()
    onnx_format.make(tmp_path / "model", tmp_path / "graphs", FormatOptions("onnx", bits=8))
    model = Phi3VForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "wide")
    base[1].save_pretrained(tmp_path / "wide")
    weights = load_file(tmp_path / "wide" / "model.safetensors")
    weights[SECOND_EMBEDDING] = weights.pop(EMBEDDING)
    save_file(weights, tmp_path / "wide" / "model.safetensors")
    onnx_format.make(tmp_path / "wide", tmp_path / "float", FormatOptions("onnx", bits=8))
    sizes = {name: (tmp_path / name / f"{VISION}.data").stat().st_size for name in ("graphs", "float")}
    assert sizes["graphs"] < 0.6 * sizes["float"]
    pages = drawn_pages((1, 2))
    logits = [load_runtime(tmp_path / name).start(prompt_of(pages, [3, 4]), pages) for name in ("graphs", "float")]
    np.testing.assert_array_equal(*logits)


class Exported:
    """The trained tiny base in 4 bits, and its answers by `Runtime`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        onnx_format.make(PRETRAINED_TINY, folder, FormatOptions("onnx"))
        self.runtime = load_runtime(folder)

    def continued(self, ids: Sequence[int], pages: Sequence[Any], count: int) -> list[int]:
        logits, new = self.runtime.start(ids, pages), []
        while True:
            new.append(int(logits.argmax()))
            if len(new) == count:
                return new
            logits = self.runtime.step(new[-1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("onnx") / "four"
    folder.mkdir()
    return Exported(folder)


def test_what_a_folder_holds(exported: Exported) -> None:
    names = {path.name for path in exported.folder.iterdir()}
    graphs = {f"{name}.onnx{part}" for name in ("vision", "embeddings", "decoder") for part in ("", ".data")}
    settings = {"config.json", "generation_config.json", "genai_config.json", "preprocessor_config.json"}
    assert names >= graphs | settings | {"tokenizer.json", "tokenizer_config.json"}
    assert not any(name.endswith(".safetensors") or name == "processor_config.json" for name in names)
    for name in settings - {"genai_config.json"}:
        assert (exported.folder / name).read_bytes() == (PRETRAINED_TINY / name).read_bytes()


def test_more_tokens_than_there_are_tables_for(exported: Exported) -> None:
    exported.runtime.graphs.reset()
    with pytest.raises(UserError, match=r"take 8,192 tokens, and there are 8,193") as caught:
        exported.runtime.graphs.read(np.zeros((8193, 128), np.float32))
    assert "--max-length" in str(caught.value.hint)


class GenAi:
    """A folder's graphs in onnxruntime-genai, as docs/deploying.md shows."""

    def __init__(self, folder: Path) -> None:
        self.og = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai (extra dev)")
        endless = folder.with_name("endless")  # else it fills up with padding after a stop token
        shutil.copytree(folder, endless)
        config = endless / "genai_config.json"
        fields = json.loads(config.read_text(encoding="utf-8"))
        fields["model"]["eos_token_id"] = [0]
        config.write_text(json.dumps(fields), encoding="utf-8")
        self.model = self.og.Model(str(endless))
        with pytest.raises(RuntimeError, match=r"processor_config\.json"):  # theirs would cut and tokenise otherwise
            self.model.create_multimodal_processor()
        self.processor = Phi3VProcessor.from_pretrained(folder, num_crops=4)

    def start(self, inputs: Any, ids: Sequence[int], max_length: int) -> Any:
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=max_length)
        tensors = self.og.NamedTensors()
        tensors["input_ids"] = np.array([ids], np.int32)
        if "pixel_values" in inputs:
            sizes = inputs["image_sizes"].numpy()
            tensors["pixel_values"] = inputs["pixel_values"].numpy()
            tensors["image_sizes"] = sizes
            tensors["num_image_tokens"] = np.array([num_img_tokens(*size) for size in sizes // 336])
        generator = self.og.Generator(self.model, parameters)
        generator.set_inputs(tensors)
        return generator

    def continued(self, inputs: Any, count: int, switch: int = 4096) -> list[int]:
        """Greedily; where the sample outgrows LongRoPE's short factors, all of it is read again."""
        ids = inputs["input_ids"][0].tolist()
        end = len(ids) + count
        generator = self.start(inputs, ids, end)
        while len(ids) < end:
            if len(ids) == switch + 1:
                generator = self.start(inputs, ids, end)
            generator.generate_next_token()
            ids.append(int(generator.get_next_tokens()[0]))
        return ids[-count:]


@pytest.fixture(scope="module")
def genai(exported: Exported) -> GenAi:
    return GenAi(exported.folder)


@pytest.mark.parametrize(
    "sizes", [[(300, 300)], [(640, 300)], [(300, 640)], [(600, 500)], [(640, 300), (300, 640)], []], ids=str
)
def test_genai_answers_the_same(sizes: Any, exported: Exported, genai: GenAi) -> None:
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    tags = "".join(f"<|image_{number}|>\n" for number in range(1, len(sizes) + 1))
    inputs = genai.processor(
        f"<|user|>\n{tags}What is shown?<|end|>\n<|assistant|>\n", images or None, return_tensors="pt"
    )
    pages = [genai.processor.image_processor.page(image).numpy() for image in images]
    expected = exported.continued(inputs["input_ids"][0].tolist(), pages, 12)
    assert genai.continued(inputs, 12) == expected


def test_genai_across_the_switch(
    golden_graphs: Any, golden_cases: dict[str, Any], golden_arrays: dict[str, Any], golden_images: Any
) -> None:
    """It keeps the keys that the short factors rotated, so what follows differs; a new generator makes it right."""
    name, switch = "crossing_long_rope", 352
    (case,) = [case for case in golden_cases["generate"] if case["name"] == name]
    genai = GenAi(golden_graphs(switch).folder)
    processor = Phi3VImageProcessor(num_crops=case["num_crops"])
    inputs = processor([golden_images(image) for image in case["images"]])
    inputs["input_ids"] = golden_arrays[f"generate/{name}/input_ids"]
    expected = golden_arrays[f"generate/{name}/new_ids"].flatten().tolist()
    assert genai.continued(inputs, len(expected), switch) == expected
    assert genai.continued(inputs, len(expected)) != expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "4 and of 8 bits"),
        ({"group_size": 48}, "groups of 16, 32, 64, 128, 256"),
        ({"group_size": 0}, "groups of 16"),
        ({"group_size": 256}, "divide the 128 and the 256 inputs"),
        ({"max_length": 4096}, "the proof has prompts of 5,102"),
        ({"max_length": 131_073}, "the model takes 131,072 tokens"),
    ],
)
def test_what_cannot_be_made(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        onnx_format.check(PRETRAINED_TINY, FormatOptions("onnx", **options))


def test_a_provider_that_is_not_there(exported: Exported) -> None:
    with pytest.raises(UserError, match="no CUDAExecutionProvider but "):
        load_runtime(exported.folder, device="CUDA")


def test_an_evaluation_knows_how_many_tokens_the_graphs_take(exported: Exported) -> None:
    tuned = resolve_model(str(exported.folder))
    assert inspect_tuned(tuned, choose_device("fp32")).facts.context == 8192  # of 131,072


def test_a_data_file_that_is_missing(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.folder, tmp_path / "part", ignore=shutil.ignore_patterns("decoder.onnx.data"))
    with pytest.raises(UserError, match="a graph cannot be loaded") as caught:
        load_runtime(tmp_path / "part")
    assert "the .data files too" in str(caught.value.hint)
