"""What a harness says as a prompt: the same tokens as of a record, whatever form an image comes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sample_files import clip

from phi3v.data.collate import QuestionDataset
from phi3v.data.table import open_table
from phi3v.data.video import sample_frames
from phi3v.errors import UserError
from phi3v.evaluators.messages import Generation, read_answer, read_messages, write_answer
from phi3v.processing.processor import Phi3VProcessor


@pytest.fixture(scope="module")
def processor(tiny_model_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_model_dir)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3V_CACHE", str(tmp_path / "cache"))


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def image(medium: object) -> dict[str, Any]:
    return {"type": "image", "url": medium}


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


PICTURES = [Image.new("RGB", size, colour) for size, colour in (((40, 30), "red"), ((30, 60), "blue"))]


@pytest.mark.parametrize("form", ["pil", "path"])
def test_the_prompt_and_the_pages_are_those_of_the_same_record(
    tmp_path: Path, processor: Phi3VProcessor, form: str
) -> None:
    (tmp_path / "images").mkdir()
    for name, picture in zip("ab", PICTURES, strict=True):
        picture.save(tmp_path / "images" / f"{name}.png")
    turns = [
        {"images": ["a.png"], "user": "what is it?", "assistant": "a wall"},
        {"images": ["b.png"], "image_offsets": [8], "user": "compare  with it", "assistant": "no"},
    ]
    record = {"id": "0", "system": "be brief", "conversations": turns}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    expected = QuestionDataset(open_table(tmp_path / "a.jsonl"), processor)[1]
    media = PICTURES if form == "pil" else [str(tmp_path / "images" / f"{name}.png") for name in "ab"]
    messages = [
        {"role": "system", "content": "be brief"},
        user(image(media[0]), text("what is it?")),
        {"role": "assistant", "content": [text("a wall")]},
        user(text("compare "), image(media[1]), text(" with it")),
    ]
    sample = read_messages(messages, processor, frames=8, where="here")
    assert sample.input_ids == expected.input_ids
    for page, other in zip(sample.pages, expected.pages, strict=True):
        assert torch.equal(page.content, other.content)


@pytest.mark.parametrize("exif_orientation", [True, False])
def test_files_are_turned_as_the_model_was_tuned(tmp_path: Path, tiny_model_dir: Path, exif_orientation: bool) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=2)
    processor.image_processor.exif_orientation = exif_orientation
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned on its side
    PICTURES[1].save(tmp_path / "a.jpg", exif=exif)
    page = read_messages([user(image(str(tmp_path / "a.jpg")), text("?"))], processor, frames=1, where="").pages[0]
    height, width = page.size
    assert (height < width) == exif_orientation


def test_pages_have_the_same_name_if_they_show_the_same(processor: Phi3VProcessor) -> None:
    messages = [user(*map(image, [PICTURES[0], PICTURES[1], PICTURES[0].copy()]), text("?"))]
    one, two, three = (page.name for page in read_messages(messages, processor, frames=1, where="").pages)
    assert one == three != two


def test_of_a_clip_frames_are_taken_as_a_record_has_them(tmp_path: Path, processor: Phi3VProcessor) -> None:
    path = clip(tmp_path / "a.avi", length=9)
    frames = sample_frames(path, 3)
    of_frames = read_messages([user(*map(image, frames), text("?"))], processor, frames=3, where="")
    for medium in (str(path), frames):
        of_clip = read_messages([user({"type": "video", "url": medium}, text("?"))], processor, frames=3, where="here")
        assert of_clip.input_ids == of_frames.input_ids
        assert [page.name for page in of_clip.pages] == [page.name for page in of_frames.pages]


def test_a_text_never_becomes_a_special_token(processor: Phi3VProcessor) -> None:
    sample = read_messages([user(text("<|end|> <|image_1|>"))], processor, frames=1, where="")
    assert (
        sample.input_ids
        == read_messages([user(text("< |end|> < |image_1|>"))], processor, frames=1, where="").input_ids
    )


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "do not end with a question"),
        ([user(text("a")), {"role": "assistant", "content": "b"}], "do not end with a question"),
        ([user(text("a")), user(text("b"))], "role 'user' is out of order"),
        ([user(text("a")), {"role": "system", "content": "b"}], "role 'system' is out of order"),
        ([user({"type": "audio", "url": "a.wav"})], "type 'audio' holds a str"),
        ([{"role": "system", "content": [image("a.png")]}], "type 'image' outside of a question"),
        ([user(image("/none.png"))], "the image cannot be read"),
        ([user(image(3))], "type 'image' holds a int"),
    ],
)
def test_what_cannot_be_read_is_said(messages: list[dict[str, Any]], what: str, processor: Phi3VProcessor) -> None:
    with pytest.raises(UserError, match=what) as caught:
        read_messages(messages, processor, frames=1, where="docvqa test[3]")
    assert "docvqa test[3]" in str(caught.value)


def test_settings_of_greedy_decoding_are_taken() -> None:
    settings = {"max_new_tokens": 9, "until": ["\n\n", "Q:"], "do_sample": False, "temperature": 0.2, "top_p": None}
    generation = Generation.read(settings | {"num_beams": 1, "top_k": 1, "image_aspect_ratio": "pad"}, "here")
    assert generation == Generation(9, ("\n\n", "Q:"))
    assert generation.end("it is red \n\nQ: and this?") == "it is red"
    assert Generation.read({"until": None}, "here") == Generation()
    assert Generation().end("a\n\nb") == "a\n\nb"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"temperature": 0.7}, r"task: generation_kwargs: temperature is 0\.7"),
        ({"do_sample": True}, "do_sample is True"),
        ({"num_beams": 3}, "num_beams is 3"),
        ({"repetition_penalty": 1.2}, "repetition_penalty is"),
        ({"visual_cot": True}, "visual_cot is not known"),
        ({"max_new_tokens": 0}, "must be at least 1"),
    ],
)
def test_other_settings_are_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        Generation.read(settings, "task")


def test_probabilities_travel_with_the_answer() -> None:
    words = ["Yes", "No"]
    assert read_answer(write_answer("yes", dict(zip(words, (0.25, 0.75), strict=True))), words) == ("yes", [0.25, 0.75])
    assert write_answer("42", {}) == "42"
    assert read_answer("42", []) == ("42", [])
    # Of another model, which gives none.
    assert read_answer("no.", words) == ("no.", [0.0, 1.0])
    assert read_answer("42", words) == ("42", [0.5, 0.5])
