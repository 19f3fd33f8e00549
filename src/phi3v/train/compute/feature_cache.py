"""The vision part's work done once and not every epoch, where it is frozen."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal

import psutil
import torch
from accelerate import PartialState
from peft import PeftModel
from PIL import Image
from rich.console import Console
from torch import nn

from phi3v.config import FeatureCache
from phi3v.data.cache import CACHE_HINT, cache_root
from phi3v.data.features import FeatureStore
from phi3v.data.images import load_image
from phi3v.data.sizes import image_sizes
from phi3v.data.table import RecordTable
from phi3v.errors import UserError
from phi3v.model.vision import PATCHES, Phi3VImageEmbedding
from phi3v.paths import free_space, require_writable
from phi3v.processing.hd_transform import CROP_SIZE, cut_flat_pages, num_distinct_crops, page_geometry
from phi3v.processing.image_processor import Phi3VImageProcessor
from phi3v.terminal import progress_bar
from phi3v.train.device import RuntimeDevice

Stage = Literal["tower", "projected"]


def vision_part(model: Any) -> Phi3VImageEmbedding:
    """The vision part of a model, under adapters or not."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    part: Phi3VImageEmbedding = base.model.vision_embed_tokens
    return part


def cached_stage(vision: Phi3VImageEmbedding) -> Stage:
    """What may be kept: the tower's features where the projector or a separator trains, else the finished tokens."""
    return "tower" if any(parameter.requires_grad for parameter in vision.parameters()) else "projected"


def fill_features(
    kind: FeatureCache,
    model: Any,
    table: RecordTable,
    processor: Phi3VImageProcessor,
    runtime: RuntimeDevice,
    console: Console,
    *,
    show_bar: bool = True,
) -> FeatureStore | None:
    """Run the frozen vision part over every image of ``table`` that is not kept yet.

    How much room it takes is said, and looked for, before anything is computed. The features are those of a step, in
    the same dtypes, but for the rounding of sums that are taken over other batches. On the disk, all ranks share the
    work, and those of a node without the others' disk then share what it still lacks; in memory each has its own. Each
    goes through the shards that its images are in one after the other.

    Raises:
        UserError: there is not enough room.
    """
    if kind == "off":
        return None
    vision = vision_part(model)
    stage = cached_stage(vision)
    facts = [stage, processor.num_crops, table.exif_orientation, runtime.precision, runtime.device.type]
    folder = cache_root() / "features" / _settings_key(vision, stage, facts) if kind == "disk" else None
    if folder is not None:
        require_writable(folder, "training.feature_cache", CACHE_HINT)  # another user may have made it
    store = FeatureStore(table.images, folder)
    sizes = dict(zip(table.distinct_images()[0], image_sizes(table).tolist(), strict=True))
    missing = [name for name in sizes if name not in store]

    def features(image: Image.Image) -> torch.Tensor:
        page = processor.page(image).to(runtime.device)
        size = (page.shape[0], page.shape[1])
        tower = vision.img_processor(cut_flat_pages(page.flatten(0, 1), [size]))
        return tower if stage == "tower" else vision.project(tower, [size])

    with computing(model, runtime):
        # A blank one tells how large a value is.
        itemsize = features(Image.new("RGB", (CROP_SIZE, CROP_SIZE))).element_size() if missing else 0
        needed = sum(_values(vision, stage, processor, sizes[name]) for name in missing) * itemsize
        place = f"on the disk, in {folder}" if folder is not None else "in memory"
        console.print(
            f"feature cache: {len(sizes):,} images, {len(missing):,} of them new; these take {needed / 1e9:.2f} GB "
            f"{place} ({'before the projector, which trains' if stage == 'tower' else 'ready for the decoder'})",
            highlight=False,
            soft_wrap=True,
        )
        room = free_space(folder) if folder is not None else psutil.virtual_memory().available // runtime.node_ranks
        if needed > room:
            raise UserError(
                f"the features take {needed / 1e9:.2f} GB and there is room for {room / 1e9:.2f} GB",
                where="training.feature_cache",
                hint="set PHI3V_CACHE to a larger disk" if folder is not None else "use disk, or off",
            )
        # Shares are of all names, not of the missing ones: those grow fewer while ranks look, and differ by disk.
        parts = [(0, 1)]
        if folder is not None and runtime.world_size > 1:
            parts = [(runtime.rank, runtime.world_size), (PartialState().local_process_index, runtime.node_ranks)]
        with progress_bar(console, enabled=show_bar) as bar:
            for part, of in parts:
                mine = [name for name in table.images.shares(list(sizes), of)[part] if name not in store]
                table.images.expect(mine)
                task = bar.add_task("features", total=len(mine), extra="", visible=bool(mine))
                for name in mine:
                    store.put(name, features(table.of_image(load_image, name)))
                    bar.advance(task)
                PartialState().wait_for_everyone()
    return store


def _values(vision: Phi3VImageEmbedding, stage: Stage, processor: Phi3VImageProcessor, size: tuple[int, int]) -> int:
    """Numbers that are kept of an image of ``size`` (width, height)."""
    page = page_geometry(*size, processor.num_crops)
    if stage == "projected":
        return page.num_img_tokens * _width(vision.img_projection)
    return num_distinct_crops(page.rows, page.columns) * PATCHES**2 * (vision.sub_GN.shape[-1] // 4)


def _width(projection: nn.Module) -> int:
    last = [module for module in projection.modules() if isinstance(module, nn.Linear)][-1]
    return last.out_features


@contextlib.contextmanager
def computing(model: nn.Module, runtime: RuntimeDevice) -> Iterator[None]:
    """As a training step computes, without gradients."""
    dtype = runtime.autocast_dtype
    autocast = torch.autocast(runtime.device.type, dtype) if dtype else contextlib.nullcontext()
    where = next(model.parameters()).device
    if where != runtime.device:
        model.to(runtime.device)
    with torch.no_grad(), autocast:
        yield


def _settings_key(vision: Phi3VImageEmbedding, stage: Stage, facts: list[Any]) -> str:
    """A name for all that features depend on beside the image, the weights' content among it."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(["features-3", CROP_SIZE, *facts]).encode())
    for name, value in vision.state_dict().items():
        if stage == "tower" and not name.startswith("img_processor."):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
