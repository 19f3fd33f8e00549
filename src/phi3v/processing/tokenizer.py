"""Phi-3's tokenizer, made from its files."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG, "special_tokens_map.json")
CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def make_tokenizer(tokens: Tokenizer, config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of ``tokenizer.json`` with the settings of ``tokenizer_config.json``.

    Raises:
        ValueError: ``config`` names no token, or one that is not there.
    """
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


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
