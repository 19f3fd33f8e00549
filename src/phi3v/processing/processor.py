"""The processor: text with image tags and images to model inputs, equal to the official one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from transformers.utils import CHAT_TEMPLATE_FILE, cached_file

from phi3v.errors import UserError
from phi3v.json_files import content_of, read_json
from phi3v.processing.chat_template import CHAT_TEMPLATE, NUMBERED_CHAT_TEMPLATE, OFFICIAL_CHAT_TEMPLATE
from phi3v.processing.conversation import IMAGE_TAG, image_tag, tokenize_segment, tokenize_text
from phi3v.processing.hd_transform import PREPROCESSOR_CONFIG
from phi3v.processing.image_processor import ImageSource, Phi3VImageProcessor, group_images
from phi3v.processing.tokenizer import (
    IMAGE_TOKEN,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    load_tokenizer,
    pad_offsets,
    pad_rows,
)


class Phi3VProcessor(ProcessorMixin):
    """Tokenizer and image processor of Phi-3-vision in one.

    Args:
        image_processor: cuts images into crops.
        tokenizer: Phi-3's tokenizer.
        chat_template: by default the tokenizer's, unless that is the published one: ours writes the same text for
            content that is text, and takes blocks too.

    Attributes:
        image_token: ``<|image|>``, which stands for an image in a text.
        image_token_id: its id; ``None`` with a tokenizer that has no such token.
        img_tokens: as of the official processor, the numbered tags; more than any context has room for.
    """

    image_token = IMAGE_TOKEN
    default_chat_template = CHAT_TEMPLATE
    img_tokens = tuple(image_tag(number) for number in range(1, 1001))

    def __init__(
        self,
        image_processor: Phi3VImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if chat_template is None:
            own = tokenizer.chat_template
            chat_template = self.default_chat_template if own in (None, OFFICIAL_CHAT_TEMPLATE) else own
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_token_id: int | None = self.backend_tokenizer.token_to_id(IMAGE_TOKEN)
        # The original tokenizer files, and what they hold; see `save_pretrained`.
        self._num_tokens = len(tokenizer)
        self._tokenizer_files: dict[str, bytes] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Phi3VProcessor:
        """Load from a folder or a hub id in the official layout.

        Args:
            num_crops, chat_template, padding_side, truncation_side: override the saved value.
            kwargs: ``revision``, ``cache_dir``, ``token`` … for the hub.

        Raises:
            OSError: a file is missing.
            UserError: a file is damaged, or the tokenizer belongs to another model.
        """
        overrides = {"num_crops": kwargs.pop("num_crops")} if kwargs.get("num_crops") is not None else {}
        kwargs.pop("num_crops", None)
        chat_template = kwargs.pop("chat_template", None)
        sides = {name: kwargs.pop(name) for name in ("padding_side", "truncation_side") if name in kwargs}
        path = str(pretrained_model_name_or_path)
        found: dict[str, Path] = {}
        for name in (PREPROCESSOR_CONFIG, *TOKENIZER_FILES, "processor_config.json", CHAT_TEMPLATE_FILE):
            is_needed = name in (PREPROCESSOR_CONFIG, TOKENIZER_FILE)
            file = cached_file(path, name, _raise_exceptions_for_missing_entries=is_needed, **kwargs)
            if file is not None:
                found[name] = Path(file)
        fields = {name: read_json(file) for name, file in found.items() if name != CHAT_TEMPLATE_FILE}
        if "num_crops" not in fields[PREPROCESSOR_CONFIG] | overrides:
            raise UserError(
                "lacks num_crops, the maximum number of crops per image",
                where=str(found[PREPROCESSOR_CONFIG]),
                hint="copy it again from the published model",
            )
        with content_of(found[PREPROCESSOR_CONFIG]):
            image_processor = Phi3VImageProcessor.from_pretrained(path, **kwargs, **overrides)
        config = fields.get(TOKENIZER_CONFIG, {}) | sides
        tokenizer = load_tokenizer(found[TOKENIZER_FILE], found.get(TOKENIZER_CONFIG), config)
        if chat_template is None and CHAT_TEMPLATE_FILE in found:
            chat_template = found[CHAT_TEMPLATE_FILE].read_text(encoding="utf-8")
        processor = cls(image_processor, tokenizer, None if chat_template == OFFICIAL_CHAT_TEMPLATE else chat_template)
        processor._tokenizer_files = {name: found[name].read_bytes() for name in TOKENIZER_FILES if name in found}
        return processor

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the official files: those of the tokenizer byte for byte, and ``preprocessor_config.json``.

        Training never changes the tokenizer, and transformers would write a class and a merges format that older
        versions and other tools do not support. It writes one that has got more tokens, and a template of its own goes
        into ``chat_template.jinja``.
        """
        if push_to_hub:
            raise ValueError("save to a folder, check it, then upload it with `hf upload`")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if not self._tokenizer_files or len(self.tokenizer) != self._num_tokens:
            self.tokenizer.save_pretrained(folder)
        else:
            for name, content in self._tokenizer_files.items():
                (folder / name).write_bytes(content)
        if self.chat_template not in (CHAT_TEMPLATE, NUMBERED_CHAT_TEMPLATE, self.tokenizer.chat_template):
            (folder / CHAT_TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")
        self.image_processor.processor_class = type(self).__name__
        self.image_processor.save_pretrained(folder)
        return [str(file) for file in sorted(folder.iterdir())]

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer alone, as `phi3v.processing.conversation` takes it."""
        tokens: Tokenizer = self.tokenizer.backend_tokenizer
        return tokens

    def tokenize_text(self, text: str, *, starts_text: bool = False) -> list[int]:
        """Token ids of ``text`` without image tags, with BOS before it where it starts a text."""
        return tokenize_text(self.backend_tokenizer, text, starts_text=starts_text)

    def _check_placeholders(self, text: str, num_images: int) -> None:
        given = [match.group() for match in IMAGE_TAG.finditer(text)]
        tokens = [self.image_token] * num_images
        # The model inserts images in reading order (as the official one does), so tags out of order would swap them.
        if given not in (tokens, [image_tag(number) for number in range(1, num_images + 1)]):
            raise ValueError(
                f"the text has the image tags {given} but {num_images} images were given; write {self.image_token} for "
                f"each of them, or <|image_1|> … <|image_{max(1, num_images)}|> once each, in this order"
            )
        if given == tokens != [] and self.image_token_id is None:
            raise ValueError(f"the tokenizer has no token {self.image_token}: write <|image_1|>, <|image_2|> …")

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: ImageSource | Sequence[ImageSource | Sequence[ImageSource] | None] | None = None,
        padding: bool | str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        *,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        return_mm_token_type_ids: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of one prompt, or of several.

        Args:
            text: a prompt, or a list of them. An image is written as ``<|image|>``, or in the official form as
                ``<|image_1|>`` … ``<|image_n|>``; its tokens are ``image_token_id``, officially ``-1`` … ``-n``.
            images: PIL images, paths, URLs or base64, in the order of the text; for a list of prompts, a list for each,
                or one after the other.
            padding: whether lists are padded, too; ``"max_length"`` pads to that many tokens. Tensors always are.
            truncation: cut what is longer than ``max_length``.
            return_tensors: ``"pt"``; by default, ids and mask are lists.
            padding_side: by default the tokenizer's.
            pad_to_multiple_of: pad to a multiple of so many tokens.
            add_special_tokens: start each prompt with BOS. Text that starts with ``<s>``, as the chat template writes
                it, gets no second one. The text after an image always starts with BOS.
            return_offsets_mapping: add ``offset_mapping``, the place (start, end) of each token in its text.
            return_mm_token_type_ids: add ``mm_token_type_ids``, 1 for the tokens of images.
            kwargs: the same in the library's groups (``text_kwargs`` …), and arguments of other models that are `None`
                or `False`.

        Returns:
            ``input_ids`` and ``attention_mask`` int64 (B, T); with images also ``pixel_values`` and
            ``image_sizes`` (see :class:`Phi3VImageProcessor`).

        Raises:
            ValueError: tags and images do not match, or a cut would go through an image or is to be at the start.
        """
        groups = [kwargs.pop(name, None) or {} for name in ("common_kwargs", "text_kwargs", "images_kwargs")]
        if given := {name: value for group in groups for name, value in group.items()}:
            options = {
                "padding": padding,
                "truncation": truncation,
                "max_length": max_length,
                "return_tensors": return_tensors,
                "padding_side": padding_side,
                "pad_to_multiple_of": pad_to_multiple_of,
                "add_special_tokens": None if add_special_tokens else False,
                "return_offsets_mapping": return_offsets_mapping or None,
                "return_mm_token_type_ids": return_mm_token_type_ids or None,
            }
            return self(
                text, images, **given | {n: value for n, value in options.items() if value is not None} | kwargs
            )
        kwargs.pop("return_text_replacement_offsets", None)  # the offsets are those of the text as it was given
        if unknown := sorted(name for name, value in kwargs.items() if value):
            raise TypeError(f"unknown arguments {unknown}")
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r}: only torch tensors ('pt') are supported")
        if text is None:
            raise ValueError("give a text; an image is written as <|image|> in it")
        # The library's names for neither.
        padding, truncation = padding != "do_not_pad" and padding, truncation != "do_not_truncate" and truncation
        texts = [text] if isinstance(text, str) else list(text)
        numbers = [len(IMAGE_TAG.findall(prompt)) for prompt in texts]
        per_text = group_images(images, numbers, exif_orientation=self.image_processor.exif_orientation)
        rows: list[list[int]] = []
        places: list[list[tuple[int, int]]] = []
        bos = self.tokenizer.bos_token
        for prompt, group in zip(texts, per_text, strict=True):
            self._check_placeholders(prompt, len(group))
            start = len(bos) if prompt.startswith(bos) else 0
            offsets: list[tuple[int, int]] = []
            row = tokenize_segment(
                self.backend_tokenizer,
                prompt[start:],
                self.image_processor.calc_num_image_tokens(group),
                starts_text=add_special_tokens or start > 0,
                offsets=offsets,
            )
            if truncation and max_length is not None and len(row) > max_length:
                if self.tokenizer.truncation_side != "right":
                    raise ValueError("a prompt is cut at its end only: set the tokenizer's truncation_side to 'right'")
                if any(self._is_image(token) for token in row[max_length:]):
                    # The library's own words, by which trainers recognise it.
                    raise ValueError(
                        f"Mismatch in `image` token count between text and `input_ids`: the {len(row)} tokens of a "
                        f"prompt cannot be cut to max_length={max_length}, for an image is in what would be cut; "
                        f"allow more, or set max_length=None"
                    )
                row = row[:max_length]
            rows.append(row)
            places.append([(first + start, end + start) for first, end in offsets[: len(row)]])
        data: dict[str, Any] = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        side = padding_side or self.tokenizer.padding_side
        if return_tensors or padding:
            length = max(map(len, rows)) if padding != "max_length" or max_length is None else max_length
            length = -(-length // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
            data = pad_rows(rows, self.tokenizer.pad_token_id, side, length)
        if return_mm_token_type_ids:
            data["mm_token_type_ids"] = [
                [int(self._is_image(token)) for token in row] for row in map(list, data["input_ids"])
            ]
        if return_offsets_mapping:
            data["offset_mapping"] = [
                pad_offsets(offsets, len(row), side) for offsets, row in zip(places, data["input_ids"], strict=True)
            ]
        if return_tensors:
            for name in ("mm_token_type_ids", "offset_mapping"):
                if name in data:
                    data[name] = torch.tensor(data[name])
        else:
            data = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in data.items()}
        if flat := [image for group in per_text for image in group]:
            features = self.image_processor(flat)
            data |= {name: features[name] for name in ("pixel_values", "image_sizes")}
        return BatchFeature(data)

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        """Tokens of a ``width`` x ``height`` image."""
        return self.image_processor.calc_num_image_tokens_from_image_size(width, height)

    def _is_image(self, token: int) -> bool:
        return token < 0 or token == self.image_token_id

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's, of one sequence or of several; the official ids of images are read as ``<|image|>``."""
        return self.tokenizer.decode(self._without_negative(token_ids), *args, **kwargs)

    batch_decode = decode

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """The text of generated sequences."""
        texts: list[str] = self.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return texts

    def _without_negative(self, ids: Any) -> Any:
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(ids, Sequence):
            return [self._without_negative(item) for item in ids]
        return ids if ids >= 0 else self.image_token_id or self.tokenizer.unk_token_id
