"""The library's own ways with a model and its processor: chat templates, pipelines, every way of generating, export."""

from __future__ import annotations

import base64
import inspect
import io
import json
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from PIL import Image, UnidentifiedImageError
from transformers import AutoProcessor, DynamicCache, GenerationMixin, pipeline

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.model.presets import copy_pretrained
from phi3v.processing.conversation import ChatTurn, encode_conversation

WIDE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 640, 3), dtype=np.uint8))
RED = Image.new("RGB", (64, 64), "red")
BLUE = Image.new("RGB", (90, 200), "blue")


@pytest.fixture(scope="module")
def processor(tiny_model_dir: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=2)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return Phi3VForCausalLM.from_pretrained(tiny_model_dir)


def blocks(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]


def ask(processor: Phi3VProcessor, text: str, *images: Image.Image) -> Any:
    return processor.apply_chat_template(
        [{"role": "user", "content": blocks(text, *images)}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_importing_the_package_is_enough(tiny_model_dir: Path, tmp_path: Path) -> None:
    """In a process of its own, from another folder; what has no model does not pay for it."""
    code = """
import sys, phi3v
assert not {"torch", "transformers"} & sys.modules.keys()
from transformers import (
    AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM,
    AutoProcessor,
)
names = [type(AutoProcessor.from_pretrained(sys.argv[1])).__name__]
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    names.append(type(auto.from_pretrained(sys.argv[1])).__name__)
print(*names)
"""
    command = [sys.executable, "-c", code, str(tiny_model_dir)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240, check=True)
    assert done.stdout.split() == ["Phi3VProcessor", "Phi3VModel", *["Phi3VForCausalLM"] * 3]


CONVERSATIONS = {
    "text": [ChatTurn("What is 2+2?", "4")],
    "one image": [ChatTurn("what color is this?", "a red  square", 1)],
    "two images, two turns": [ChatTurn("Same?", "no\nnot at all", 2), ChatTurn("why?", "one is blue")],
    "an image in each turn": [ChatTurn("this", "red", 1), ChatTurn("and this", "blue", 1)],
    "in the text": [ChatTurn("A  and  differ", "yes", 2, image_offsets=(2, 7))],
    "to be answered": [ChatTurn("this", "red", 1), ChatTurn("and this", None, 1)],
}


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_chat_is_the_stream_of_training(name: str, system: str | None, processor: Phi3VProcessor) -> None:
    """Content as text and as blocks; ids and supervised tokens."""
    turns = CONVERSATIONS[name]
    images = iter([RED, WIDE])
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    used = []
    for turn in turns:
        own = [next(images) for _ in range(turn.num_images)]
        used += own
        if turn.image_offsets is None:
            content: Any = blocks(turn.user, *own) if own else turn.user
        else:
            content, start = [], 0
            for offset, image in zip(turn.image_offsets, own, strict=True):
                content += [{"type": "text", "text": turn.user[start:offset]}, {"type": "image", "image": image}]
                start = offset
            content.append({"type": "text", "text": turn.user[start:]})
        messages.append({"role": "user", "content": content})
        if turn.assistant is not None:
            messages.append({"role": "assistant", "content": turn.assistant})
    counts = processor.image_processor.calc_num_image_tokens(used)
    stream = encode_conversation(processor.backend_tokenizer, turns, counts, system=system)
    to_answer = turns[-1].assistant is None
    kwargs: dict[str, Any] = {"tokenize": True, "return_dict": True, "add_generation_prompt": to_answer}
    given = processor.apply_chat_template(messages, return_assistant_tokens_mask=True, **kwargs)
    expected = [token if token >= 0 else processor.image_token_id for token in stream.input_ids]
    assert given["input_ids"] == [expected]
    assert given["assistant_masks"] == [[int(label != -100) for label in stream.labels]]
    assert given["attention_mask"] == [[1] * len(expected)]
    if used:
        assert given["pixel_values"].equal(processor.image_processor(used)["pixel_values"])
    # Batches: padded on either side, tensors.
    short = [{"role": "user", "content": "yes?"}, {"role": "assistant", "content": "no"}]
    for side in ("left", "right"):
        options = {"padding": True, "padding_side": side, "pad_to_multiple_of": 8}
        batch = processor.apply_chat_template(
            [messages, short],
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            processor_kwargs=options,
            **kwargs,
        )
        assert batch["input_ids"].shape[1] % 8 == 0
        kept = batch["attention_mask"][0].bool()
        assert batch["input_ids"][0][kept].tolist() == expected
        masks = torch.as_tensor(batch["assistant_masks"])
        assert masks[0][kept].tolist() == [int(label != -100) for label in stream.labels]
        assert not masks[0][~kept].any()
        assert masks[1].sum() == len(processor.tokenize_text("no<|end|>\n<|endoftext|>"))


def test_white_space_before_an_answer_makes_no_target_of_the_token_before(processor: Phi3VProcessor) -> None:
    """The tokenizer counts it to ``<|assistant|>``."""
    messages = [{"role": "user", "content": "yes?"}, {"role": "assistant", "content": " \n no"}]
    given = processor.apply_chat_template(messages, return_assistant_tokens_mask=True, tokenize=True, return_dict=True)
    answer = processor.tokenize_text("no<|end|>\n<|endoftext|>")
    (ids,), (mask,) = given["input_ids"], given["assistant_masks"]
    assert ids[-len(answer) :] == answer
    assert mask == [0] * (len(ids) - len(answer)) + [1] * len(answer)


def test_images_by_path_url_and_base64(
    processor: Phi3VProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    WIDE.save(content, format="PNG")
    (tmp_path / "wide.png").write_bytes(content.getvalue())
    text = base64.b64encode(content.getvalue()).decode()
    expected = ask(processor, "what?", WIDE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # for a server on this machine
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    Thread(target=server.serve_forever, daemon=True).start()
    for source in (
        {"url": f"http://127.0.0.1:{server.server_port}/wide.png"},
        {"path": str(tmp_path / "wide.png")},
        {"url": f"data:image/png;base64,{text}"},
        {"base64": text},
        {"image": np.asarray(WIDE)},
    ):
        messages = [{"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": "what?"}]}]
        given = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert given["pixel_values"].equal(expected["pixel_values"]), source.keys()
        assert given["input_ids"].equal(expected["input_ids"])
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="neither a file, a URL nor base64"):
        processor("<|image|>", "no/such.png")
    RED.save(tmp_path / "red.eps")  # which would run a program on it
    with pytest.raises(UnidentifiedImageError):
        processor("<|image|>", tmp_path / "red.eps")


@pytest.mark.parametrize("applied", [True, False])
def test_an_image_file_is_turned_as_in_training(applied: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    WIDE.save(tmp_path / "turned.png", exif=exif)
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=2)
    processor.image_processor.exif_orientation = applied
    seen = processor("<|image|>", WIDE.transpose(Image.Transpose.ROTATE_270) if applied else WIDE)
    assert processor("<|image|>", tmp_path / "turned.png")["pixel_values"].equal(seen["pixel_values"])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], "no tools"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "content of type 'audio'"),
    ],
)
def test_what_the_model_does_not_know_is_an_error(messages: Any, message: str, processor: Phi3VProcessor) -> None:
    with pytest.raises(Exception, match=message):
        processor.apply_chat_template(messages, tokenize=False)
    with pytest.raises(Exception, match="no tools"):
        processor.apply_chat_template([{"role": "user", "content": "x"}], tools=[{"name": "f"}], tokenize=False)


