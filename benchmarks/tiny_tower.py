"""The first step of the tiny base: its vision tower and projector learn what each image token shows.

Learning to see through the decoder alone takes a hundred times as many images: an answer says one thing about a
image, while here each of the 144 tokens of a page has a label, the character, digit or shape in its 28 x 28 pixels
and the colour there. A linear head reads them off the tokens that the decoder will get; it is thrown away afterwards.

Attention starts local: every head looks at one neighbour of a patch, as a convolution does (ConViT, arXiv 2103.10697),
by positions that are sines and queries that are rotated keys.

Shapes: ``B`` images, 24 x 24 = 576 patches and 144 tokens per image, ``V`` width of the tower.
"""

from __future__ import annotations

import math
import string
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from drawing import CELL, CELLS, choose, font_files, nudge, write
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.model.vision import PATCHES, TOKENS, merge_patches
from phi3v.processing.processor import Phi3VProcessor
from scenes import COLOURS, SHAPES, SIDE, digit_image, draw_shape, paper, word

CHARACTERS = string.ascii_letters + string.digits + ":$/.-"
WHAT = ["nothing", *CHARACTERS, *SHAPES]  # handwritten digits count as the characters
COLOUR_NAMES = list(COLOURS)
IGNORE = -100
WIDER = 4.0  # 0.08, about one over the root of 128, in place of 0.02
POSITION_WIDTH = 32  # features that say where a patch is; the others say what it shows
NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # (rows, columns), one for each of the four heads
MEAN_PAGES = 200  # to take the mean look of a character from
SHARPNESS = 6.0  # how much more a head looks at its neighbour than at others


