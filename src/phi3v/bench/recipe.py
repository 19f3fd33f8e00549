"""Training as the public recipe does it, with our model: the baseline that ours is compared with in the same call.

One sample at a time; float crops from the host, every image filled up to ``num_crops + 1`` of them which all go
through the tower; logits of every position; everything recomputed in the backward pass. The result is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from phi3v.bench.counting import CountingLoop
from phi3v.data.batches import Group
from phi3v.data.collate import Sample, encode_record
from phi3v.data.rows import RowDataset
from phi3v.model.vision import Phi3VImageEmbedding
from phi3v.processing.conversation import IGNORE_INDEX
from phi3v.train.loop import Row


@dataclass
class CropSample(Sample):
    """A sample with the official processor's float crops.

    Attributes:
        crops: with images ``pixel_values`` float32 (N, num_crops + 1, 3, 336, 336) and ``image_sizes`` int64 (N, 2).
    """

    crops: dict[str, torch.Tensor] = field(default_factory=dict)


class CropDataset(RowDataset):
    """Rows of one record, its images decoded, cut and normalised on the host."""

    def samples(self, group: Group) -> list[Sample]:
        (index,) = group
        record = self.table[index]
        images = self.table.load_images(record)
        made = self.processor.image_processor(images)
        stream = encode_record(record, self.processor, self.processor.image_processor.calc_num_image_tokens(images))
        crops = {name: made[name] for name in ("pixel_values", "image_sizes") if images}
        return [CropSample(stream.input_ids, stream.labels, [], record.num_questions, index, crops)]

    def collate(self, groups: list[list[Sample]]) -> dict[str, Any]:
        ((sample,),) = groups
        assert isinstance(sample, CropSample)
        return super().collate(groups) | sample.crops


class RecipeLoop(CountingLoop):
    """The recipe's loss: logits of every position."""

    def compute_loss(self, inputs: Row, normalizer: float, *, last: bool) -> torch.Tensor:
        names = ("input_ids", "pixel_values", "image_sizes")
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
