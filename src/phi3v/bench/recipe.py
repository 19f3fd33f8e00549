"""Training as the public recipe does it, with our model: the baseline that ours is compared with in the same call.

One sample at a time; float crops from the host, every image filled up to ``num_crops + 1`` of them which all go
through the tower; logits of every position; everything recomputed in the backward pass. The result is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import Dataset

from phi3v.bench.counting import CountingLoop
from phi3v.data.collate import Collator, Sample, encode_record
from phi3v.data.table import RecordTable
from phi3v.model.vision import Phi3VImageEmbedding
from phi3v.processing.conversation import IGNORE_INDEX
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.loop import Row


@dataclass
class CropSample(Sample):
    """A sample with the official processor's float crops.

    Attributes:
        pixel_values: float32 (N, num_crops + 1, 3, 336, 336).
        image_sizes: int64 (N, 2).
    """

    pixel_values: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    image_sizes: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class CropDataset(Dataset[CropSample]):
    """Whole records, each image decoded, cut and normalised on the host."""

    def __init__(self, table: RecordTable, processor: Phi3VProcessor) -> None:
        self.table = table
        self.processor = processor

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> CropSample:
        record = self.table[index]
        images = self.table.load_images(record)
        made = self.processor.image_processor(images)
        stream = encode_record(record, self.processor, self.processor.image_processor.calc_num_image_tokens(images))
        return CropSample(
            stream.input_ids,
            stream.labels,
            [],
            record.num_questions,
            index,
            pixel_values=made["pixel_values"],
            image_sizes=made["image_sizes"],
        )


@dataclass
class CropCollator:
    """Batches of one sample."""

    collator: Collator

    def __call__(self, samples: list[CropSample]) -> dict[str, Any]:
        (sample,) = samples
        if not len(sample.image_sizes):
            return self.collator(samples)
        return self.collator(samples) | {"pixel_values": sample.pixel_values, "image_sizes": sample.image_sizes}


class RecipeLoop(CountingLoop):
    """The recipe's loss: logits of every position."""

    def compute_loss(self, inputs: Row, normalizer: float, *, last: bool) -> torch.Tensor:
        names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
        own = {name: inputs[name] for name in names if name in inputs}
        logits = self.engine.forward(own | {"use_cache": False}, last=last).logits
        targets = inputs["labels"][:, 1:]
        losses = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        return (losses * inputs["loss_weights"][:, 1:].flatten()).sum() / normalizer


def run_padded_crops(model: Any, num_crops: int) -> None:
    """Let the tower compute ``num_crops + 1`` crops of every image, as the recipe does, with the decoder's attention.

    For batches of one image.
    """
    embedding = next(module for module in model.modules() if isinstance(module, Phi3VImageEmbedding))
    for layer in embedding.img_processor.vision_model.encoder.layers:
        # The library's setter leaves a tower that is no model of its own alone.
        layer.self_attn.config._attn_implementation = model.config._attn_implementation
    plain = embedding.img_processor.forward

    def forward(crops: torch.Tensor) -> torch.Tensor:
        blank = crops.new_zeros(num_crops + 1 - len(crops), *crops.shape[1:])
        features: torch.Tensor = plain(torch.cat([crops, blank]))
        return features[: len(crops)]

    embedding.img_processor.forward = forward  # type: ignore[method-assign]
