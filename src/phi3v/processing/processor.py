"""The processor: text with image tags and images to model inputs, equal to the official one."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
