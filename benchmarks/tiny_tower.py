"""The first step of the tiny base: its vision tower learns what each patch shows.

Learning to see through the decoder alone takes a hundred times as many pictures: an answer says one thing about a
picture, while here every patch of 14 x 14 pixels has a label, the character, digit or shape under its centre and the
colour there. A linear head reads them off the features that the decoder will get; it is thrown away afterwards.

Shapes: ``B`` pictures, 24 x 24 = 576 patches a picture, ``V`` width of the tower.
"""

from __future__ import annotations

import math
import string
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from drawing import choose, font_files, load_font
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.processing.processor import Phi3VProcessor
from scenes import COLOURS, SHAPES, SIDE, digit_image, draw_shape, paper, word

PATCH = 14
SIDE_PATCHES = SIDE // PATCH
CHARACTERS = string.ascii_letters + string.digits
WHAT = ["nothing", *CHARACTERS, *SHAPES]  # handwritten digits count as the characters
IGNORE = -100
WIDER = 4.0  # 0.08, about one over the root of 128, in place of 0.02


class LabelledPages(Dataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """Pages of text, handwriting and shapes with a label for every patch; page k is drawn from seed k.

    An item is ``pixels`` float32 (3, 336, 336), normalised; ``what`` and ``colour`` int64 (576,), -100 where there is
    nothing to learn.
    """

    def __init__(self, processor: Phi3VProcessor, length: int, seed: int) -> None:
        self.image_processor = processor.image_processor
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng([self.seed, index])
        page, what, colour = labelled_page(rng)
        crops, _ = self.image_processor.crops(page)
        return crops[1], torch.from_numpy(what.ravel()), torch.from_numpy(colour.ravel())


def labelled_page(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A page in bands, each of text, handwritten digits or shapes; the labels of its patches, (24, 24) each."""
    level = int(rng.integers(3))
    page, ink = paper(rng, level)
    what = np.zeros((SIDE_PATCHES, SIDE_PATCHES), dtype=np.int64)
    colour = np.full((SIDE_PATCHES, SIDE_PATCHES), IGNORE, dtype=np.int64)
    if rng.random() < 0.4:
        ground = int(rng.integers(len(COLOURS)))
        page = Image.new("RGB", (SIDE, SIDE), list(COLOURS.values())[ground])
        colour[:] = ground
        ink = (10, 10, 10) if sum(page.getpixel((0, 0))) > 380 else (245, 245, 245)  # type: ignore[arg-type]
    draw = ImageDraw.Draw(page)
    top = int(rng.integers(12))
    while top < SIDE - 24:
        kind = rng.random()
        height = int(rng.integers(24, 64)) if kind < 0.6 else int(rng.integers(48, 130))
        if top + height > SIDE:
            break
        if kind < 0.6:
            draw_text_band(rng, draw, top, height, ink, what)
        elif kind < 0.75:
            draw_digit_band(rng, page, top, height, ink, what)
        else:
            draw_shape_band(rng, draw, top, height, what, colour)
        top += height + int(rng.integers(2, 14))
    return page, what, colour


def patches_in(left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
    """Rows and columns of the patches whose centre is in a box."""
    first_row, last_row = math.ceil(top / PATCH - 0.5), math.ceil(bottom / PATCH - 0.5)
    first_column, last_column = math.ceil(left / PATCH - 0.5), math.ceil(right / PATCH - 0.5)
    return slice(max(0, first_row), max(0, last_row)), slice(max(0, first_column), max(0, last_column))


def draw_text_band(
    rng: np.random.Generator,
    draw: ImageDraw.ImageDraw,
    top: int,
    height: int,
    ink: tuple[int, int, int],
    what: np.ndarray,
) -> None:
    """Words side by side; a patch shows the character above or below whose centre it lies."""
    font = load_font(choose(rng, font_files()), max(16, int(height * rng.uniform(0.6, 0.85))))
    x = float(rng.integers(4, 60))
    while True:
        text = word(rng, int(rng.integers(3)))
        if x + font.getlength(text) > SIDE - 4:
            return
        draw.text((x, top + height / 2), text, font=font, fill=ink, anchor="lm")
        _, upper, _, lower = draw.textbbox((x, top + height / 2), text, font=font, anchor="lm")
        for place, character in enumerate(text):
            start, end = (x + font.getlength(text[: place + k]) for k in range(2))
            label = WHAT.index(character) if character in CHARACTERS else IGNORE
            what[patches_in(start, upper, end, lower)] = label
        x += font.getlength(text) + font.getlength("n") * rng.uniform(0.6, 2.5)


def draw_digit_band(
    rng: np.random.Generator, page: Image.Image, top: int, side: int, ink: tuple[int, int, int], what: np.ndarray
) -> None:
    x = float(rng.integers(40))
    while x + side < SIDE:
        value = int(rng.integers(10))
        page.paste(ink, (int(x), top), digit_image(rng, value, side))
        inner = patches_in(x + 0.25 * side, top + 0.15 * side, x + 0.75 * side, top + 0.85 * side)
        what[inner] = WHAT.index(str(value))
        x += side * rng.uniform(0.8, 1.5)


def draw_shape_band(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, top: int, side: int, what: np.ndarray, colour: np.ndarray
) -> None:
    x = float(rng.integers(60))
    names = list(COLOURS)
    while x + side < SIDE:
        shape, name = choose(rng, SHAPES), choose(rng, names)
        draw_shape(draw, shape, COLOURS[name], x + side / 2, top + side / 2, side / 2)
        # The middle of a ring shows the ground, and the corners around a star do.
        inner = patches_in(x + 0.2 * side, top + 0.2 * side, x + 0.8 * side, top + 0.8 * side)
        what[inner] = WHAT.index(shape)
        colour[inner] = names.index(name)
        x += side * rng.uniform(1.05, 2.0)


def sine_positions(width: int) -> torch.Tensor:
    """(576, width) sines of row and column, as MAE's position embeddings (arXiv 2111.06377)."""
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(SIDE_PATCHES)[:, None] * frequencies  # [24, width / 4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [24, width / 2]
    rows = waves[:, None].expand(-1, SIDE_PATCHES, -1)
    columns = waves[None].expand(SIDE_PATCHES, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def teach_tower(start: Path, out: Path, *, pages: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Teach the tower of the model at ``start`` and save the whole model to ``out``."""
    torch.manual_seed(seed)
    model = Phi3VForCausalLM.from_pretrained(start)
    processor = Phi3VProcessor.from_pretrained(start)
    tower = model.model.vision_embed_tokens.img_processor
    embeddings = tower.vision_model.embeddings
    width = embeddings.embed_dim
    with torch.no_grad():
        # New weights are drawn for the width of the real model; with a layer 128 wide they see nothing for long.
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
                module.weight.mul_(WIDER)
        # Where a patch is should weigh as much as what it shows.
        embeddings.position_embedding.weight[1:] = 0.7 * sine_positions(width)
        embeddings.patch_embedding.weight.mul_(0.3)
    heads = nn.ModuleDict({"what": nn.Linear(width, len(WHAT)), "colour": nn.Linear(width, len(COLOURS))})
    trained = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    steps = pages // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, anneal_strategy="cos"
    )
    weights = torch.ones(len(WHAT))
    weights[0] = 0.1  # most patches show nothing
    loader = DataLoader(LabelledPages(processor, steps * batch_size, seed), batch_size=batch_size, num_workers=1)
    began = time.perf_counter()
    for step, (pixels, what, colour) in enumerate(loader, start=1):
        features = tower(pixels)  # [B, 576, V]
        seen = heads["what"](features).flatten(0, 1)
        loss_what = functional.cross_entropy(seen, what.flatten(), weight=weights, ignore_index=IGNORE)
        loss_colour = functional.cross_entropy(
            heads["colour"](features).flatten(0, 1), colour.flatten(), ignore_index=IGNORE
        )
        loss = loss_what + loss_colour.nan_to_num()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps:
            something = what.flatten() > 0
            right = (seen.argmax(-1) == what.flatten())[something].float().mean().item()
            print(
                f"tower step {step}/{steps}  loss {loss_what.item():.3f} + {loss_colour.item():.3f}  "
                f"right {100 * right:.0f} %  {step * batch_size / (time.perf_counter() - began):.1f} pages/s",
                flush=True,
            )
    model.save_pretrained(out)
    processor.save_pretrained(out)
