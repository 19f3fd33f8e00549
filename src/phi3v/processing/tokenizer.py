"""Phi-3's tokenizer, made from its files; rows of its tokens, padded.

`read_tokenizer` needs neither torch nor transformers, which the others import: exported graphs run without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from phi3v.errors import UserError
from phi3v.json_files import content_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG, "special_tokens_map.json")
IMAGE_TOKEN = "<|image|>"  # transformers' convention: its own token at every place of an image
# The special tokens of the chat format, with their ids in the official vocabulary.
TOKEN_IDS = {
    "<|endoftext|>": 32000,
    "<|assistant|>": 32001,
    "<|system|>": 32006,
    "<|end|>": 32007,
    "<|user|>": 32010,
    IMAGE_TOKEN: 32044,
}
# As in the official tokenizer_config.json. vLLM decodes a prompt and encodes it again, and removes the white space that
# decoding leaves behind the tokens that are named there.
ADDITIONAL_SPECIAL_TOKENS = ["<|system|>", "<|end|>", "<|user|>"]
# Without those of the chat format a tokenizer is not this model's; that of images is younger than some checkpoints.
CHAT_TOKENS = tuple(token for token in TOKEN_IDS if token != IMAGE_TOKEN)
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of ``tokenizer.json``.

    Raises:
        UserError: the file is damaged, or belongs to another model.
    """
    with content_of(file):
        tokens = Tokenizer.from_file(str(file))
    if lacking := [token for token in CHAT_TOKENS if tokens.token_to_id(token) is None]:
        raise UserError(
            f"has no token {lacking[0]}, so it is not the tokenizer of this model",
            where=str(file),
            hint="copy it again from the published model",
        )
    return tokens


def load_tokenizer(file: Path, config_file: Path | None, config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of ``tokenizer.json`` with the settings of ``tokenizer_config.json``.

    Raises:
        UserError: a file is damaged, names no token or one that is not there, or belongs to another model.
    """
    tokens = read_tokenizer(file)
    with content_of(config_file or file.parent):
        return _make_tokenizer(tokens, config)


def _make_tokenizer(tokens: Tokenizer, config: dict[str, Any]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    if lacking := [name for name in ("bos_token", "eos_token", "pad_token") if not config.get(name)]:
        raise ValueError(f"it has no {lacking[0]}")
    # tokenizer.json is complete. The class named in tokenizer_config.json (LlamaTokenizer) is not used, because
    # versions of transformers convert it differently.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        chat_template=config.get("chat_template"),
        model_max_length=config.get("model_max_length"),
        padding_side=config.get("padding_side", "right"),
        truncation_side=config.get("truncation_side", "right"),
        clean_up_tokenization_spaces=config.get("clean_up_tokenization_spaces", False),
        **{name: _token_text(config[name]) for name in _NAMED_TOKENS if config.get(name) is not None},
    )
    if unknown := [token for token in tokenizer.all_special_tokens if tokens.token_to_id(token) is None]:
        raise ValueError(f"{unknown[0]!r} is no token of {TOKENIZER_FILE}")
    return tokenizer


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, side: str, length: int | None = None
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` (B, T) int64 of rows of any lengths, padded ``left`` or ``right``.

    Args:
        length: T, where the longest row is shorter.
    """
    import torch

    length = max(length or 0, *(len(row) for row in rows))
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        input_ids[index, where] = torch.tensor(row, dtype=torch.int64)
        attention_mask[index, where] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def pad_offsets(offsets: list[tuple[int, int]], length: int, side: str) -> list[tuple[int, int]]:
    """Padding has no width, and the starts still ascend."""
    missing = length - len(offsets)
    if side == "left":
        return [(0, 0)] * missing + offsets
    end = offsets[-1][1] if offsets else 0
    return offsets + [(end, end)] * missing