def test_a_template_of_its_own_is_kept(processor: Phi3VProcessor) -> None:
    tokenizer = processor.tokenizer
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        own = Phi3VProcessor(processor.image_processor, tokenizer)
    finally:
        tokenizer.chat_template = before
    assert own.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_images_of_a_batch(processor: Phi3VProcessor) -> None:
    """One list after another, a list for each prompt, none for some; both forms of image ids."""
    texts = ["<|image|>\na", "b", "<|image|><|image|>c"]
    nested = processor(texts, [[RED], None, [WIDE, BLUE]], return_tensors="pt")
    flat = processor(text=texts, images=[RED, WIDE, BLUE], return_tensors="pt")
    official = processor(["<|image_1|>\na", "b", "<|image_1|><|image_2|>c"], [[RED], [], [WIDE, BLUE]])
    for name in nested:
        assert nested[name].equal(flat[name]), name
    ids = nested["input_ids"]
    for row, expected in zip(ids, official["input_ids"], strict=True):
        assert row[: len(expected)].tolist() == [t if t >= 0 else processor.image_token_id for t in expected]
    assert processor(texts, [[RED], [], [WIDE, BLUE]])["input_ids"][1] == official["input_ids"][1]
    for text, images in ((["<|image|>", "b"], [RED, RED]), ("<|image_1|><|image|>", [RED, RED])):
        with pytest.raises(ValueError, match="images"):
            processor(text, images)


