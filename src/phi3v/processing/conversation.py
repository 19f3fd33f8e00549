"""The token stream of a conversation, with labels for the supervised tokens.

A turn is ``<|user|>\\n{tags}{question}<|end|>\\n<|assistant|>\\n`` and its answer ``{answer}<|end|>\\n``. The last
answer also ends the text: ``{answer}<|end|>\\n<|endoftext|>``. A system message comes first:
``<|system|>\\n{system}<|end|>\\n``. The image tags of a turn are joined and followed by a line break, unless the turn
gives their positions in the question; they are numbered through the conversation. The loss is taken only on the tokens
of answers, except those of weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from phi3v.processing.hd_transform import CROP_SIZE, num_img_tokens
from phi3v.processing.processor import IMAGE_TAG, Phi3VProcessor, image_tag

IGNORE_INDEX = -100  # label of a token without loss
END = "<|end|>"
END_OF_TEXT = "<|endoftext|>"


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


class ImageAlignmentError(ValueError):
    """Placeholders and images do not fit together; the message gives both counts and where."""


def image_runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """(number of the image, placeholder tokens) of every run of an image id, in order."""
    return [(-token, len(list(run))) for token, run in groupby(ids) if token < 0]


def check_image_runs(runs: Sequence[tuple[int, int]], image_sizes: Sequence[tuple[int, int]], where: str) -> None:
    """Check that every run of placeholders is as long as its image has tokens.

    Args:
        runs: as of `image_runs`.
        image_sizes: padded (height, width) of each image in pixels.
        where: the record or row, for the message.

    Raises:
        ImageAlignmentError: otherwise.
    """
    if len(runs) != len(image_sizes):
        raise ImageAlignmentError(f"{where} has placeholders for {len(runs)} images but {len(image_sizes)} images")
    for (number, length), (height, width) in zip(runs, image_sizes, strict=True):
        expected = num_img_tokens(height // CROP_SIZE, width // CROP_SIZE)
        if length != expected:
            raise ImageAlignmentError(
                f"{where}: image {number} has {length} placeholder tokens but {expected} features "
                f"({height} x {width} pixels)"
            )


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
    processor: Phi3VProcessor, turns: Sequence[ChatTurn], num_img_tokens: Sequence[int], *, system: str | None = None
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
