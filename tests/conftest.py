"""Shared by all rooms: the reference numbers, a tiny model, the real tokenizer where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before any library reads them. Tests never ask the hub. The tensors of tests are too small to share among threads:
# on two busy cores tests/model takes 13 s with one thread and 137 s with two.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "fixtures" / "golden"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the `slow` tests to `pytest -m slow`."""
    if "slow" in config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers; also a checkpoint in the official layout."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_cases() -> dict[str, Any]:
    """``cases.json`` of the reference numbers."""
    cases: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
    return cases


@pytest.fixture(scope="session")
def golden_arrays() -> dict[str, Any]:
    """``cases.safetensors`` of the reference numbers."""
    from safetensors.torch import load_file

    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="session")
def golden_images() -> Callable[[str], Image.Image]:
    """An image of the reference numbers, by its name (``640x480``)."""
    opened: dict[str, Image.Image] = {}

    def image(name: str) -> Image.Image:
        if name not in opened:
            with Image.open(GOLDEN / "images" / f"{name}.png") as image:
                opened[name] = image.convert("RGB")
        return opened[name]

    return image


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the ``tiny`` model, its processor and its tokenizer. Read only: it is shared by all tests."""
    from phi3v.model.presets import init_model

    folder = tmp_path_factory.mktemp("tiny") / "model"
    init_model("tiny", folder)
    return folder


@pytest.fixture(scope="session")
def small_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``tiny`` model at a quarter of its width, for runs, where width is nothing but time. Read only."""
    import torch

    from phi3v.model.configuration import Phi3VConfig
    from phi3v.model.modeling import Phi3VForCausalLM

    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1}
    config |= narrow | {"num_key_value_heads": 1, "clip_vision_config": config["clip_vision_config"] | narrow}
    del config["img_processor"]  # says how wide the tower was
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    model = Phi3VForCausalLM._from_config(Phi3VConfig.from_pretrained(folder), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def easy_vqa_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of the package easy_vqa with only its first images: 24 of train, 8 of test."""
    package = importlib.util.find_spec("easy_vqa")
    assert package is not None
    assert package.origin is not None
    whole = Path(package.origin).parent / "data"
    source = tmp_path_factory.mktemp("easy-vqa-source")
    for split, images in (("train", 24), ("test", 8)):
        (source / split).mkdir()
        (source / split / "images").symlink_to(whole / split / "images")
        questions = json.loads((whole / split / "questions.json").read_text(encoding="utf-8"))
        kept = [question for question in questions if question[2] < images]
        (source / split / "questions.json").write_text(json.dumps(kept), encoding="utf-8")
    return source


@pytest.fixture(scope="session")
def easy_vqa(easy_vqa_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the first images of easy-vqa: ``train.jsonl`` with 24 records, ``test.jsonl`` with 76."""
    from phi3v.data.convert import ConvertOptions
    from phi3v.data.sources.easy_vqa import convert

    folder = tmp_path_factory.mktemp("easy-vqa")
    convert(ConvertOptions(folder, str(easy_vqa_source), progress=False))
    return folder


@pytest.fixture(scope="session")
def real_tokenizer_dir() -> Path:
    """The folder of Phi-3.5-vision's own tokenizer, which is not part of this repository."""
    named = os.environ.get("PHI3V_TOKENIZER")
    folder = Path(named) if named else ROOT.parent / "shared" / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        why = "$PHI3V_TOKENIZER" if named else "../shared/tokenizer beside the repository; $PHI3V_TOKENIZER is not set"
        pytest.skip(f"needs the real tokenizer: no tokenizer.json in {folder} ({why})")
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium of the system, one for all tests of a file."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs Chromium: `apt install chromium`, or its path in $CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