def test_groups_of_arguments(processor: Phi3VProcessor) -> None:
    """The library's groups say the same as plain arguments, and take nothing from those beside them."""
    plain = {"padding": "max_length", "max_length": 16, "return_tensors": "pt", "padding_side": "left"}
    more: dict[str, Any] = {
        "add_special_tokens": False,
        "return_mm_token_type_ids": True,
        "return_offsets_mapping": True,
        "pad_to_multiple_of": 12,
    }
    expected = processor(["a", "b c"], **plain, **more)
    for given in (
        processor(["a", "b c"], text_kwargs=plain, **more),
        processor(["a", "b c"], text_kwargs=more, **plain),
        processor(["a", "b c"], text_kwargs=more, common_kwargs={"return_tensors": "np"}, **plain),
    ):
        assert given.keys() == expected.keys()
        assert all(given[name].equal(expected[name]) for name in expected)


def test_cuts(processor: Phi3VProcessor) -> None:
    """Text may be cut, an image may not; the words are the library's, which trainers look for."""
    whole = processor("<|image|>\nwhat is this?", RED)["input_ids"][0]
    cut = processor("<|image|>\nwhat is this?", RED, truncation=True, max_length=len(whole) - 2)
    assert cut["input_ids"] == [whole[:-2]]
    with pytest.raises(ValueError, match=r"Mismatch in `image` token count between text and `input_ids`.*max_length"):
        processor("<|image|>\nwhat is this?", RED, truncation=True, max_length=50)
    full = processor(["a"], padding="max_length", max_length=12, return_tensors="pt")
    assert full["input_ids"].shape == (1, 12)
    plain = processor(["a b c", "a"])["input_ids"]
    assert processor(["a b c", "a"], padding="do_not_pad")["input_ids"] == plain
    assert processor(["a b c", "a"], truncation="do_not_truncate", max_length=2)["input_ids"] == plain


def test_settings_given_at_loading(tiny_model_dir: Path, tmp_path: Path) -> None:
    """By the Auto class and the library's names; a template of its own is saved as the library saves one."""
    given = {"padding_side": "left", "truncation_side": "left", "chat_template": "{{ messages[0]['content'] }}"}
    processor = AutoProcessor.from_pretrained(tiny_model_dir, **given)
    assert processor(["a", "a b c"], padding=True)["attention_mask"][0][0] == 0
    with pytest.raises(ValueError, match="truncation_side"):
        processor("a b c", truncation=True, max_length=2)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_a_tokenizer_with_more_tokens_is_saved(tiny_model_dir: Path, tmp_path: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    processor.tokenizer.add_tokens(["<x>"])
    processor.save_pretrained(tmp_path)
    assert Phi3VProcessor.from_pretrained(tmp_path)("<x>")["input_ids"] == processor("<x>")["input_ids"]
    assert len(processor.tokenizer) - 1 in processor("<x>")["input_ids"][0]


def test_ids_decode(processor: Phi3VProcessor) -> None:
    """Also the official, negative ones, which a tokenizer overflows at."""
    official = processor("<|image_1|>\nred", RED, return_tensors="pt")["input_ids"]
    ids = processor("<|image|>\nred", RED)["input_ids"]
    assert processor.batch_decode(official) == processor.batch_decode(ids)
    assert processor.batch_decode(official)[0].count("<|image|>") == (official < 0).sum()
    assert processor.post_process_image_text_to_text(official) == [processor.decode(ids[0], skip_special_tokens=True)]
    masks = processor("<|image|>\nred", RED, return_mm_token_type_ids=True)["mm_token_type_ids"]
    assert sum(masks[0]) == (official < 0).sum()


@pytest.mark.parametrize("numbered", [False, True])
def test_both_kinds_of_ids_give_the_same_numbers(numbered: bool, model: Any, processor: Phi3VProcessor) -> None:
    inputs = ask(processor, "what?", WIDE, RED)
    ids = inputs["input_ids"]
    is_image = ids == processor.image_token_id
    # The official form: -1 for the first image, -2 for the second.
    number = (is_image & ~is_image.roll(1, dims=1)).cumsum(dim=1) if numbered else 1
    official = torch.where(is_image, -number, ids)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert model(**(inputs | {"input_ids": official})).logits.equal(expected)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(
    "ways",
    [
        {"repetition_penalty": 1.2},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
    ],
    ids=str,
)
def test_ways_of_generating(ways: dict[str, Any], count: int, model: Any, processor: Phi3VProcessor) -> None:
    """Prompts of a batch with different images give what each gives alone; the ids of a prompt come back decodable."""
    prompts = [[WIDE, RED][:count], [RED, BLUE][:count]]
    messages = [[{"role": "user", "content": blocks("what is this?", *images)}] for images in prompts]

    def run(conversations: list[Any], padding_side: str = "left") -> torch.Tensor:
        options = {"padding": True, "padding_side": padding_side}
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )
        torch.manual_seed(0)
        ids = model.generate(**inputs, max_new_tokens=6, **ways)
        assert (ids >= 0).all()
        assert len(processor.batch_decode(ids)) == len(ids)
        return ids[:, inputs["input_ids"].shape[1] :]

    together = run(messages)
    if "do_sample" in ways:  # one generator draws for all rows
        assert len(together) == 2 * ways["num_return_sequences"]
        return
    assert together.tolist() == torch.cat([run([one]) for one in messages]).tolist()
    assert run(messages, "right").equal(together)


