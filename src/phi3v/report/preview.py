"""``phi3v data preview``: a data file as the model sees it, as one HTML file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from phi3v import __version__
from phi3v.config import ModelConfig, RunConfig
from phi3v.data.check import CheckReport, check_file
from phi3v.data.image_store import ImageStore
from phi3v.data.images import describe_kinds, image_size
from phi3v.data.lengths import LONG_CONTEXT, count_record
from phi3v.data.schema import Record, SpecialText
from phi3v.data.shards.index import is_shards
from phi3v.data.table import images_of, read_images
from phi3v.errors import UserError
from phi3v.paths import url_of
from phi3v.processing.hd_transform import CROP_SIZE, page_geometry
from phi3v.processing.image_processor import Phi3VImageProcessor
from phi3v.processing.processor import Phi3VProcessor
from phi3v.processing.tiny_tokenizer import build_tiny_tokenizer
from phi3v.report.page import write_page
from phi3v.report.samples import sample_block

SCRIPTS = ("page", "charts", "preview")
MEASURED = 2000  # records whose tokens and images are measured, drawn from the file
SHOWN_FAULTS = 50
SHOWN_ANSWERS = 30
COUNTED_ANSWERS = 200_000  # distinct ones; more are no classes
BINS = 24
PACK_TOKENS = RunConfig().data.pack_tokens
UNEQUAL = 1.5  # how much longer one side of pairs is, that is worth a word
FREQUENT = 0.5  # an answer's share that is worth a word


class Contents:
    """What one reading of the file finds.

    Attributes:
        records: up to `MEASURED`, drawn from the whole file.
        answers: how often each text is an answer.
    """

    def __init__(self, generator: Random) -> None:
        self.records: list[Record] = []
        self.answers: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.images_of_records: Counter[int] = Counter()
        self.turns_of_records: Counter[int] = Counter()
        self._generator = generator

    def add(self, record: Record) -> None:
        """Count a record; of more than `MEASURED` keep a fair sample (reservoir sampling, Vitter 1985)."""
        self.sources[record.source or "(none)"] += 1
        self.turns_of_records[len(record.turns)] += 1
        self.images_of_records[len(record.images)] += 1
        for turn in record.turns:
            if turn.weight and (turn.assistant in self.answers or len(self.answers) < COUNTED_ANSWERS):
                self.answers[turn.assistant] += 1
        if len(self.records) < MEASURED:
            self.records.append(record)
        elif (place := self._generator.randrange(self.sources.total())) < MEASURED:
            self.records[place] = record


@dataclass
class Measured:
    """Of the records that could be measured: token counts, image sizes and crops."""

    tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    of_images: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    crops: Counter[str] = field(default_factory=Counter)
    longest: Record | None = None


def preview(
    file: Path,
    out: Path,
    *,
    samples: int = 12,
    model: str | None = None,
    num_crops: int | None = None,
    special_text: SpecialText = "refuse",
    seed: int = 0,
) -> dict[str, Any]:
    """Write the page and return what it says in short. Lines with faults are listed and left out.

    Args:
        samples: records that are shown: the longest of those measured, and others drawn by ``seed``.
        model: a model folder, a hub id, an adapter or a run whose processor is used.
        num_crops: crops of a page at most.

    Raises:
        UserError: the file or the model cannot be read, or the page cannot be written.
    """
    if samples < 1:
        raise UserError(f"must be at least 1, got {samples}", where="--samples")
    processor, told, applied = _processor(model, num_crops)
    contents, store = Contents(Random(seed)), images_of(file)
    check = check_file(
        file,
        max_errors=None,
        image_level="off" if is_shards(file) else "header",  # of shards the index knows the sizes
        special_text=special_text,
        exif_orientation=applied,
        on_record=contents.add,
    )
    records = sorted(contents.records, key=lambda record: record.line)
    measured = _measure(records, file, store, processor, applied)
    chosen = _choose(records, measured.longest, samples, Random(seed))
    block = {
        "file": url_of(file) or str(file),
        "version": __version__,
        "tokenizer": told,
        "num_crops": processor.image_processor.num_crops,
        "counts": _counts(check),
        "faults": [str(fault) for fault in check.faults[:SHOWN_FAULTS]],
        "more_faults": len(check.faults) > SHOWN_FAULTS,
        "notes": _notes(contents, measured, check),
        "measured": len(measured.tokens),
        "histograms": _histograms(measured),
        "crops": measured.crops.most_common(SHOWN_ANSWERS),
        "answers": contents.answers.most_common(SHOWN_ANSWERS),
        "answer_count": sum(contents.answers.values()),
        "distinct_answers": len(contents.answers),
        "sources": contents.sources.most_common(SHOWN_ANSWERS),
        "images_of_records": sorted(contents.images_of_records.items())[:SHOWN_ANSWERS],
        "turns_of_records": sorted(contents.turns_of_records.items())[:SHOWN_ANSWERS],
        "samples": [
            sample_block(record, file, store, processor, exif_orientation=applied)
            | {"longest": record is measured.longest}
            for record in chosen
        ],
    }
    size = write_page(out, f"{file.name} · phi3v preview", SCRIPTS, {"preview": block})
    return {
        "preview": str(out),
        "bytes": size,
        "tokenizer": told,
        "samples": [record.id for record in chosen],
        "records": check.records,
        "measured": len(measured.tokens),
        "faults": len(check.faults),
        "notes": block["notes"],
    }


def _processor(model: str | None, num_crops: int | None) -> tuple[Phi3VProcessor, str, bool]:
    """The processor, a sentence that says which, and whether images are turned as their EXIF orientation says."""
    settings = ModelConfig(num_crops=num_crops)
    if model is not None:
        from phi3v.train.finetuned import resolve_model
        from phi3v.train.methods.loading import load_processor  # which import the model and PEFT: seconds

        tuned = resolve_model(model)
        settings.path = str(tuned.adapter or tuned.base)
        processor = load_processor(RunConfig(model=settings, data=tuned.run.data))
        return processor, f"as {model} reads them", tuned.run.data.exif_orientation
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tiny_tokenizer(),
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
    )
    images = Phi3VImageProcessor() if num_crops is None else Phi3VImageProcessor(num_crops=num_crops)
    told = "of the small built-in tokenizer, which needs more for a text than Phi-3's; --model.path takes a model's own"
    return Phi3VProcessor(images, tokenizer), told, True


def _measure(
    records: Sequence[Record], file: Path, store: ImageStore, processor: Phi3VProcessor, exif_orientation: bool
) -> Measured:
    """Tokens and images, these from their headers alone; records whose images cannot be read are left out."""
    measured = Measured()
    num_crops = processor.image_processor.num_crops
    for record in records:
        try:
            sizes = read_images(record, image_size, where=str(file), store=store, exif_orientation=exif_orientation)
        except UserError:
            continue
        pages = [page_geometry(*size, num_crops) for size in sizes]
        image_tokens, counts = sum(page.num_img_tokens for page in pages), count_record(record, processor)
        tokens = counts.text + image_tokens
        if not measured.tokens or tokens > max(measured.tokens):
            measured.longest = record
        measured.tokens.append(tokens)
        measured.supervised.append(counts.targets)
        measured.of_images.append(image_tokens)
        measured.widths += [width for width, _ in sizes]
        measured.heights += [height for _, height in sizes]
        measured.crops.update(f"{page.rows} × {page.columns}" for page in pages)
    return measured


def _choose(records: Sequence[Record], longest: Record | None, count: int, generator: Random) -> list[Record]:
    """The longest first, then others in the order of the file."""
    others = [record for record in records if record is not longest]
    first = [longest] if longest is not None else []
    drawn = generator.sample(others, min(len(others), count - len(first)))
    return first + sorted(drawn, key=lambda record: record.line)


def _counts(check: CheckReport) -> dict[str, int]:
    preferences = {"with rejected answers": check.pairs, "labelled good": check.good, "labelled bad": check.bad}
    return {
        "records": check.records,
        "turns": check.turns,
        "questions": check.questions,
        "images": check.images,
        "longest question, characters": check.user.longest,
        "longest answer, characters": check.assistant.longest,
    } | {name: count for name, count in preferences.items() if count}


def _notes(contents: Contents, measured: Measured, check: CheckReport) -> list[str]:
    """What is no fault and still worth knowing."""
    notes = []
    total = sum(contents.answers.values())
    for answer, count in contents.answers.most_common(1):
        if total > 1 and len(contents.answers) > 1 and count / total >= FREQUENT:
            notes.append(f"{count / total:.0%} of all answers are {answer!r}: always giving it scores as much.")
    longest = max(measured.tokens, default=0)
    if longest > LONG_CONTEXT:
        over = sum(tokens > LONG_CONTEXT for tokens in measured.tokens)
        notes.append(
            f"{over:,} of {len(measured.tokens):,} measured records are longer than {LONG_CONTEXT:,} tokens and "
            f"are read with LongRoPE's long factors; the longest has {longest:,}."
        )
    if longest > PACK_TOKENS:
        over = sum(tokens > PACK_TOKENS for tokens in measured.tokens)
        notes.append(
            f"{over:,} measured records are longer than a packed row ({PACK_TOKENS:,} tokens): each gets its own."
        )
    lengths = check.assistant.mean, check.rejected.mean
    if check.pairs and max(lengths) > UNEQUAL * min(lengths):
        notes.append(
            f"Answers have {lengths[0]:.0f} characters on average, rejected ones {lengths[1]:.0f}: "
            "what is learned may be the length."
        )
    if check.image_kinds:
        notes.append(f"Of the images {describe_kinds(check.image_kinds)}.")
    small = sum(max(size) < CROP_SIZE for size in zip(measured.widths, measured.heights, strict=True))
    if small:
        notes.append(
            f"{small:,} of {len(measured.widths):,} measured images are smaller than a crop ({CROP_SIZE} pixels) and "
            "are enlarged."
        )
    return notes


def _histograms(measured: Measured) -> list[dict[str, Any]]:
    columns: list[tuple[str, str, list[int]]] = [
        ("Tokens of a record", "tokens", measured.tokens),
        ("of which supervised", "tokens", measured.supervised),
        ("of which images", "tokens", measured.of_images),
        ("Width of an image", "px", measured.widths),
        ("Height of an image", "px", measured.heights),
    ]
    found: list[dict[str, Any]] = []
    for title, unit, values in columns:
        if not values or not max(values):
            continue
        low, high = min(values), max(values)
        if low == high:
            found.append({"title": title, "told": f"All have {low:,} {unit}."})
            continue
        width = -(-(high - low + 1) // BINS)  # whole numbers, or some bins would hold more of them than others
        edges = list(range(low, high + width + 1, width))
        counts, _ = np.histogram(values, bins=edges)
        told = f"{low:,} to {high:,} {unit}, median {int(np.median(values)):,}"
        if unit == "tokens":
            told += f", {sum(values):,} in all"
        found.append({"title": title, "told": told, "unit": unit, "edges": edges, "counts": counts.tolist()})
    return found
