"""The tokens of a conversation, with labels for the supervised ones. Needs no torch: exported graphs run without it.

A turn is ``<|user|>\\n{tags}{question}<|end|>\\n<|assistant|>\\n`` and its answer ``{answer}<|end|>\\n``. The last
answer also ends the text: ``{answer}<|end|>\\n<|endoftext|>``. A system message comes first:
``<|system|>\\n{system}<|end|>\\n``. The image tags of a turn are joined and followed by a line break, unless the turn
gives their positions in the question; they are numbered through the conversation. The loss is taken only on the tokens
of answers, except those of weight 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from phi3v.processing.tokenizer import CHAT_TOKENS, IMAGE_TOKEN

IGNORE_INDEX = -100  # label of a token without loss
END = "<|end|>"
END_OF_TEXT = "<|endoftext|>"
UNFINISHED = "\ufffd"  # what a character of several tokens decodes to before its last one
IMAGE_TAG = re.compile(r"<\|image(?:_(\d+))?\|>")


def image_tag(number: int) -> str:
    """The tag of the ``number``-th image, from 1."""
    return f"<|image_{number}|>"


def tokenize_text(tokenizer: Tokenizer, text: str, *, starts_text: bool = False) -> list[int]:
    """Token ids of ``text`` without image tags, with BOS before it where it starts a text."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=starts_text).ids
    return ids


def tokenize_answer(tokenizer: Tokenizer, answer: str, *, is_last: bool = True) -> list[int]:
    """Token ids of an answer and of what ends it; the last one also ends the text."""
    return tokenize_text(tokenizer, answer + END + "\n" + (END_OF_TEXT if is_last else ""))


def tokenize_segment(
    tokenizer: Tokenizer,
    text: str,
    num_img_tokens: Sequence[int],
    *,
    starts_text: bool,
    offsets: list[tuple[int, int]] | None = None,
) -> list[int]:
    """Token ids of a part of a conversation: ``<|image_k|>`` as a run of ``-k``, ``<|image|>`` of its own id.

    The text between images is tokenised chunk by chunk and **every chunk starts with BOS**; the model was trained
    so (`Phi3VProcessor._convert_images_texts_to_inputs` of the official code). A segment that goes on after
    earlier text has none before its first chunk.

    Args:
        num_img_tokens: tokens of every image of the conversation, by number, or in order of the ``<|image|>``.
        offsets: filled with the place (start, end) of each token in ``text``.
    """
    image_token_id = tokenizer.token_to_id(IMAGE_TOKEN)
    ids: list[int] = []
    start = 0
    for index, match in enumerate([*IMAGE_TAG.finditer(text), None]):
        chunk = text[start : match.start() if match else None]
        # Also an empty chunk has one: two adjacent images have a BOS in between.
        encoding = tokenizer.encode(chunk, add_special_tokens=starts_text or index > 0)
        ids += encoding.ids
        if offsets is not None:
            # The white space that a token of the chat format takes up, but for a line break, is counted to the next
            # one: a target begins with it, and the token before is none.
            taken = None
            for token, (begin, end) in zip(encoding.tokens, encoding.offsets, strict=True):
                first, bare = begin if taken is None else taken, token.rstrip()
                taken = min(end, begin + len(bare) + 1) if bare in CHAT_TOKENS else None
                offsets.append((start + first, start + (end if taken is None else taken)))
        if match:
            number = int(match[1] or index + 1)
            image_id = -number if match[1] else image_token_id
            ids += [image_id] * num_img_tokens[number - 1]  # type: ignore[list-item] # the processor checks it
            if offsets is not None:
                offsets += [match.span()] * num_img_tokens[number - 1]
            start = match.end()
    return ids


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Generation ends at ``<|end|>`` and ``<|endoftext|>``, whatever generation_config.json says."""
    ids: list[Any] = [tokenizer.token_to_id(token) for token in (END, END_OF_TEXT)]
    return ids


def decode_answer(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[int]) -> str:
    """The text of generated ``ids`` up to the first stop token."""
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return str(tokenizer.decode(list(ids[:end]), skip_special_tokens=True)).strip()


@dataclass(frozen=True)
class ChatTurn:
    """One question and its answer.

    Attributes:
        assistant: ``None`` if the model is to answer.
        image_offsets: position in ``user`` of each image tag; ``None``: all before it, on a line of their own.
        weight: 0 for an answer without loss.
    """

    user: str
    assistant: str | None = None
    num_images: int = 0
    image_offsets: tuple[int, ...] | None = None
    weight: int = 1


@dataclass
class TokenStream:
    """A conversation in tokens.

    Attributes:
        input_ids: image k as a run of ``-k``.
        labels: of the same length.
        prompts: number of tokens before the answer, for each turn.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)


def user_prompt(
    user: str,
    image_numbers: Sequence[int] = (),
    image_offsets: Sequence[int] | None = None,
    *,
    system: str | None = None,
) -> str:
    """The prompt of a turn up to its answer, with the system message first if there is one."""
    tags = [image_tag(number) for number in image_numbers]
    if image_offsets is None:
        content = "".join(tags) + ("\n" if tags else "") + user
    else:
        pieces = [user[start:end] for start, end in pairwise([0, *image_offsets, len(user)])]
        content = pieces[0] + "".join(tag + piece for tag, piece in zip(tags, pieces[1:], strict=True))
    before = "" if system is None else f"<|system|>\n{system}{END}\n"
    return f"{before}<|user|>\n{content}{END}\n<|assistant|>\n"


def encode_conversation(
    tokenizer: Tokenizer, turns: Sequence[ChatTurn], num_img_tokens: Sequence[int], *, system: str | None = None
) -> TokenStream:
    """The token stream of ``turns``.

    Args:
        num_img_tokens: tokens of every image of the conversation, in order.
        system: the system message, if there is one.

    Raises:
        ValueError: there is no turn, images and turns do not match, a question or the system message contains an image
            tag, or an answer before the last turn is missing.
    """
    if not turns:
        raise ValueError("a conversation needs at least one turn")
    expected = sum(turn.num_images for turn in turns)
    if expected != len(num_img_tokens):
        raise ValueError(f"the turns have {expected} images but token counts of {len(num_img_tokens)} were given")
    if system is not None and IMAGE_TAG.search(system):
        raise ValueError("the system message has an image tag in its text: escape it")
    stream = TokenStream()
    next_image = 1
    for index, turn in enumerate(turns):
        if IMAGE_TAG.search(turn.user):
            raise ValueError(f"turn {index + 1} has an image tag in its text: escape it")
        numbers = range(next_image, next_image + turn.num_images)
        next_image += turn.num_images
        text = user_prompt(turn.user, numbers, turn.image_offsets, system=system if index == 0 else None)
        prompt = tokenize_segment(tokenizer, text, num_img_tokens, starts_text=index == 0)
        stream.input_ids += prompt
        stream.labels += [IGNORE_INDEX] * len(prompt)
        stream.prompts.append(len(stream.input_ids))
        is_last = index == len(turns) - 1
        if turn.assistant is None:
            if not is_last:
                raise ValueError(f"turn {index + 1} of {len(turns)} has no answer")
            return stream
        answer_ids = tokenize_answer(tokenizer, turn.assistant, is_last=is_last)
        stream.input_ids += answer_ids
        stream.labels += answer_ids if turn.weight else [IGNORE_INDEX] * len(answer_ids)
    return stream
