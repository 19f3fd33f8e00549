"""A record as the model sees it: its images cut into crops, its tokens with those that are supervised."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from phi3v.data.collate import encode_record
from phi3v.data.image_store import ImageStore
from phi3v.data.images import load_image
from phi3v.data.schema import Record
from phi3v.data.shards.store import ShardStore
from phi3v.data.table import read_images, where_of
from phi3v.errors import UserError
from phi3v.processing.conversation import IGNORE_INDEX, TokenStream
from phi3v.processing.hd_transform import cut_pages, page_geometry
from phi3v.processing.image_processor import Phi3VImageProcessor
from phi3v.processing.processor import Phi3VProcessor
from phi3v.report.page import webp

SUPERVISED, SPECIAL, IMAGE = 1, 2, 4  # bits of a piece
MAX_PIECES = 3000
MAX_WORDS = 1500  # of an answer that is compared; the time grows with the square
PAGE_SIDE = 1000  # pixels of a page that is shown; less where a record has several
_WORDS = re.compile(r"\w+|\s+|[^\w\s]")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def sample_block(
    record: Record, file: Path, store: ImageStore, processor: Phi3VProcessor, *, exif_orientation: bool = True
) -> dict[str, Any]:
    """A sample for the page: ``images``, ``pieces``, ``tokens``, ``supervised``; or ``error`` if it cannot be read."""
    place = f"line {record.line}"
    if isinstance(store, ShardStore):
        place = store.index.shards[store.index.shard_of(record.line - 1)].file.rpartition("/")[2]
    block: dict[str, Any] = {"id": record.id, "place": place, "source": record.source}
    image_processor = processor.image_processor
    try:
        loaded = read_images(
            record, load_image, where=where_of(record, file, store), store=store, exif_orientation=exif_orientation
        )
    except UserError as error:
        return block | {"error": str(error)}
    side = PAGE_SIDE if len(loaded) <= 2 else PAGE_SIDE // 2
    images = [
        image_block(name, image, image_processor, side) for name, image in zip(record.images, loaded, strict=True)
    ]
    stream = encode_record(record, processor, [image["tokens"] for image in images])
    return block | {
        "images": images,
        "pieces": pieces(processor, stream)[:MAX_PIECES],
        "tokens": len(stream.input_ids),
        "supervised": sum(label != IGNORE_INDEX for label in stream.labels),
        "judged": judged(record, processor),
    }


def judged(record: Record, processor: Phi3VProcessor) -> list[dict[str, Any]]:
    """The last answer and those it is preferred to, or with its label; empty if nothing is said about it.

    Each has ``verdict``, ``tokens``, ``score`` and ``parts``: texts, each with whether it is in one answer only.
    """
    turn = record.turns[-1]
    texts = [turn.assistant, *turn.rejected]
    if record.label is not None:
        verdicts = ["good" if record.label else "bad"]
    elif turn.rejected:
        verdicts = ["chosen", *["rejected"] * len(turn.rejected)]
    else:
        return []
    words = [_WORDS.findall(text) for text in texts]
    differing: list[set[int]] = [set() for _ in texts]
    for k, other in enumerate(words[1:], start=1):
        for tag, start, end, start_of_other, end_of_other in SequenceMatcher(
            None, words[0][:MAX_WORDS], other[:MAX_WORDS], autojunk=False
        ).get_opcodes():
            if tag != "equal":
                differing[0].update(range(start, end))
                differing[k].update(range(start_of_other, end_of_other))
    return [
        {
            "verdict": verdict,
            "tokens": len(processor.tokenize_text(text)),
            "score": turn.scores[k] if turn.scores else None,
            "parts": [
                ["".join(words[k][place] for place in places), differs]
                for differs, places in groupby(range(len(words[k])), key=differing[k].__contains__)
            ],
        }
        for k, (verdict, text) in enumerate(zip(verdicts, texts, strict=True))
    ]


def image_block(name: str, image: Image.Image, processor: Phi3VImageProcessor, side: int) -> dict[str, Any]:
    """One image: its page and its global view as the model gets them, and where it lies on the page."""
    geometry = page_geometry(*image.size, processor.num_crops)
    page = processor.page(image)  # [height, width, 3]
    view = cut_pages(page[None], processor.image_mean, processor.image_std)[0, 0]  # [3, 336, 336]
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = ((view * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0)
    return {
        "name": name,
        "size": image.size,
        "resized": geometry.resized,
        "rows": geometry.rows,
        "columns": geometry.columns,
        "tokens": geometry.num_img_tokens,
        "page": webp(Image.fromarray(page.numpy()), side),
        "view": webp(Image.fromarray(pixels.numpy()), 336),
    }


def pieces(processor: Phi3VProcessor, stream: TokenStream) -> list[list[Any]]:
    """The token stream as ``[text, bits, tokens, first id]``; an image is one piece, bytes of one text are joined."""
    tokenizer = processor.tokenizer
    special = set(tokenizer.get_added_vocab().values())
    found: list[list[Any]] = []
    ids, labels = stream.input_ids, stream.labels
    start = 0
    while start < len(ids):
        end = start + 1
        bits = SUPERVISED if labels[start] != IGNORE_INDEX else 0
        if ids[start] < 0:
            while end < len(ids) and ids[end] == ids[start]:
                end += 1
            found.append([f"image {-ids[start]}", bits | IMAGE, end - start, ids[start]])
        else:
            token = tokenizer.convert_ids_to_tokens(ids[start])
            values = bytearray()
            while (match := _BYTE.fullmatch(token)) and (labels[end - 1] != IGNORE_INDEX) == bool(bits):
                values.append(int(match[1], 16))
                if end == len(ids) or ids[end] < 0 or values == b"\n":  # a line break stands by itself
                    end += 1
                    break
                token = tokenizer.convert_ids_to_tokens(ids[end])
                end += 1
            if values:
                end -= 1
                text = values.decode("utf-8", errors="replace")
            else:
                text = token.replace("▁", " ")
            is_special = end - start == 1 and ids[start] in special
            found.append([text, bits | (SPECIAL if is_special else 0), end - start, ids[start]])
        start = end
    return found
