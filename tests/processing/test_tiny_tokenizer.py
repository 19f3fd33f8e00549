"""The small tokenizer: deterministic, lossless, and in the real one's form."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from phi3v.processing.tiny_tokenizer import build_tiny_tokenizer, save_tiny_tokenizer
from phi3v.processing.tokenizer import TOKEN_IDS, TOKENIZER_FILES

OFFICIAL_IDS = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "<|endoftext|>": 32000,
    "<|assistant|>": 32001,
    "<|system|>": 32006,
    "<|end|>": 32007,
    "<|user|>": 32010,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tiny_tokenizer()


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    encoded: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return encoded


@pytest.mark.parametrize("official_ids", [False, True])
def test_other_processes_make_the_same_bytes(official_ids: bool, tmp_path: Path) -> None:
    """Two processes with other hash seeds and thread counts than ours, and than each other's."""
    here = tmp_path / "here"
    here.mkdir()
    save_tiny_tokenizer(here, official_ids=official_ids)
    for seed, parallel in (("1", "true"), ("2", "false")):
        there = tmp_path / seed
        there.mkdir()
        code = (
            "import sys; from pathlib import Path; from phi3v.processing.tiny_tokenizer import save_tiny_tokenizer; "
            f"save_tiny_tokenizer(Path(sys.argv[1]), official_ids={official_ids})"
        )
        environment = os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel}
        subprocess.run([sys.executable, "-c", code, str(there)], check=True, env=environment, timeout=120)
        for name in TOKENIZER_FILES:
            assert (there / name).read_bytes() == (here / name).read_bytes(), name


def test_official_ids() -> None:
    tokenizer = build_tiny_tokenizer(official_ids=True)
    assert {token: tokenizer.token_to_id(token) for token in OFFICIAL_IDS} == OFFICIAL_IDS
    small = build_tiny_tokenizer()
    text = "what color is the shape? <|end|>\nblau"
    for mine, theirs in zip(ids(tokenizer, text), ids(small, text), strict=True):
        assert tokenizer.id_to_token(mine) == small.id_to_token(theirs)


def test_small_ids_have_no_gap(tokenizer: Tokenizer) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]


def test_every_special_token_is_one_id(tokenizer: Tokenizer) -> None:
    for token in ("<unk>", "<s>", "</s>", *TOKEN_IDS):
        assert ids(tokenizer, token) == [tokenizer.token_to_id(token)], token


def test_bos_starts_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("red").ids == [1, *ids(tokenizer, "red")]
    assert tokenizer.encode("").ids == [1]


def alphabet() -> list[str]:
    """Every kind of character: ASCII, accents, CJK, emoji, joiners, controls, unassigned; no surrogates."""
    chosen = random.Random(0)
    points = [*range(0x500), 0x200D, 0xFE0F, 0xFFFD, 0x1F3FD, 0x10FFFF]
    points += [chosen.randrange(0x110000) for _ in range(3000)]
    return [chr(point) for point in points if not 0xD800 <= point < 0xE000 and chr(point) != "▁"]


def test_any_text_comes_back(tokenizer: Tokenizer) -> None:
    """Through byte fallback, to the character; only ``▁``, which stands for the space, cannot."""
    characters = alphabet()
    chosen = random.Random(1)
    texts = [
        "",
        " ",
        "  two spaces",
        "trailing  ",
        "a\nb\r\n\tc",
        "naïve café 東京 🎉",
        "👩‍👩‍👧‍👦",
        "\x00",
        *characters,
    ]
    texts += ["".join(chosen.choices(characters, k=chosen.randint(2, 40))) for _ in range(1000)]
    texts += ["".join(chosen.choices("ab <|>end_\n▂é🎉 ", k=chosen.randint(2, 30))) for _ in range(1000)]
    for text in texts:
        assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text, repr(text)
        assert 0 not in ids(tokenizer, text), repr(text)


def test_frequent_words_are_short(tokenizer: Tokenizer) -> None:
    """Why it exists: the questions of easy-vqa must not be spelt letter by letter."""
    question = "what color is the shape? is there a red circle in the image?"
    assert len(ids(tokenizer, question)) <= 2 * len(question.split())


def test_white_space_after_special_tokens(tokenizer: Tokenizer) -> None:
    """As in the real tokenizer: swallowed after the assistant's tag, kept after the others."""
    by_name = tokenizer.token_to_id
    newline = ids(tokenizer, "\n")
    assert ids(tokenizer, "<|assistant|>\n") == [by_name("<|assistant|>")]
    assert ids(tokenizer, "<|assistant|> \n yes") == [by_name("<|assistant|>"), *ids(tokenizer, "yes")]
    for token in ("<|user|>", "<|end|>", "<|system|>", "<|endoftext|>"):
        assert ids(tokenizer, f"{token}\n") == [by_name(token), *newline], token


def describe(tokenizer_file: Path) -> dict[str, Any]:
    """The form of a tokenizer, without its words."""
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    form = {name: content[name] for name in ("normalizer", "pre_tokenizer", "decoder")}
    form["model"] = {
        name: content["model"][name] for name in ("type", "unk_token", "fuse_unk", "byte_fallback", "dropout")
    }
    form["single"] = content["post_processor"]["single"]
    form["added"] = {
        token["content"]: {flag: token[flag] for flag in ("lstrip", "rstrip", "normalized", "single_word", "special")}
        for token in content["added_tokens"]
        if token["content"] in OFFICIAL_IDS
    }
    return form


def test_form_is_the_real_ones(real_tokenizer_dir: Path, tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    assert describe(tmp_path / "tokenizer.json") == describe(real_tokenizer_dir / "tokenizer.json")
    mine, real = (json.loads((d / "tokenizer_config.json").read_text()) for d in (tmp_path, real_tokenizer_dir))
    for name in ("model_max_length", "padding_side", "clean_up_tokenization_spaces"):
        assert mine[name] == real[name], name


TEXTS = (
    "<|user|>\nWhat is 2+2?<|end|>\n<|assistant|>\n",
    "<|system|>\nA<|end|>\n<|user|>\n B<|end|>\n<|assistant|>\nyes<|end|>\n<|endoftext|>",
    "<|assistant|> \n\t yes <|end|> </s> \n<s> a<|endoftext|> ",
    "\n<|user|><|end|><|user|>",
)


@pytest.mark.parametrize("text", TEXTS)
def test_special_tokens_split_a_text_as_in_the_real_one(text: str, real_tokenizer_dir: Path) -> None:
    """Between the same special tokens stands the same text, to the space."""

    def structure(tokenizer: Tokenizer) -> list[str]:
        parts = [""]
        for token in tokenizer.encode(text).ids:
            name = tokenizer.id_to_token(token)
            if name in OFFICIAL_IDS:
                parts += [name, ""]
            elif name.startswith("<0x"):
                parts[-1] += chr(int(name[3:5], 16))
            else:
                parts[-1] += name
        return parts

    assert structure(build_tiny_tokenizer()) == structure(
        Tokenizer.from_file(str(real_tokenizer_dir / "tokenizer.json"))
    )