class LabelledPages(Dataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """Pages of text, handwriting and shapes with a label for every token; page k is drawn from seed k.

    An item is ``pixels`` float32 (3, 336, 336), normalised; ``what`` and ``colour`` int64 (144,), -100 where there is
    nothing to learn.
    """

    def __init__(self, processor: Phi3VProcessor, length: int, seed: int) -> None:
        self.image_processor = processor.image_processor
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        page, what, colour = labelled_page(np.random.default_rng([self.seed, index]))
        crops, _ = self.image_processor.crops(page)
        return crops[1], torch.from_numpy(what.ravel()), torch.from_numpy(colour.ravel())


def labelled_page(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A page in bands, each of text, handwritten digits or shapes; the labels of its cells, (12, 12) each."""
    page, ink = paper(rng, int(rng.integers(3)))
    what = np.zeros((CELLS, CELLS), dtype=np.int64)
    colour = np.full((CELLS, CELLS), IGNORE, dtype=np.int64)
    if rng.random() < 0.4:
        ground = int(rng.integers(len(COLOURS)))
        page = Image.new("RGB", (SIDE, SIDE), list(COLOURS.values())[ground])
        colour[:] = ground
        ink = (10, 10, 10) if sum(page.getpixel((0, 0))) > 380 else (245, 245, 245)  # type: ignore[arg-type]
    row = 0
    while row < CELLS:
        kind = rng.random()
        if kind < 0.55:
            row += draw_text_band(rng, page, row, ink, what)
        elif kind < 0.92:
            rows = int(rng.integers(2, 7))
            if row + rows <= CELLS:
                draw_band = draw_digit_band if kind < 0.65 else draw_shape_band
                draw_band(rng, page, row, rows, ink, what, colour)
                row += rows
        else:
            row += 1
    return page, what, colour


def draw_text_band(
    rng: np.random.Generator, page: Image.Image, row: int, ink: tuple[int, int, int], what: np.ndarray
) -> int:
    """Words side by side; the number of rows taken."""
    size = 2 if rng.random() < 0.2 and row < CELLS - 1 else 1
    font, shift, column = choose(rng, font_files()), nudge(rng), int(rng.integers(3))
    while True:
        text = word(rng, int(rng.integers(3)))
        if column + size * len(text) > CELLS:
            return size
        write(ImageDraw.Draw(page), text, column, row, font, ink, size=size, nudge=shift)
        for character in text:
            what[row : row + size, column : column + size] = WHAT.index(character)
            column += size
        column += size


def cells_in(left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
    """Rows and columns of the cells whose centre is in a box."""
    first_row, last_row, first_column, last_column = (
        max(0, math.ceil(value / CELL - 0.5)) for value in (top, bottom, left, right)
    )
    return slice(first_row, last_row), slice(first_column, last_column)


def draw_digit_band(
    rng: np.random.Generator,
    page: Image.Image,
    row: int,
    rows: int,
    ink: tuple[int, int, int],
    what: np.ndarray,
    colour: np.ndarray,
) -> None:
    side, top, x = rows * CELL, row * CELL, float(rng.integers(40))
    while x + side < SIDE:
        value = int(rng.integers(10))
        page.paste(ink, (int(x), top), digit_image(rng, value, side))
        inner = cells_in(x + 0.25 * side, top + 0.15 * side, x + 0.75 * side, top + 0.85 * side)
        what[inner] = WHAT.index(str(value))
        colour[inner] = IGNORE
        x += side * rng.uniform(0.8, 1.5)


def draw_shape_band(
    rng: np.random.Generator,
    page: Image.Image,
    row: int,
    rows: int,
    ink: tuple[int, int, int],
    what: np.ndarray,
    colour: np.ndarray,
) -> None:
    side, top, x = rows * CELL, row * CELL, float(rng.integers(60))
    while x + side < SIDE:
        shape, name = choose(rng, SHAPES), choose(rng, COLOUR_NAMES)
        draw_shape(ImageDraw.Draw(page), shape, COLOURS[name], x + side / 2, top + side / 2, 0.48 * side)
        inner = cells_in(x + 0.15 * side, top + 0.15 * side, x + 0.85 * side, top + 0.85 * side)
        what[inner] = WHAT.index(shape)
        # The middle of a ring shows the ground.
        colour[inner] = IGNORE if shape == "ring" else COLOUR_NAMES.index(name)
        x += side * rng.uniform(1.05, 2.0)


def position_waves() -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies (8,) and positions (576, 32): cosine and sine of row and of column at each frequency."""
    frequencies = 2 * math.pi / 48 * 1.32 ** torch.arange(POSITION_WIDTH // 4)
    angles = torch.arange(PATCHES)[:, None] * frequencies  # [24, 8]
    waves = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)  # [24, 16]
    rows, columns = waves[:, None].expand(-1, PATCHES, -1), waves[None].expand(PATCHES, -1, -1)
    return frequencies, torch.cat([rows, columns], dim=-1).flatten(0, 1)


def shift_matrix(frequencies: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(32, 32): turns the position of a patch into that of its neighbour ``rows`` below and ``columns`` right."""
    blocks = [
        torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        for step in (rows, columns)
        for angle in (frequencies * step).tolist()
    ]
    return torch.block_diag(*blocks)


def start_local(model: Phi3VForCausalLM) -> None:
    """Draw wider weights and let every head of the tower begin with one neighbour."""
    vision = model.model.vision_embed_tokens.img_processor.vision_model
    embeddings = vision.embeddings
    frequencies, positions = position_waves()
    with torch.no_grad():
        # New weights are drawn for the width of the real model; with a layer 128 wide they see nothing for long.
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
                module.weight.mul_(WIDER)
        embeddings.position_embedding.weight.mul_(0.1)
        embeddings.position_embedding.weight[1:, :POSITION_WIDTH] = positions
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.weight[POSITION_WIDTH:] = smooth_filters(embeddings.embed_dim - POSITION_WIDTH)
        for layer in vision.encoder.layers:
            attention = layer.self_attn
            gain = math.sqrt(SHARPNESS * math.sqrt(attention.head_dim) / 2)
            for head, (rows, columns) in enumerate(NEIGHBOURS):
                own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
                for weight in (attention.q_proj.weight, attention.k_proj.weight):
                    weight[own].zero_()
                attention.k_proj.weight[own, :POSITION_WIDTH] = gain * torch.eye(POSITION_WIDTH)
                attention.q_proj.weight[own, :POSITION_WIDTH] = gain * shift_matrix(frequencies, rows, columns)


def smooth_filters(number: int) -> torch.Tensor:
    """(number, 3, 14, 14): an eighth sees the colour of a patch, the rest grey or coloured structure in it."""
    colours, grey = number // 8, 5 * number // 8
    drawn = torch.cat(
        [
            functional.interpolate(torch.randn(grey, 1, 7, 7), size=(14, 14), mode="bicubic").expand(-1, 3, -1, -1),
            functional.interpolate(torch.randn(number - colours - grey, 3, 5, 5), size=(14, 14), mode="bicubic"),
        ]
    )
    drawn = drawn - drawn.mean(dim=(2, 3), keepdim=True)
    even = torch.randn(colours, 3, 1, 1).expand(-1, -1, 14, 14)
    scale = torch.cat([torch.full((colours,), 0.05), torch.full((number - colours,), 0.12)])
    filters = torch.cat([even, drawn])
    return filters * (scale / filters.flatten(1).norm(dim=1))[:, None, None, None]


@contextmanager
def reproducible(threads: int = 2) -> Iterator[None]:
    """So many threads, and the same numbers every time: some gradients are sums in any order otherwise."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


@reproducible()
def teach_tower(start: Path, out: Path, *, pages: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Teach the tower and the projector of the model at ``start`` and save the whole model to ``out``."""
    torch.manual_seed(seed)
    model = Phi3VForCausalLM.from_pretrained(start)
    processor = Phi3VProcessor.from_pretrained(start)
    start_local(model)
    vision = model.model.vision_embed_tokens
    tower, projection = vision.img_processor, vision.img_projection
    width = model.config.hidden_size
    heads = nn.ModuleDict({"what": nn.Linear(width, len(WHAT)), "colour": nn.Linear(width, len(COLOURS))})
    trained = [*tower.parameters(), *projection.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    steps = pages // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, anneal_strategy="cos"
    )
    weights = torch.ones(len(WHAT))
    weights[0] = 0.1  # most tokens show nothing
    loader = DataLoader(LabelledPages(processor, steps * batch_size, seed), batch_size=batch_size, num_workers=1)
    began = time.perf_counter()
    right, shown = 0.0, 0
    for step, (pixels, what, colour) in enumerate(loader, start=1):
        what, colour = what.flatten(), colour.flatten()
        patches = tower(pixels)  # [B, 576, V]
        merged = torch.stack([merge_patches(page[None], 1, 1) for page in patches])  # [B, 12, 12, 4 V]
        tokens = projection(merged).view(len(pixels) * TOKENS * TOKENS, width)
        seen = heads["what"](tokens)
        loss_what = functional.cross_entropy(seen, what, weight=weights, ignore_index=IGNORE)
        loss_colour = functional.cross_entropy(heads["colour"](tokens), colour, ignore_index=IGNORE)
        loss = loss_what + loss_colour.nan_to_num()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        right += (seen.argmax(-1) == what)[what > 0].float().sum().item()
        shown += int((what > 0).sum())
        if step % 100 == 0 or step == steps:
            print(
                f"tower step {step}/{steps}  loss {loss_what.item():.3f} + {loss_colour.item():.3f}  "
                f"right {100 * right / shown:.0f} %  {step * batch_size / (time.perf_counter() - began):.1f} pages/s",
                flush=True,
            )
            right, shown = 0.0, 0
    give_words_their_letters(model, processor, LabelledPages(processor, MEAN_PAGES, seed + 1))
    model.save_pretrained(out)
    processor.save_pretrained(out)


@torch.no_grad()
def give_words_their_letters(model: Phi3VForCausalLM, processor: Phi3VProcessor, pages: LabelledPages) -> None:
    """Let what is seen and what is said begin alike: every token of text gets the mean look of its characters.

    The image tokens are brought to the length of the token embeddings; longer, the decoder's layers would change
    little of them. Blank ones come out near zero.
    """
    vision = model.model.vision_embed_tokens
    sums, counts = torch.zeros(len(WHAT), model.config.hidden_size), torch.zeros(len(WHAT))
    length = 0.0
    for pixels, what, _ in DataLoader(pages, batch_size=4):
        merged = torch.stack([merge_patches(page[None], 1, 1) for page in vision.img_processor(pixels)])
        tokens, labels = vision.img_projection(merged).flatten(0, 2), what.flatten()
        sums.index_add_(0, labels, tokens)
        counts.index_add_(0, labels, torch.ones(len(labels)))
        length += tokens[labels > 0].norm(dim=1).mean().item() * len(pixels) / len(pages)
    means = sums / counts.clamp(min=1)[:, None]
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    scale = embeddings.norm(dim=1).mean() / length
    last = vision.img_projection[2]
    last.bias.sub_(means[0]).mul_(scale)
    last.weight.mul_(scale)
    looks = (means - means[0]) * scale
    for piece, row in processor.tokenizer.get_vocab().items():
        letters = [WHAT.index(letter) for letter in piece.lstrip("▁") if letter in CHARACTERS]
        if letters and len(letters) == len(piece.lstrip("▁")):
            look = looks[letters].sum(0)
            embeddings[row] = 0.5 * embeddings[row] + look / look.norm() * embeddings[row].norm()
            head[row] = 0.3 * head[row] + look / look.norm() * head[row].norm()
