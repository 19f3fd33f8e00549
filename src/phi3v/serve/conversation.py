"""A model that answers in a conversation, and beside it the model that it was tuned from."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from PIL import Image

from phi3v.data.collate import Page, Sample, require_clip_statistics
from phi3v.errors import UserError
from phi3v.evaluate.sampling import Sampling
from phi3v.evaluate.streaming import stream_answer
from phi3v.paths import is_hub_id
from phi3v.processing.conversation import ChatTurn, encode_conversation
from phi3v.processing.processor import Phi3VProcessor
from phi3v.processing.special_text import escape_special_text
from phi3v.serve.limits import LIMITS, Limits
from phi3v.train.device import RuntimeDevice
from phi3v.train.finetuned import FinetunedModel, inspect_tuned, load_tuned, resolve_model

Which = Literal["tuned", "base"]


@dataclass(frozen=True)
class AnswerSettings:
    """How it answers.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        num_crops: crops of an image at most; by default as the model was saved.
    """

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    num_crops: int | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("max new tokens", self.max_new_tokens, 1, 8192),
            ("temperature", self.sampling.temperature, 0, 5),
            ("top-p", self.sampling.top_p, 0.01, 1),
            ("crops", self.num_crops if self.num_crops is not None else 1, 1, 64),
        ):
            if not low <= value <= high:
                raise UserError(f"{name} must be between {low} and {high}, got {value}")


@dataclass
class Turn:
    """A question with its images, and what was answered, as far as it was written.

    Attributes:
        cut: whose answers reached the limit of tokens before their end, and that limit.
    """

    text: str
    images: tuple[Image.Image, ...] = ()
    answers: dict[Which, str] = field(default_factory=dict)
    cut: dict[Which, int] = field(default_factory=dict)


class Chat:
    """Answers questions, one at a time.

    An adapter's base is the same model with the adapter switched off. The base of a model that was tuned in full is
    loaded when it is first asked.

    Args:
        tuned: the model.
        base: what to compare a whole model with, in place of what its run says: a model, an adapter or a run.
        num_crops: crops of an image at most; by default as the model was saved.
        system: the system message of every conversation, as the data had it that the model was tuned on.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(
        self,
        tuned: FinetunedModel,
        runtime: RuntimeDevice,
        *,
        base: str | None = None,
        num_crops: int | None = None,
        system: str | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        self.tuned = tuned
        self.runtime = runtime
        self.limits = limits
        self.base = tuned.base if tuned.adapter is not None else base or _local_origin(tuned)
        self._lock = threading.Lock()
        self._num_crops = num_crops
        self._system = escape_special_text(system) if system else None
        if base is not None and tuned.adapter is None:  # an error now, not at the first question
            inspect_tuned(resolve_model(base), runtime)
        model, processor = load_tuned(tuned, runtime, num_crops=num_crops)
        require_clip_statistics(processor.image_processor)
        self._loaded: dict[Which, tuple[Any, Phi3VProcessor]] = {"tuned": (model, processor)}

    @property
    def can_compare(self) -> bool:
        """Whether there is a base to ask too."""
        return self.base is not None

    @property
    def default_num_crops(self) -> int:
        crops: int = self._loaded["tuned"][1].image_processor.num_crops
        return crops

    def answer(self, turns: Sequence[Turn], settings: AnswerSettings, which: Which = "tuned") -> Iterator[str]:
        """The answer to the last of ``turns`` so far, token by token, last the whole; that turn says if it was cut.

        Text that would be read as a special token is broken up by a space; the tags of images are ours alone.

        Raises:
            UserError: the conversation is too long, or the model cannot be loaded.
        """
        model, processor = self._model(which)
        prompt = self._prompt(turns, settings, which, processor)
        longest: int = model.config.max_position_embeddings
        if len(prompt.input_ids) + settings.max_new_tokens > longest:
            raise UserError(
                f"the conversation is too long for the model: {len(prompt.input_ids):,} tokens of {longest:,}",
                hint="clear it, give fewer images or frames, or allow fewer crops",
            )
        is_whole = yield from stream_answer(
            model,
            processor,
            prompt,
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.sampling,
            autocast_dtype=self.runtime.autocast_dtype,
            around=lambda: self._alone(model, which),
        )
        if not is_whole:
            turns[-1].cut[which] = settings.max_new_tokens

    @contextlib.contextmanager
    def _alone(self, model: Any, which: Which) -> Iterator[None]:
        """No other thread runs the model; for the base of an adapter, the adapter is off."""
        off = which == "base" and isinstance(model, PeftModel)
        with self._lock, model.disable_adapter() if off else contextlib.nullcontext():
            yield

    def _model(self, which: Which) -> tuple[Any, Phi3VProcessor]:
        if which == "base" and self.tuned.adapter is not None:
            which = "tuned"
        with self._lock:
            if which not in self._loaded:
                if self.base is None:
                    raise UserError("there is no model to compare with", hint="name it with --model")
                self._loaded[which] = load_tuned(resolve_model(self.base), self.runtime, num_crops=self._num_crops)
            return self._loaded[which]

    def _prompt(
        self, turns: Sequence[Turn], settings: AnswerSettings, which: Which, processor: Phi3VProcessor
    ) -> Sample:
        images = [image for turn in turns for image in turn.images]
        self.limits.require_images(len(images))
        for turn in turns:
            self.limits.require_text(turn.text)
        cutter = copy.copy(processor.image_processor)
        if settings.num_crops is not None:
            cutter.num_crops = settings.num_crops
        pages = []
        for number, image in enumerate(images):
            pixels = cutter.page(image)  # [height, width, 3] uint8
            pages.append(Page(str(number), (pixels.shape[0], pixels.shape[1]), pixels))
        *earlier, last = turns
        chat = [
            ChatTurn(escape_special_text(turn.text), escape_special_text(turn.answers.get(which, "")), len(turn.images))
            for turn in earlier
        ]
        chat.append(ChatTurn(escape_special_text(last.text), None, len(last.images)))
        counts = [page.num_img_tokens for page in pages]
        stream = encode_conversation(processor.backend_tokenizer, chat, counts, system=self._system)
        return Sample(stream.input_ids, [], pages)


def _local_origin(tuned: FinetunedModel) -> str | None:
    """What a whole model was tuned from, if it is on this machine."""
    origin = tuned.origin
    if origin is None or Path(origin).is_dir():
        return origin
    cached = is_hub_id(origin) and isinstance(try_to_load_from_cache(origin, "config.json"), str)
    return origin if cached else None