@pytest.mark.parametrize("images", [(), (WIDE,), (WIDE, RED)], ids=len)
def test_greedy_in_other_ways_is_greedy(images: tuple[Image.Image, ...], model: Any, processor: Phi3VProcessor) -> None:
    inputs = ask(processor, "what is in this picture?", *images)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs, **greedy)
    new = expected[:, inputs["input_ids"].shape[1] :]
    assert model.generate(**inputs, **greedy, cache_implementation="static").equal(expected)
    assert model.generate(**inputs, **greedy, prompt_lookup_num_tokens=3).equal(expected)
    assert model.generate(**inputs, **greedy, assistant_model=model).equal(expected)
    official = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -1)
    if len(images) < 2:
        assert model.generate(**(inputs | {"input_ids": official}), **greedy).equal(expected)
    embeddings = model.model.embed(**{name: inputs[name] for name in inputs if name != "attention_mask"})
    assert model.generate(inputs_embeds=embeddings, **greedy).equal(new)
    if not images:
        assert model.generate(**inputs, **greedy, prefill_chunk_size=5).equal(expected)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="it knows no 8-bit floating-point cache"
)
def test_a_quantised_cache(tmp_path: Path) -> None:
    """The answer of a trained model is that of the whole cache."""
    copy_pretrained("tiny", tmp_path / "base")
    processor = Phi3VProcessor.from_pretrained(tmp_path / "base")
    model = Phi3VForCausalLM.from_pretrained(tmp_path / "base")
    inputs = ask(processor, "what color is the shape?", RED)
    quantised = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    expected, given = (model.generate(**inputs, max_new_tokens=8, do_sample=False, **way) for way in ({}, quantised))
    assert given.equal(expected)


@pytest.mark.parametrize("way", ["prompt_lookup", "assistant", "static", "embeddings"])
@pytest.mark.parametrize("room", [0, 3, 5])
def test_across_the_long_rope_switch(way: str, room: int, tiny_model_dir: Path, processor: Phi3VProcessor) -> None:
    """Drafts may cross the switch and be taken back: the cache must not stay rotated for the other side."""
    inputs = ask(processor, "red red red red", RED)
    length = inputs["input_ids"].shape[1]
    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir, original_max_position_embeddings=length + room)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs, **greedy)
    if way == "embeddings":
        embeddings = model.model.embed(**{name: inputs[name] for name in inputs if name != "attention_mask"})
        assert model.generate(inputs_embeds=embeddings, **greedy).equal(expected[:, length:])
        return
    torch.manual_seed(1)
    other = Phi3VForCausalLM._from_config(model.config, dtype=torch.float32)
    options: dict[str, Any] = {
        "prompt_lookup": {"prompt_lookup_num_tokens": 6},
        "assistant": {"assistant_model": other},
        "static": {"cache_implementation": "static"},
    }[way]
    assert model.generate(**inputs, **greedy, **options).equal(expected)


