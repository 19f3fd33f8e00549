"""Special tokens that stand in a text by accident."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from phi3v.processing.special_text import escape_special_text, find_special_text
from phi3v.processing.tiny_tokenizer import build_tiny_tokenizer

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>", "<|image_1|>", "<|image_23|>")
SPECIAL += ("<|placeholder7|>", "<|image|>", "<s>", "</s>", "<unk>")
PLAIN = ("", "a < b | c > d", "<|end", "|end|>", "<end>", "< |end|>", "<|image_|>", "<|Image_1|>", "<S>", "<b>", "<||>")


@pytest.mark.parametrize("text", SPECIAL)
def test_found_and_escaped(text: str) -> None:
    sentence = f"what is {text}?"
    assert find_special_text(sentence) == [text]
    assert escape_special_text(sentence) == f"what is < {text[1:]}?"


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_is_left_alone(text: str) -> None:
    assert find_special_text(text) == []
    assert escape_special_text(text) == text


def test_all_are_found_in_order() -> None:
    assert find_special_text("".join(SPECIAL)) == list(SPECIAL)


NESTED = ("<<|end|>|end|>", "<|<|end|>end|>", "<|end|><|end|>", "<s<s>>", "<|image_<|image_1|>1|>", "<</s>unk>")


@pytest.mark.parametrize("text", [*SPECIAL, *NESTED])
def test_escaped_text_holds_nothing_special(text: str) -> None:
    escaped = escape_special_text(text)
    assert find_special_text(escaped) == []
    assert escape_special_text(escaped) == escaped
    tokenizer = build_tiny_tokenizer()
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    assert special.isdisjoint(tokenizer.encode(escaped, add_special_tokens=False).tokens)


def test_every_added_token_of_the_tiny_tokenizer_is_found() -> None:
    for token in build_tiny_tokenizer().get_added_tokens_decoder().values():
        assert find_special_text(token.content) == [token.content]


def test_every_added_token_of_the_real_tokenizer_is_found(real_tokenizer_dir: Path) -> None:
    added = json.loads((real_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    tokenizer = Tokenizer.from_file(str(real_tokenizer_dir / "tokenizer.json"))
    assert len(added) > 10
    for token in added:
        content = token["content"]
        assert find_special_text(content) == [content]
        assert token["id"] not in tokenizer.encode(escape_special_text(content), add_special_tokens=False).ids
