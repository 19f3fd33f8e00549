"""The token stream of a conversation against the official tokenisation, and the mask of what is learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from phi3v import Phi3VProcessor
from phi3v.processing.conversation import IGNORE_INDEX, ChatTurn, encode_conversation, user_prompt

GetImage = Callable[[str], Image.Image]


def learnt(stream: Any) -> list[list[int]]:
    """Runs of learnt tokens."""
    runs: list[list[int]] = []
    previous = IGNORE_INDEX
    for label in stream.labels:
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return runs


def check_labels_copy_the_inputs(stream: Any) -> None:
    assert len(stream.labels) == len(stream.input_ids)
    copied = [(i, lab) for i, lab in zip(stream.input_ids, stream.labels, strict=True) if lab != IGNORE_INDEX]
    assert all(i == lab and i >= 0 for i, lab in copied)
    assert sum(label != IGNORE_INDEX for label in stream.labels) == len(copied)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((), "<|user|>\nWhat?<|end|>\n<|assistant|>\n"),
        ((1,), "<|user|>\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\n"),
        ((3, 4), "<|user|>\n<|image_3|><|image_4|>\nWhat?<|end|>\n<|assistant|>\n"),
    ],
)
def test_user_prompt(numbers: tuple[int, ...], text: str) -> None:
    assert user_prompt("What?", numbers) == text


FORMS: list[tuple[list[ChatTurn], str | None]] = [
    ([ChatTurn("What is 2+2?")], None),
    ([ChatTurn("What is shown in this image?", num_images=1)], None),
    (
        [
            ChatTurn(
                '\n\nIs the sentence true: "both images contain dogs"? Answer True or False.',
                num_images=2,
                image_offsets=(0, 1),
            )
        ],
        None,
    ),
    (
        [ChatTurn("Read the total — in €.", "€ 12,50", num_images=1), ChatTurn("And the date?\n")],
        "You are a helpful assistant.",
    ),
    ([ChatTurn("A  and  thenend", num_images=3, image_offsets=(2, 7, 12))], None),
]


@pytest.mark.parametrize("index", range(len(FORMS)))
def test_prompt_equals_the_reference(
    index: int, golden_cases: dict[str, Any], golden_images: GetImage, real_processor: Phi3VProcessor
) -> None:
    """Every conversation of the golden cases: tags before, within and behind the text, and a system message."""
    case, (turns, system) = golden_cases["tokenizer"][index], FORMS[index]
    images = [golden_images(name) for name in case["images"]]
    counts = real_processor.image_processor.calc_num_image_tokens(images)
    stream = encode_conversation(real_processor.backend_tokenizer, turns, counts, system=system)
    assert stream.input_ids == [token for token, count in case["input_ids_rle"] for _ in range(count)]
    first = user_prompt(turns[0].user, range(1, turns[0].num_images + 1), turns[0].image_offsets, system=system)
    assert case["text"].startswith(first)


def official(
    processor: Phi3VProcessor, turns: list[ChatTurn], images: list[Image.Image], system: str | None
) -> list[int]:
    """Ids of the conversation's chat-template text, tokenised as one text by the processor."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    number = 1
    for turn in turns:
        tags = [f"<|image_{number + offset}|>" for offset in range(turn.num_images)]
        number += turn.num_images
        content = f"{''.join(tags)}\n{turn.user}" if tags else turn.user
        if turn.image_offsets is not None:
            content = turn.user
            for offset, tag in reversed(list(zip(turn.image_offsets, tags, strict=True))):
                content = content[:offset] + tag + content[offset:]
        messages.append({"role": "user", "content": content})
        if turn.assistant is not None:
            messages.append({"role": "assistant", "content": turn.assistant})
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if turns[-1].assistant is not None:
        text = text.removesuffix("<|endoftext|>") + "<|endoftext|>"
    ids: list[int] = processor(text, images or None)["input_ids"][0]
    return ids


LONG = [
    ChatTurn("what color is the shape?", "blue", num_images=1),
    ChatTurn("and these two — naïve?", "a red circle, 1/8/93", num_images=2),
    ChatTurn("text only", "no"),
    ChatTurn("the last", "yes", num_images=1),
]
CASES = {
    "text only": [ChatTurn("What is 2+2?", "4")],
    "one image": [ChatTurn("What is this?", "yes", num_images=1)],
    "images in several turns": LONG,
    "to be answered": [*LONG[:3], ChatTurn("the last", num_images=1)],
    "images within texts": [
        ChatTurn("Picture A: \nPicture B: \nWhich one is red?", "A", num_images=2, image_offsets=(11, 23)),
        ChatTurn("and this?", "no", num_images=1, image_offsets=(9,), weight=0),
        ChatTurn("", "yes", num_images=1, image_offsets=(0,)),
    ],
}


def images_of(turns: list[ChatTurn], image: GetImage) -> list[Image.Image]:
    names = ("64x64", "300x900", "640x480", "2000x250")
    return [image(name) for name, _ in zip(names, range(sum(turn.num_images for turn in turns)), strict=False)]


