"""The processor: text with image tags and images to model inputs, equal to the official one; and the tokens of a
conversation, with labels for the supervised ones.

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
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from transformers.utils.hub import cached_file

from phi3v.errors import UserError
from phi3v.json_files import content_of, read_json
from phi3v.processing.hd_transform import CROP_SIZE, num_img_tokens
from phi3v.processing.image_processor import Images, Phi3VImageProcessor, as_list

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
PREPROCESSOR_CONFIG = "preprocessor_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG, "special_tokens_map.json")


def image_tag(number: int) -> str:
    """The tag of the ``number``-th image, from 1."""
    return f"<|image_{number}|>"


class Phi3VProcessor(ProcessorMixin):
    """Tokenizer and image processor of Phi-3-vision in one.

    Args:
        image_processor: cuts images into crops.
        tokenizer: Phi-3's tokenizer.
    """

    def __init__(self, image_processor: Phi3VImageProcessor, tokenizer: PreTrainedTokenizerFast, **kwargs: Any) -> None:
        kwargs.setdefault("chat_template", tokenizer.chat_template)
        super().__init__(image_processor, tokenizer, **kwargs)
        # The original tokenizer files; see `save_pretrained`.
        self._tokenizer_files: dict[str, bytes] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Phi3VProcessor:
        """Load from a folder or a hub id in the official layout.

        Args:
            num_crops: overrides the saved value.
            kwargs: ``revision``, ``cache_dir``, ``token`` … for the hub.

        Raises:
            OSError: a file is missing.
            UserError: a file is damaged, or the tokenizer belongs to another model.
        """
        overrides = {"num_crops": kwargs.pop("num_crops")} if kwargs.get("num_crops") is not None else {}
        kwargs.pop("num_crops", None)
        path = str(pretrained_model_name_or_path)
        found: dict[str, Path] = {}
        for name in (PREPROCESSOR_CONFIG, *TOKENIZER_FILES, "processor_config.json"):
            is_needed = name in (PREPROCESSOR_CONFIG, TOKENIZER_FILE)
            file = cached_file(path, name, _raise_exceptions_for_missing_entries=is_needed, **kwargs)
            if file is not None:
                found[name] = Path(file)
        fields = {name: read_json(file) for name, file in found.items()}
        if "num_crops" not in fields[PREPROCESSOR_CONFIG] | overrides:
            raise UserError(
                "lacks num_crops, the maximum number of crops per image",
                where=str(found[PREPROCESSOR_CONFIG]),
                hint="copy it again from the published model",
            )
        with content_of(found[PREPROCESSOR_CONFIG]):
            image_processor = Phi3VImageProcessor.from_pretrained(path, **kwargs, **overrides)
        with content_of(found[TOKENIZER_FILE]):
            tokens = Tokenizer.from_file(str(found[TOKENIZER_FILE]))
        if lacking := [token for token in _CHAT_TOKENS if tokens.token_to_id(token) is None]:
            raise UserError(
                f"has no token {lacking[0]}, so it is not the tokenizer of this model",
                where=str(found[TOKENIZER_FILE]),
                hint="copy it again from the published model",
            )
        config = fields.get(TOKENIZER_CONFIG, {})
        with content_of(found.get(TOKENIZER_CONFIG, Path(path))):
            tokenizer = cls._tokenizer(tokens, config)
        processor = cls(image_processor, tokenizer)
        processor._tokenizer_files = {name: found[name].read_bytes() for name in TOKENIZER_FILES if name in found}
        return processor

    @staticmethod
    def _tokenizer(tokens: Tokenizer, config: dict[str, Any]) -> PreTrainedTokenizerFast:
        if lacking := [name for name in ("bos_token", "eos_token", "pad_token") if not config.get(name)]:
            raise ValueError(f"it has no {lacking[0]}")
        # tokenizer.json is complete. The class named in tokenizer_config.json (LlamaTokenizer) is not used, because
        # versions of transformers convert it differently.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokens,
            chat_template=config.get("chat_template"),
            model_max_length=config.get("model_max_length"),
            padding_side=config.get("padding_side", "right"),
            clean_up_tokenization_spaces=config.get("clean_up_tokenization_spaces", False),
            **{name: _token_text(config[name]) for name in _NAMED_TOKENS if config.get(name) is not None},
        )
        if unknown := [token for token in tokenizer.all_special_tokens if tokens.token_to_id(token) is None]:
            raise ValueError(f"{unknown[0]!r} is no token of {TOKENIZER_FILE}")
        return tokenizer

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the official files: those of the tokenizer byte for byte, and ``preprocessor_config.json``.

        Training never changes the tokenizer, and transformers would write a class and a merges format that older
        versions and other tools do not support.
        """
        if push_to_hub:
            raise ValueError("save to a folder, check it, then upload it with `hf upload`")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if not self._tokenizer_files:
            self.tokenizer.save_pretrained(folder)
        for name, content in self._tokenizer_files.items():
            (folder / name).write_bytes(content)
        self.image_processor.processor_class = type(self).__name__
        self.image_processor.save_pretrained(folder)
        return [str(file) for file in sorted(folder.iterdir())]

    def tokenize_text(self, text: str, *, starts_text: bool = False) -> list[int]:
        """Token ids of ``text`` without image tags, with BOS before it where it starts a text."""
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=starts_text).ids
        return ids

    def tokenize_segment(self, text: str, num_img_tokens: Sequence[int], *, starts_text: bool) -> list[int]:
        """Token ids of a part of a conversation, image k as a run of ``-k``.

        The text between tags is tokenised chunk by chunk and **every chunk starts with BOS**; the model was trained
        so (`Phi3VProcessor._convert_images_texts_to_inputs` of the official code). A segment that goes on after
        earlier text has none before its first chunk.

        Args:
            num_img_tokens: tokens of every image of the conversation, by number.
        """
        # re.split with a group gives text, number, text, number, …, text.
        ids: list[int] = []
        for index, chunk in enumerate(IMAGE_TAG.split(text)):
            if index % 2:
                ids += [-int(chunk)] * num_img_tokens[int(chunk) - 1]
            else:  # also an empty chunk: two adjacent tags have a BOS in between
                ids += self.tokenize_text(chunk, starts_text=starts_text or index > 0)
        return ids

    def tokenize_with_images(self, text: str, num_img_tokens: Sequence[int]) -> list[int]:
        """Token ids of a whole text with tags ``<|image_1|>`` … ``<|image_n|>``, each once and in order.

        Raises:
            ValueError: tags and images do not match.
        """
        numbers = [int(number) for number in IMAGE_TAG.findall(text)]
        # The model inserts images in reading order (as the official one does), so tags out of order would swap them.
        if numbers != list(range(1, len(num_img_tokens) + 1)):
            raise ValueError(
                f"the text has the image tags {[image_tag(n) for n in numbers]} but {len(num_img_tokens)} images "
                f"were given; each of <|image_1|> … <|image_{max(1, len(num_img_tokens))}|> must occur once, "
                f"in this order"
            )
        return self.tokenize_segment(text, num_img_tokens, starts_text=True)

    def __call__(
        self,
        text: str | Sequence[str],
        images: Images | Sequence[Sequence[Image.Image]] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of one prompt, or of several padded on the tokenizer's ``padding_side``.

        Args:
            text: a prompt with image tags, or a list of them.
            images: the images of the prompt in the order of their numbers; for a list of prompts, a list for each.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 (B, T); with images also ``pixel_values`` and
            ``image_sizes`` (see :class:`Phi3VImageProcessor`).

        Raises:
            ValueError: tags and images do not match.
        """
        if kwargs:
            raise TypeError(f"unknown arguments {sorted(kwargs)}")
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r}: only torch tensors ('pt') are supported")
        texts = [text] if isinstance(text, str) else list(text)
        if images is None:
            groups: list[list[Image.Image]] = [[] for _ in texts]
        elif isinstance(text, str):
            groups = [as_list(images)]  # type: ignore[arg-type]
        else:
            groups = [as_list(group) for group in images]  # type: ignore[union-attr]
        if len(groups) != len(texts):
            raise ValueError(f"{len(texts)} prompts but {len(groups)} lists of images")
        rows = [
            self.tokenize_with_images(row, self.image_processor.calc_num_image_tokens(group))
            for row, group in zip(texts, groups, strict=True)
        ]
        data = pad_rows(rows, self.tokenizer.pad_token_id, self.tokenizer.padding_side)
        flat = [image for group in groups for image in group]
        if flat:
            features = self.image_processor(flat)
            data |= {name: features[name] for name in ("pixel_values", "image_sizes")}
        return BatchFeature(data)


_CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def pad_rows(rows: Sequence[Sequence[int]], pad_token_id: int, side: str) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` (B, T) int64 of rows of any lengths, padded ``left`` or ``right``."""
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        input_ids[index, where] = torch.tensor(row, dtype=torch.int64)
        attention_mask[index, where] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


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