def test_a_cache_goes_on(model: Any, processor: Phi3VProcessor) -> None:
    """The second question of a chat with the cache of the first."""
    first = ask(processor, "what?", RED)
    cache = DynamicCache(config=model.config)
    answered = model.generate(**first, max_new_tokens=4, do_sample=False, **{model_cache_name(): cache})
    more = torch.tensor([processor.tokenize_text("<|end|>\n<|user|>\nwhy?<|end|>\n<|assistant|>\n")])
    ids = torch.cat([answered, more], dim=1)
    again = first | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**again, max_new_tokens=6, do_sample=False)
    went_on = model.generate(**again, max_new_tokens=6, do_sample=False, **{model_cache_name(): cache})
    assert went_on.equal(expected)


def test_a_cache_goes_on_with_another_image(model: Any, processor: Phi3VProcessor) -> None:
    first = [{"role": "user", "content": blocks("what?", RED)}, {"role": "assistant", "content": "red"}]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([first[0]], **options)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, use_cache=True, **{model_cache_name(): cache})
    again = [*first, {"role": "user", "content": blocks("and this?", WIDE)}]
    inputs = processor.apply_chat_template(again, add_generation_prompt=True, **options)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    went_on = model.generate(**inputs, max_new_tokens=6, do_sample=False, **{model_cache_name(): cache})
    assert went_on.equal(expected)


def model_cache_name() -> str:
    """transformers 5.24 renamed it."""
    names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in names else "past_key_values"


def test_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that writes text, and of a folder that holds an adapter and its processor."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    copy_pretrained("tiny", base)
    settings = json.loads((base / "preprocessor_config.json").read_text())
    settings["auto_map"] = {"AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor"}  # as published
    (base / "preprocessor_config.json").write_text(json.dumps(settings))
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", questions.append)  # whether to run that code
    messages = [{"role": "user", "content": blocks("what?", RED)}]
    answers = []
    adapted = get_peft_model(
        Phi3VForCausalLM.from_pretrained(base), LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(adapter)
    Phi3VProcessor.from_pretrained(base).save_pretrained(adapter)
    for folder, its_model in ((base, Phi3VForCausalLM.from_pretrained(base)), (adapter, adapted)):
        pipe = pipeline("image-text-to-text", str(folder))
        (answer,) = pipe(text=messages, max_new_tokens=8, return_full_text=False, do_sample=False)
        own = Phi3VProcessor.from_pretrained(folder)
        inputs = ask(own, "what?", RED)
        ids = its_model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers.append(answer["generated_text"])
        expected = own.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answers[-1].strip() == expected.strip()
    assert answers[0] != answers[1]
    assert not questions


def test_decoder_compiles_and_exports(tiny_model_dir: Path) -> None:
    """As one graph; the exported one takes prompts of any length. 1e-5 is float32's rounding in fused sums."""
    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="eager").eval()

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(ids, use_cache=False).logits
            return logits

    short, long = torch.arange(3, 23)[None], torch.arange(5, 45)[None]
    with torch.no_grad():
        compiled = torch.compile(Decoder(), fullgraph=True, backend="eager")
        program = torch.export.export(Decoder(), (short,), dynamic_shapes=({1: torch.export.Dim("length", max=64)},))
        for ids in (short, long):
            for graph in (compiled, program.module()):
                torch.testing.assert_close(graph(ids), Decoder()(ids), atol=1e-5, rtol=0)


def test_exports_with_images(tiny_model_dir: Path, processor: Phi3VProcessor) -> None:
    """Sizes are constants of the graph, pixels and ids its inputs."""
    model = Phi3VForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="eager").eval()
    inputs = ask(processor, "what?", WIDE, RED)
    sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
    given = {"pixel_values": inputs["pixel_values"], "image_sizes": sizes, "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (inputs["input_ids"],), given)
        other = given | {"pixel_values": torch.rand_like(given["pixel_values"])}
        for pixels in (given, other):
            torch.testing.assert_close(
                program.module()(inputs["input_ids"], **pixels).logits,
                model(inputs["input_ids"], **pixels).logits,
                atol=1e-5,
                rtol=0,
            )
