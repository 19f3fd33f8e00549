"""A small tokenizer with Phi-3's special tokens, built from this file alone.

It has the structure of the real one (BPE with byte fallback, the same normaliser, decoder, added tokens and chat
template), so every code path of the processor works with it where the real one is not available.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

from phi3v.processing.chat_template import OFFICIAL_CHAT_TEMPLATE
from phi3v.processing.tokenizer import ADDITIONAL_SPECIAL_TOKENS, TOKEN_IDS

# As in the official tokenizer: white space after these is removed.
STRIPS_RIGHT = {"<|assistant|>", "<|image|>"}

# Frequent words first; the rank of a word is its weight when the merges are trained.
WORDS = """
the is a what of in image shape color does contain there yes no and to present not any red green blue yellow
black white gray brown teal purple orange pink circle rectangle triangle square line star which how many answer
question true false are this that picture document page text word number date name total title table figure
sentence both images following classes classify video into one two three four five six seven eight nine ten zero
left right top bottom large small with for on at by from as it was were be has have had can will who where when
why person people man woman dog cat car tree house road water food hand face light sign street building object
describe read find show list give same different first second last more less most least all some none other
value amount price year month day time company address city country state phone page letter report form field
""".split()  # noqa: SIM905 - a list literal would have one word per line

MIN_MERGES = 320
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def build_tiny_tokenizer(*, official_ids: bool = False) -> Tokenizer:
    """The tokenizer, identical at every call.

    Args:
        official_ids: give the chat tokens their ids in the official vocabulary of 32064, for full-size models without
            the real tokenizer; by default they follow the small vocabulary.
    """
    vocabulary, merges = _learn_words()
    first_free = len(vocabulary)
    for offset, (token, official_id) in enumerate(TOKEN_IDS.items()):
        vocabulary[token] = official_id if official_ids else first_free + offset
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, rstrip=token in STRIPS_RIGHT) for token in ("<unk>", "<s>", *TOKEN_IDS)]
    )
    # In the official files </s> is an added token but not a special one.
    tokenizer.add_tokens([AddedToken("</s>", normalized=False, rstrip=True, special=False)])
    return tokenizer


def _learn_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that encode the words of ``WORDS`` in few tokens."""
    learner = Tokenizer(models.BPE(byte_fallback=True))
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    base = ["<unk>", "<s>", "</s>", *BYTES]
    alphabet = [*sorted(set(string.printable) - set(string.whitespace)), "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(base) + len(alphabet) + MIN_MERGES,
        special_tokens=base,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    corpus = [word for rank, word in enumerate(WORDS) for _ in range(len(WORDS) - rank)]
    learner.train_from_iterator(corpus, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return model["vocab"], merges


def save_tiny_tokenizer(folder: Path, *, official_ids: bool = False) -> Tokenizer:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json`` to ``folder``."""
    tokenizer = build_tiny_tokenizer(official_ids=official_ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    named: dict[str, Any] = {
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "additional_special_tokens": ADDITIONAL_SPECIAL_TOKENS,
    }
    config = named | {
        "chat_template": OFFICIAL_CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "padding_side": "right",
        "processor_class": "Phi3VProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", named)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return tokenizer
