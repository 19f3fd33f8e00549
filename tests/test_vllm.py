"""What vLLM finds of us; the server itself is asked in tests/ecosystem/vllm."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from phi3v import Phi3VProcessor
from phi3v.processing.chat_template import CHAT_TEMPLATE

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.fixture
def registered() -> Iterator[None]:
    """The registration as in a process of vLLM."""
    declared = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["entry-points"]["vllm.general_plugins"]
    module, function = declared["phi3v"].split(":")
    register: Callable[[], None] = getattr(import_module(module), function)
    register()
    register()  # vLLM may call it more than once in a process
    yield
    Phi3VProcessor.default_chat_template = CHAT_TEMPLATE


@pytest.mark.usefixtures("registered")
def test_auto_processor_gives_what_vllm_asks_for(tiny_model_dir: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_model_dir)
    assert processor.img_tokens[:2] == ("<|image_1|>", "<|image_2|>")
    for size in ((336, 336), (1275, 1650), (2000, 250), (30, 900)):
        (ids,) = processor("<|image_1|>", [Image.new("RGB", size)])["input_ids"]
        assert processor.calc_num_image_tokens_from_image_size(width=size[0], height=size[1]) == ids.count(-1)
    assert AutoProcessor.from_pretrained(tiny_model_dir, num_crops=1).image_processor.num_crops == 1


IMAGE = {"type": "image"}
TEXT = {"type": "text", "text": "What is the color?"}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is the color?"}],
    [{"role": "user", "content": [IMAGE, IMAGE, TEXT]}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [TEXT, IMAGE]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [IMAGE, TEXT, IMAGE]},
    ],
]


@pytest.mark.parametrize("messages", CHATS, ids=["no image", "two images", "two turns"])
def test_the_chat_template_is_ours_with_numbered_tags(
    tiny_model_dir: Path, messages: list[dict[str, Any]], registered: None
) -> None:
    numbered = AutoProcessor.from_pretrained(tiny_model_dir).apply_chat_template(messages, add_generation_prompt=True)
    ours = Phi3VProcessor.from_pretrained(tiny_model_dir)
    expected = ours.apply_chat_template(messages, CHAT_TEMPLATE, add_generation_prompt=True)
    for number in range(1, expected.count("<|image|>") + 1):
        expected = expected.replace("<|image|>", f"<|image_{number}|>", 1)
    assert numbered == expected


def test_a_template_of_the_users_own_stays(tiny_model_dir: Path, tmp_path: Path, registered: None) -> None:
    Phi3VProcessor.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    own = {"chat_template": "{{ messages[0]['content'] }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | own))
    assert AutoProcessor.from_pretrained(tmp_path).chat_template == own["chat_template"]


def test_our_tokenizer_files_name_the_tokens_that_vllm_cleans_up_after(tiny_model_dir: Path) -> None:
    """It decodes a prompt and encodes it again; white space that decoding adds stays behind all others."""
    found = AutoTokenizer.from_pretrained(tiny_model_dir).all_special_tokens
    assert {"<|system|>", "<|user|>", "<|end|>"} <= set(found)