@pytest.mark.parametrize("system", [None, " Antworte — auf Deutsch. "])
@pytest.mark.parametrize("kind", ["real", "tiny"])
@pytest.mark.parametrize("name", list(CASES))
def test_stream_equals_the_text_tokenised_as_one(
    name: str, kind: str, system: str | None, golden_images: GetImage, request: pytest.FixtureRequest
) -> None:
    """Cutting a conversation into prompts and answers changes no token and puts BOS where the official code does."""
    processor: Phi3VProcessor = request.getfixturevalue(f"{kind}_processor")
    turns = CASES[name]
    images = images_of(turns, golden_images)
    counts = processor.image_processor.calc_num_image_tokens(images)
    stream = encode_conversation(processor.backend_tokenizer, turns, counts, system=system)
    assert stream.input_ids == official(processor, turns, images, system)
    check_labels_copy_the_inputs(stream)
    bos = processor.tokenizer.bos_token_id
    assert stream.input_ids.count(bos) == 1 + len(images)  # one at the start, one after each image


@pytest.mark.parametrize("name", list(CASES))
def test_learnt_tokens_are_the_answers(name: str, golden_images: GetImage, tiny_processor: Phi3VProcessor) -> None:
    turns = CASES[name]
    counts = tiny_processor.image_processor.calc_num_image_tokens(images_of(turns, golden_images))
    stream = encode_conversation(tiny_processor.backend_tokenizer, turns, counts)
    answers = [turn.assistant for turn in turns if turn.assistant is not None]
    ends = ["<|end|>\n"] * len(answers)
    if turns[-1].assistant is not None:
        ends[-1] += "<|endoftext|>"
    expected = [tiny_processor.tokenize_text(answer + end) for answer, end in zip(answers, ends, strict=True)]
    assert learnt(stream) == [ids for ids, turn in zip(expected, turns, strict=False) if turn.weight]


def test_answer_ids_are_the_references(golden_cases: dict[str, Any], real_processor: Phi3VProcessor) -> None:
    """The golden string ``yes<|end|>\\n<|endoftext|>`` is exactly what is learnt of the answer ``yes``."""
    (case,) = [c for c in golden_cases["tokenizer"] if c["text"] == "yes<|end|>\n<|endoftext|>"]
    stream = encode_conversation(real_processor.backend_tokenizer, [ChatTurn("Is it?", "yes")], [])
    assert learnt(stream) == [case["input_ids"]]
    between = encode_conversation(
        real_processor.backend_tokenizer, [ChatTurn("Is it?", "yes"), ChatTurn("And?", "yes")], []
    )
    assert learnt(between) == [case["input_ids"][:-1], case["input_ids"]]


def test_image_numbers_run_on_through_the_conversation(tiny_processor: Phi3VProcessor) -> None:
    stream = encode_conversation(tiny_processor.backend_tokenizer, LONG, [3, 1, 4, 2])
    runs = [token for token in stream.input_ids if token < 0]
    assert runs == [-1] * 3 + [-2] + [-3] * 4 + [-4] * 2


@pytest.mark.parametrize("given", [0, 1, 3])
def test_wrong_number_of_images_is_an_error(given: int, tiny_processor: Phi3VProcessor) -> None:
    with pytest.raises(ValueError, match=f"2 images but token counts of {given} were given"):
        encode_conversation(tiny_processor.backend_tokenizer, [ChatTurn("a", "b", num_images=2)], [1] * given)


def test_missing_answer_before_the_last_turn_is_an_error(tiny_processor: Phi3VProcessor) -> None:
    with pytest.raises(ValueError, match="turn 1 of 2 has no answer"):
        encode_conversation(tiny_processor.backend_tokenizer, [ChatTurn("a"), ChatTurn("b", "c")], [])


def test_no_turn_is_an_error(tiny_processor: Phi3VProcessor) -> None:
    with pytest.raises(ValueError, match="at least one turn"):
        encode_conversation(tiny_processor.backend_tokenizer, [], [])


@pytest.mark.parametrize("tag", ["<|image_1|>", "<|image_2|>", "<|image_0|>", "<|image|>"])
def test_image_tag_in_a_question_is_an_error(tag: str, tiny_processor: Phi3VProcessor) -> None:
    """It would stand for an image (0: the last one): tags are the processor's to write."""
    with pytest.raises(ValueError, match=r"turn 1 .*image tag"):
        encode_conversation(tiny_processor.backend_tokenizer, [ChatTurn(f"what is {tag}?", "a", num_images=1)], [3])
    with pytest.raises(ValueError, match="system message has an image tag"):
        encode_conversation(tiny_processor.backend_tokenizer, [ChatTurn("what?", "a")], [], system=tag)


def test_image_tag_in_an_answer_stays_text(tiny_processor: Phi3VProcessor) -> None:
    stream = encode_conversation(tiny_processor.backend_tokenizer, [ChatTurn("what?", "<|image_1|>")], [])
    assert min(stream.input_ids) >= 0
