"""Texts with image tags to token ids: equal to the reference with the real tokenizer, and the contract with ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from phi3v import Phi3VProcessor
from phi3v.processing.conversation import tokenize_segment
from phi3v.processing.tokenizer import TOKENIZER_FILES

GetImage = Callable[[str], Image.Image]

CONVERSATIONS = range(5)
STRINGS = range(5, 15)


def decode_runs(runs: list[list[int]]) -> list[int]:
    return [token for token, count in runs for _ in range(count)]


def runs_of_images(ids: list[int]) -> list[tuple[int, int]]:
    """(image id, length) of every run of negative ids."""
    runs: list[tuple[int, int]] = []
    previous = 0
    for token in ids:
        if token < 0:
            if token == previous:
                runs[-1] = (token, runs[-1][1] + 1)
            else:
                runs.append((token, 1))
        previous = token
    return runs


def test_every_case_is_covered(golden_cases: dict[str, Any]) -> None:
    cases = golden_cases["tokenizer"]
    assert ["messages" in case for case in cases] == [True] * len(CONVERSATIONS) + [False] * len(STRINGS)


@pytest.mark.parametrize("index", CONVERSATIONS)
def test_conversation_equals_the_reference(
    index: int, golden_cases: dict[str, Any], golden_images: GetImage, real_processor: Phi3VProcessor
) -> None:
    """Token ids exact, from the official text and from the messages through the chat template."""
    case = golden_cases["tokenizer"][index]
    ours, official = (
        templates.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
        for templates in (real_processor, real_processor.tokenizer)
    )
    assert official == case["text"]
    assert ours == "<s>" + official
    assert case["num_crops"] == real_processor.image_processor.num_crops
    images = [golden_images(name) for name in case["images"]] or None
    batch = real_processor(case["text"], images, return_tensors="pt")
    assert real_processor(ours, images)["input_ids"] == batch["input_ids"].tolist()
    expected = decode_runs(case["input_ids_rle"])
    assert batch["input_ids"].tolist() == [expected]
    assert batch["attention_mask"].tolist() == [[1] * len(expected)]
    assert ("pixel_values" in batch) == bool(images)


@pytest.mark.parametrize("index", STRINGS)
def test_string_equals_the_reference(index: int, golden_cases: dict[str, Any], real_processor: Phi3VProcessor) -> None:
    case = golden_cases["tokenizer"][index]
    ids = case["input_ids"]
    assert case["add_special_tokens"] is False
    assert real_processor.tokenize_text(case["text"]) == ids
    assert real_processor.tokenize_text(case["text"], starts_text=True) == [1, *ids]
    assert real_processor.tokenizer(case["text"], add_special_tokens=False)["input_ids"] == ids
    assert real_processor.tokenizer(case["text"])["input_ids"] == [1, *ids]


def test_named_tokens_of_the_real_tokenizer(real_processor: Phi3VProcessor) -> None:
    tokenizer = real_processor.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 32000, 32000)


def test_every_chunk_starts_with_bos(tiny_processor: Phi3VProcessor) -> None:
    """Tags side by side and a tag at either end have an (empty) chunk of their own, as in the official code."""
    tokens, tokenizer = tiny_processor.tokenize_text, tiny_processor.backend_tokenizer
    ids = tokenize_segment(tokenizer, "<|image_1|><|image_2|>\nred<|image_3|>", [2, 3, 1], starts_text=True)
    bos = tiny_processor.tokenizer.bos_token_id
    assert ids == [bos, -1, -1, bos, -2, -2, -2, bos, *tokens("\nred"), -3, bos]
    later = tokenize_segment(tokenizer, "red<|image_1|>blue", [2], starts_text=False)
    assert later == [*tokens("red"), -1, -1, bos, *tokens("blue")]


def test_runs_are_as_long_as_the_images(tiny_processor: Phi3VProcessor, golden_images: GetImage) -> None:
    images = [golden_images(name) for name in ("300x900", "64x64", "2000x250", "640x480")]
    counts = tiny_processor.image_processor.calc_num_image_tokens(images)
    assert len(set(counts)) > 1
    batch = tiny_processor("<|image_1|>\n<|image_2|>\nand<|image_3|><|image_4|>?", images, return_tensors="pt")
    assert runs_of_images(batch["input_ids"][0].tolist()) == list(zip((-1, -2, -3, -4), counts, strict=True))
    assert batch["pixel_values"].shape == (4, 5, 3, 336, 336)
    assert batch["image_sizes"].shape == (4, 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_is_padded_on_the_side_asked_for(side: str, tiny_processor_dir: Path, golden_images: GetImage) -> None:
    """Each prompt's own tokens are as alone; images follow in reading order."""
    processor = Phi3VProcessor.from_pretrained(tiny_processor_dir)
    processor.tokenizer.padding_side = side
    square, tall = golden_images("64x64"), golden_images("300x900")
    prompts = ["red?", "<|image_1|>\nwhat is this?", "a<|image_1|>b<|image_2|>c"]
    groups = [[], [tall], [square, tall]]
    batch = processor(prompts, groups, return_tensors="pt")
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    for row, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        alone = processor(prompt, group, return_tensors="pt")["input_ids"][0]
        mask = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][mask], alone)
        assert (batch["input_ids"][row][~mask] == processor.tokenizer.pad_token_id).all()
        edge = mask[-len(alone) :] if side == "left" else mask[: len(alone)]
        assert edge.all()
    alone = processor.image_processor([tall, square, tall])
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])
    assert torch.equal(batch["image_sizes"], alone["image_sizes"])


