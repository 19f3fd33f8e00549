"""The token stream of a conversation and the mask of what is learnt.

A turn is ``<|user|>\\n{tags}{question}<|end|>\\n<|assistant|>\\n`` and its answer ``{answer}<|end|>\\n``. The last
answer also ends the text: ``{answer}<|end|>\\n<|endoftext|>``. A system message comes first:
``<|system|>\\n{system}<|end|>\\n``. The tags of a turn's images are joined and followed by a line break, unless the
turn says where in the question each stands; their numbers run on through the conversation. The loss is on the answers'
tokens only, and on none of an answer of weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from phi3v.processing.processor import IMAGE_TAG, Phi3VProcessor, image_tag

IGNORE_INDEX = -100  # label of a token that is not learnt
END = "<|end|>"
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class ChatTurn:
    """One question and its answer.

    Attributes:
        assistant: ``None`` where the model is to answer.
        image_offsets: where in ``user`` the tag of each image stands; ``None``: all before it, in a line of their own.
        weight: 0 for an answer that is read but not learnt.
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
        labels: beside them, equally long.
        prompts: for each turn, how many tokens come before its answer.
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
    """The text from the start of a user's turn to where its answer begins, after the system message if there is one."""
    tags = [image_tag(number) for number in image_numbers]
    if image_offsets is None:
        content = "".join(tags) + ("\n" if tags else "") + user
    else:
        pieces = [user[start:end] for start, end in pairwise([0, *image_offsets, len(user)])]
        content = pieces[0] + "".join(tag + piece for tag, piece in zip(tags, pieces[1:], strict=True))
    before = "" if system is None else f"<|system|>\n{system}{END}\n"
    return f"{before}<|user|>\n{content}{END}\n<|assistant|>\n"


def encode_conversation(
    processor: Phi3VProcessor, turns: Sequence[ChatTurn], num_img_tokens: Sequence[int], *, system: str | None = None
) -> TokenStream:
    """The token stream of ``turns``.

    Args:
        num_img_tokens: tokens of every picture of the conversation, in order.
        system: the system message, if there is one.

    Raises:
        ValueError: no turn, pictures and turns do not fit together, a question or the system message holds an image
            tag of its own, or an answer is missing before the last turn.
    """
    if not turns:
        raise ValueError("a conversation needs at least one turn")
    expected = sum(turn.num_images for turn in turns)
    if expected != len(num_img_tokens):
        raise ValueError(f"the turns have {expected} pictures but token counts of {len(num_img_tokens)} were given")
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
        prompt = processor.tokenize_segment(text, num_img_tokens, starts_text=index == 0)
        stream.input_ids += prompt
        stream.labels += [IGNORE_INDEX] * len(prompt)
        stream.prompts.append(len(stream.input_ids))
        is_last = index == len(turns) - 1
        if turn.assistant is None:
            if not is_last:
                raise ValueError(f"turn {index + 1} of {len(turns)} has no answer")
            return stream
        answer = turn.assistant + END + "\n" + (END_OF_TEXT if is_last else "")
        answer_ids = processor.tokenize_text(answer)
        stream.input_ids += answer_ids
        stream.labels += answer_ids if turn.weight else [IGNORE_INDEX] * len(answer_ids)
    return stream
