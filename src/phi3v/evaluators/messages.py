"""The messages of an evaluation harness as a prompt of the model, and its settings of generation as ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from phi3v.data.collate import Page, Sample
from phi3v.data.images import decode_image
from phi3v.data.video import sample_frames
from phi3v.errors import UserError
from phi3v.evaluate.text_scores import is_correct
from phi3v.processing.conversation import ChatTurn, encode_conversation
from phi3v.processing.processor import Phi3VProcessor
from phi3v.processing.special_text import escape_special_text


@dataclass
class _Turn:
    text: str = ""
    images: list[Image.Image] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    is_placed: bool = False  # an image stands after a block of text
    answer: str | None = None

    def chat_turn(self) -> ChatTurn:
        offsets = tuple(self.offsets) if self.is_placed else None
        return ChatTurn(self.text, self.answer, len(self.images), offsets)


def read_messages(
    messages: Sequence[Mapping[str, Any]], processor: Phi3VProcessor, *, frames: int, where: str
) -> Sample:
    """The prompt of a conversation that ends with a question.

    Images that come before all text get a line of their own, as in training; others stay where they stand in the text.
    Of a clip evenly spaced frames are taken, each an image. Text that would be read as a special token is broken up.

    Args:
        messages: of the roles ``system``, ``user`` and ``assistant``; their content is a text, or a list of blocks
            ``{"type": "text", "text": …}``, ``{"type": "image", "url": PIL image or path}`` and ``{"type": "video",
            "url": path or list of images}``.
        frames: of a clip.
        where: the question, for a message.

    Raises:
        UserError: a message, an image or a clip cannot be used.
    """
    system: str | None = None
    turns: list[_Turn] = []
    for message in messages:
        role, content = message["role"], message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role == "user" and (not turns or turns[-1].answer is not None):
            turns.append(_read_question(blocks, frames, processor.image_processor.exif_orientation, where))
        elif role == "system" and system is None and not turns:
            system = _read_text(blocks, where)
        elif role == "assistant" and turns and turns[-1].answer is None:
            turns[-1].answer = _read_text(blocks, where)
        else:
            raise UserError(f"a message of the role {role!r} is out of order", where=where)
    if not turns or turns[-1].answer is not None:
        raise UserError("the messages do not end with a question", where=where)
    pages = [_page(image, processor) for turn in turns for image in turn.images]
    counts = [page.num_img_tokens for page in pages]
    stream = encode_conversation(
        processor.backend_tokenizer, [turn.chat_turn() for turn in turns], counts, system=system
    )
    return Sample(stream.input_ids, [], pages)


def _read_text(blocks: Sequence[Mapping[str, Any]], where: str) -> str:
    if other := next((block["type"] for block in blocks if block["type"] != "text"), None):
        raise UserError(f"has a block of type {other!r} outside of a question", where=where)
    return escape_special_text("".join(block["text"] for block in blocks))


def _read_question(blocks: Sequence[Mapping[str, Any]], frames: int, exif_orientation: bool, where: str) -> _Turn:
    turn = _Turn()
    seen_text = False
    for block in blocks:
        if block["type"] == "text":
            turn.text += escape_special_text(block["text"])
            seen_text = True
            continue
        images = _read_media(block, frames, exif_orientation, where)
        turn.images += images
        turn.offsets += [len(turn.text)] * len(images)
        turn.is_placed |= seen_text
    return turn


def _read_media(block: Mapping[str, Any], frames: int, exif_orientation: bool, where: str) -> list[Image.Image]:
    kind, medium = block["type"], block.get("url")
    if kind == "image" and isinstance(medium, Image.Image):
        return [medium]
    if kind == "image" and isinstance(medium, str | Path):
        try:
            return [decode_image(Path(medium).read_bytes(), str(medium), exif_orientation=exif_orientation)]
        except OSError as error:
            raise UserError(f"the image cannot be read ({error.strerror})", where=f"{where}: {medium}") from None
    if kind == "video" and isinstance(medium, str | Path):
        return sample_frames(Path(medium), frames)
    if kind == "video" and isinstance(medium, list) and all(isinstance(frame, Image.Image) for frame in medium):
        return medium
    hint = "images and clips are taken, as paths or as PIL images"
    raise UserError(f"a block of type {kind!r} holds a {type(medium).__name__}", where=where, hint=hint)


def _page(image: Image.Image, processor: Phi3VProcessor) -> Page:
    """A page that is named by its content, so that questions about the same image share it."""
    pixels = processor.image_processor.page(image)  # [height, width, 3] uint8
    name = hashlib.blake2b(pixels.numpy(), digest_size=16).hexdigest()
    return Page(f"{name}-{pixels.shape[1]}", (pixels.shape[0], pixels.shape[1]), pixels)


DEFAULT_NEW_TOKENS = 1024  # of an answer at most, where a task says nothing
# What greedy decoding makes no use of, whatever is set.
_WITHOUT_EFFECT = ("image_aspect_ratio", "seed", "top_k", "top_p", "use_cache")


@dataclass(frozen=True)
class Generation:
    """How questions are answered.

    Attributes:
        until: texts before which an answer ends.
        answer_words: candidate answers whose probabilities are wanted too; see `write_answer`.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    until: tuple[str, ...] = ()
    answer_words: tuple[str, ...] = ()

    @classmethod
    def read(cls, settings: Mapping[str, Any], where: str) -> Generation:
        """A task's settings of generation, under the names of the library's ``generate``.

        Raises:
            UserError: something else than greedy decoding is asked for.
        """
        known = {key: value for key, value in settings.items() if value is not None and key not in _WITHOUT_EFFECT}
        until = known.pop("until", ())
        greedy = {"do_sample": False, "temperature": 0, "num_beams": 1, "repetition_penalty": 1}
        # A temperature says nothing where it is not sampled.
        if known.get("do_sample") is False:
            known.pop("temperature", None)
        for key, value in greedy.items():
            if float(known.pop(key, value)) != value:
                hint = f"evaluation is greedy: set {key} to {value}, e.g. --gen_kwargs {key}={value}"
                raise UserError(f"{key} is {settings[key]}", where=f"{where}: generation_kwargs", hint=hint)
        generation = cls(
            int(known.pop("max_new_tokens", DEFAULT_NEW_TOKENS)),
            (until,) if isinstance(until, str) else tuple(until),
            tuple(known.pop("answer_words", ())),
        )
        if known:
            hint = "max_new_tokens, until and answer_words are taken"
            raise UserError(f"{next(iter(known))} is not known", where=f"{where}: generation_kwargs", hint=hint)
        if generation.max_new_tokens < 1:
            raise UserError("must be at least 1", where=f"{where}: generation_kwargs.max_new_tokens")
        return generation

    def end(self, answer: str) -> str:
        """An answer up to the first of ``until``."""
        for text in filter(None, self.until):
            answer = answer.partition(text)[0]
        return answer.strip()


def write_answer(text: str, probabilities: Mapping[str, float]) -> str:
    """An answer as a harness keeps it: its text; as JSON where answer words have probabilities."""
    return json.dumps({"answer": text, "probabilities": dict(probabilities)}) if probabilities else text


def read_answer(answer: str, words: Sequence[str]) -> tuple[str, list[float]]:
    """The text and the probability of each of ``words``, of what `write_answer` gave.

    The answer of a model that gives no probabilities counts as sure of its word, and of none if it is none of them.
    """
    if not words:
        return answer, []
    try:
        value = json.loads(answer)
        return str(value["answer"]), [float(value["probabilities"][word]) for word in words]
    except (ValueError, KeyError, TypeError):
        given = [float(is_correct(answer, [word])) for word in words]
        return answer, given if any(given) else [1 / len(words)] * len(words)