SQUARE = Image.new("RGB", (16, 16))


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("red", [SQUARE], r"image tags \[\] but 1 images"),
        ("<|image_1|>", None, r"image tags \['<\|image_1\|>'\] but 0 images"),
        ("<|image_1|><|image_2|>", [SQUARE], "but 1 images"),
        ("<|image_2|>", [SQUARE], "but 1 images"),
        ("<|image_0|>", [SQUARE], "but 1 images"),
        ("<|image_1|><|image_1|>", [SQUARE], "but 1 images"),
        ("<|image_2|><|image_1|>", [SQUARE, SQUARE], "in this order"),
    ],
)
def test_tags_that_do_not_fit_are_an_error(
    text: str, images: list[Image.Image] | None, message: str, tiny_processor: Phi3VProcessor
) -> None:
    """Tags out of order too: the model lays images in reading order, so they would be swapped in silence."""
    with pytest.raises(ValueError, match=message):
        tiny_processor(text, images)


def test_batch_arguments_that_do_not_fit_are_an_error(tiny_processor: Phi3VProcessor) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 lists of images"):
        tiny_processor(["a", "b"], [[]])
    with pytest.raises(ValueError, match="only torch tensors"):
        tiny_processor("a", return_tensors="np")
    with pytest.raises(TypeError, match="unknown"):
        tiny_processor("a", unknown=True)


def test_num_crops_is_overridden_at_loading(tiny_processor_dir: Path) -> None:
    assert Phi3VProcessor.from_pretrained(tiny_processor_dir).image_processor.num_crops == 4
    assert Phi3VProcessor.from_pretrained(tiny_processor_dir, num_crops=16).image_processor.num_crops == 16


def check_saved_equals_source(source: Path, saved: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(source)
    processor.save_pretrained(saved)
    for name in TOKENIZER_FILES:
        assert (saved / name).read_bytes() == (source / name).read_bytes(), name
    fields = json.loads((source / "preprocessor_config.json").read_text())
    kept = json.loads((saved / "preprocessor_config.json").read_text())
    assert kept == fields | {"processor_class": "Phi3VProcessor"}
    assert {file.name for file in saved.iterdir()} == {*TOKENIZER_FILES, "preprocessor_config.json"}
    again = Phi3VProcessor.from_pretrained(saved)
    assert again.tokenize_text("what is <|end|>\n") == processor.tokenize_text("what is <|end|>\n")


def test_saved_files_are_the_sources(tiny_processor_dir: Path, tmp_path: Path) -> None:
    """The tokenizer's files byte for byte, and every field of the image processor's, ``auto_map`` among them."""
    source = tmp_path / "source"
    shutil.copytree(tiny_processor_dir, source)
    fields = json.loads((source / "preprocessor_config.json").read_text())
    fields["auto_map"] = {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"}
    (source / "preprocessor_config.json").write_text(json.dumps(fields))
    check_saved_equals_source(source, tmp_path / "saved")


def test_saved_files_are_the_sources_with_the_real_tokenizer(real_tokenizer_dir: Path, tmp_path: Path) -> None:
    check_saved_equals_source(real_tokenizer_dir, tmp_path)


def test_made_from_parts_saves_too(tiny_processor: Phi3VProcessor, tmp_path: Path) -> None:
    Phi3VProcessor(tiny_processor.image_processor, tiny_processor.tokenizer).save_pretrained(tmp_path)
    again = Phi3VProcessor.from_pretrained(tmp_path)
    assert again.tokenize_text("what is this?") == tiny_processor.tokenize_text("what is this?")


@pytest.mark.parametrize("relative", [False, True])
def test_path_with_dots(
    relative: bool, tiny_processor_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs.2026" / "my.model.v1"
    shutil.copytree(tiny_processor_dir, folder)
    monkeypatch.chdir(tmp_path)
    processor = Phi3VProcessor.from_pretrained(Path("runs.2026") / "my.model.v1" if relative else folder)
    saved = folder.with_name("my.model.v1.saved")
    processor.save_pretrained(saved)
    assert Phi3VProcessor.from_pretrained(saved).tokenize_text("red") == processor.tokenize_text("red")


def test_ids_decode_to_the_text(tiny_processor: Phi3VProcessor) -> None:
    ids = tiny_processor.tokenize_text("yes, a red circle<|end|>\n<|endoftext|>")
    assert tiny_processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == "yes, a red circle"
    assert tiny_processor.batch_decode([ids], skip_special_tokens=True)[0].strip() == "yes, a red circle"
