"""The second step of the tiny base: its decoder learns where to look.

Left to answers alone, a decoder of this size guesses for tens of thousands of images before it finds out that the
word it is to say stands somewhere in the image. Here the cells that show it are known, since the images are drawn:
some heads are told to attend to them (supervised attention, arXiv 1609.04186), beside the loss on the answers. Two
heads of the last layer point to the character that is said next. Two heads of the layer below point to what is asked
about, one in the first and one in the last image, or to the first token where there is nothing of the kind.

The decoder starts as one that copies: what a head reads is what it writes, and two of four heads compare tokens by
their likeness (mimetic initialisation, arXiv 2305.09828). The tower is left as it is.

Shapes: ``B`` conversations, ``T`` tokens, 144 cells of 28 x 28 pixels per image.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from drawing import CELLS, choose
from phi3v.data.jsonl import replacing
from phi3v.model.modeling import Phi3VForCausalLM
from phi3v.processing.conversation import IGNORE_INDEX, ChatTurn, encode_conversation
from phi3v.processing.processor import Phi3VProcessor
from phi3v.processing.tokenizer import pad_rows
from scenes import (
    COLOURS,
    LABELS,
    ORDINALS,
    SHAPES,
    SIDE,
    Rng,
    Thing,
    draw_shape,
    paper,
    photo_crop,
    pick,
    true_false,
    word,
    write_lines,
    yes_no,
)
from tiny_tower import cells_in, reproducible

SAVE_STEPS = 200
COPYING = 0.15  # of what a head reads comes out
QUIET = 0.1  # how much smaller the feed-forward layers begin
FIRST_TOKEN = -1  # in place of cells: the thing is not there
ROW = CELLS + 1  # tokens of a row of cells, with the one that ends it
TOKENS_A_PICTURE = 2 * CELLS * ROW + 1  # of an image of one crop: the crop, a separator, the whole view
VIEWS = (0, CELLS * ROW + 1)  # where the cells of each begin
READING, FINDING = (3, (0, 1)), (2, (2, 3))  # the layer and the heads that are told
MORE_LABELS = ("fruit", "animal", "job", "street", "house", "weight", "size", "owner", "buyer", "room", "team", "item")

Cells = list[tuple[int, int]]  # (row, column)


@dataclass
class Turn:
    """A question, its answer and where to look for it.

    Attributes:
        reads: cells of each character of the answer, where it is written in the image.
        finds: cells of what is asked about in the first and in the last image, or `FIRST_TOKEN` where there is none.
    """

    question: str
    answer: str
    reads: list[Cells] = field(default_factory=list)
    finds: tuple[Cells | int, Cells | int] | None = None


@dataclass
class Guided:
    """Images of ``SIDE`` x ``SIDE`` pixels and turns about them."""

    images: list[Image.Image]
    turns: list[Turn]


# --- images -----------------------------------------------------------------------------------------------------


def reading_scene(rng: Rng, level: int) -> Guided:
    """A page of words or labelled fields."""
    page, ink = paper(rng, 0)
    count, kind = int(rng.integers(1, (3, 5, 6)[level])), rng.random()
    if kind < 0.5:
        return Guided([page], pick(rng, list(_form(rng, page, ink, count)), 4))
    words = [word(rng, min(level, 1)) for _ in range(count)]
    cells = write_lines(rng, page, words, ink)
    if kind < 0.65:
        joined = [of_character for k, of_line in enumerate(cells) for of_character in ([[]] if k else []) + of_line]
        return Guided([page], [Turn("Read the text.", " ".join(words), joined)])
    if kind < 0.8 or len(set(words)) < count:
        turns = [Turn(f"What is the {ORDINALS[k]} word?", words[k], cells[k]) for k in range(count)]
        turns.append(Turn("What is the last word?", words[-1], cells[-1]))
        return Guided([page], pick(rng, turns, 3))
    turns = [Turn("What is the first word?", words[0], cells[0])]
    for k in range(count - 1):
        below = Turn(f"What is below {words[k]}?", words[k + 1], cells[k + 1])
        turns.append(choose(rng, [below, Turn(f"What is above {words[k + 1]}?", words[k], cells[k])]))
    return Guided([page], pick(rng, turns, 3))


def _form(rng: Rng, page: Image.Image, ink: tuple[int, int, int], count: int) -> Iterator[Turn]:
    """Write labelled fields on a page; a turn about each."""
    every = LABELS + MORE_LABELS
    labels = [every[index] for index in rng.permutation(len(every))[:count]]
    style = [str, str.capitalize, str.upper][int(rng.choice(3, p=[0.25, 0.65, 0.1]))]
    lines, places = [], []
    for label in labels:
        before = f"{style(label)}: "
        value = word(rng, 1 if rng.random() < 0.7 else 0, max(3, CELLS - len(before)))
        if rng.random() < 0.15 or len(before) + len(value) > CELLS:
            lines.append(before.strip())
            before = ""
        places.append((label, value, len(lines), len(before)))
        lines.append(before + value)
    cells = write_lines(rng, page, lines, ink)
    forms = ("What is the {}?", "What is the {}?", "Read the {}.", "Which {} is given?", "What does the {} say?")
    for label, value, line, start in places:
        yield Turn(choose(rng, forms).format(label), value, cells[line][start : start + len(value)])


def single_scene(rng: Rng, level: int) -> Guided:
    """An image of a shape or two, and what it shows."""
    return _finding_scene(rng, level, 1)


def pair_scene(rng: Rng, level: int) -> Guided:
    """Two images of a shape or two each, and what they show."""
    return _finding_scene(rng, level, 2)


def _finding_scene(rng: Rng, level: int, count: int) -> Guided:
    things = [[_thing(rng) for _ in range(1 if rng.random() < (1.0, 0.8, 0.5)[level] else 2)] for _ in range(count)]
    if count == 2 and rng.random() < 0.4:  # something in common
        same = things[0][0]
        things[1][0] = choose(rng, [same, Thing(same.shape, _thing(rng).colour, 0)])
    images, cells = zip(*(_draw(rng, of_picture) for of_picture in things), strict=True)
    turns = [_claim(rng, things, cells) for _ in range(8)]
    for side, name in zip((0, -1), ("left", "right") if count == 2 else ("", ""), strict=True):
        if len(things[side]) == 1 and (count == 2 or side == 0):
            only, at = things[side][0], cells[side][0]
            finds: Any = (at, at) if count == 1 else (at, FIRST_TOKEN) if side == 0 else (FIRST_TOKEN, at)
            where = f" in the {name} picture" if name else ""
            turns.append(Turn(f"What shape is there{where}?", only.shape, finds=finds))
            turns.append(Turn(f"What color is the {name or 'one'} shape?", only.colour, finds=finds))
            turns.append(Turn(f"What is shown{where}?", only.name, finds=finds))
    return Guided(list(images), pick(rng, turns, 9))


def _thing(rng: Rng) -> Thing:
    return Thing(choose(rng, SHAPES), choose(rng, list(COLOURS)), 0)


def _claim(rng: Rng, things: Sequence[list[Thing]], cells: Sequence[list[Cells]]) -> Turn:
    """Whether there is something in one of the images, in both or in any."""
    model = choose(rng, [thing for of_picture in things for thing in of_picture])
    other = _thing(rng)
    if rng.random() < 0.4:
        model = choose(rng, [other, Thing(model.shape, other.colour, 0), Thing(other.shape, model.colour, 0)])
    what, fits = _phrase(rng, model)
    found: list[Cells | int] = []
    for of_picture, at in zip(things, cells, strict=True):
        fitting = [cell for thing, own in zip(of_picture, at, strict=True) if fits(thing) for cell in own]
        found.append(fitting or FIRST_TOKEN)
    there = [cells != FIRST_TOKEN for cells in found]
    finds = (found[0], found[-1])
    picture = choose(rng, ["picture", "image"])
    if len(things) == 1:
        question, holds = choose(rng, [f"Is there {what}?", f"The {picture} shows {what}."]), there[0]
    else:
        side, name = choose(rng, [(0, "left"), (1, "right")])
        if rng.random() < 0.15:
            answer = {(True, True): "both", (True, False): "left", (False, True): "right", (False, False): "none"}
            return Turn(f"Which {picture} shows {what}?", answer[there[0], there[1]], finds=finds)
        question, holds = choose(
            rng,
            [
                (f"The {name} {picture} shows {what}.", there[side]),
                (f"There is {what} in the {name} {picture}.", there[side]),
                (f"Is there {what} in the {name} {picture}?", there[side]),
                (f"Both {picture}s show {what}.", all(there)),
                (f"Each {picture} has {what}.", all(there)),
                (f"Only one {picture} shows {what}.", sum(there) == 1),
                (f"One {picture} at least shows {what}.", any(there)),
            ],
        )
    return Turn(question, (yes_no if question.endswith("?") else true_false)(holds), finds=finds)


def _phrase(rng: Rng, thing: Thing) -> tuple[str, Callable[[Thing], bool]]:
    """Words for a thing, and whether another thing fits them."""
    return choose(
        rng,
        [
            (f"a {thing.shape}", lambda other: other.shape == thing.shape),
            (f"a {thing.colour} shape", lambda other: other.colour == thing.colour),
            (f"something {thing.colour}", lambda other: other.colour == thing.colour),
            (f"a {thing.name}", lambda other: other.name == thing.name),
        ],
    )


def _draw(rng: Rng, things: list[Thing]) -> tuple[Image.Image, list[Cells]]:
    """An image of one thing or two, side by side, and the cells of each."""
    ground = tuple(int(value) for value in rng.integers(140, 250, size=3))
    page = Image.new("RGB", (SIDE, SIDE), ground)
    if rng.random() < 0.4:
        page = Image.blend(page, photo_crop(rng, (SIDE, SIDE)), rng.uniform(0.1, 0.5))
    cells = []
    for place, thing in enumerate(things):
        r = rng.uniform(0.24, 0.42) * SIDE / len(things)
        x, y = ((place + 0.5) / len(things) + rng.uniform(-0.06, 0.06)) * SIDE, rng.uniform(0.42, 0.58) * SIDE
        draw_shape(ImageDraw.Draw(page), thing.shape, COLOURS[thing.colour], x, y, r)
        rows, columns = cells_in(x - 0.6 * r, y - 0.6 * r, x + 0.6 * r, y + 0.6 * r)
        cells.append([(a, b) for a in range(rows.start, rows.stop) for b in range(columns.start, columns.stop)])
    return page, cells


# --- what the model gets ------------------------------------------------------------------------------------------


@dataclass
class Conversation:
    """``input_ids`` and ``labels`` of a scene and, for each answer token, (position that says it, positions to see)."""

    images: list[Image.Image]
    input_ids: list[int]
    labels: list[int]
    reads: list[tuple[int, list[int]]]
    finds: list[tuple[int, tuple[list[int], list[int]]]]


def conversation(processor: Phi3VProcessor, scene: Guided) -> Conversation:
    """The token stream of a scene and the positions of the cells that its turns name."""
    chat = [
        ChatTurn(turn.question, turn.answer, 0 if index else len(scene.images))
        for index, turn in enumerate(scene.turns)
    ]
    stream = encode_conversation(processor.backend_tokenizer, chat, [TOKENS_A_PICTURE] * len(scene.images))
    pictures = [stream.input_ids.index(-1 - k) for k in range(len(scene.images))]

    def positions(picture: int, cells: Cells | int) -> list[int]:
        if isinstance(cells, int):
            return [0]
        return [pictures[picture] + view + row * ROW + column for view in VIEWS for row, column in cells]

    made = Conversation(scene.images, stream.input_ids, stream.labels, [], [])
    place = 0
    for turn in scene.turns:
        while stream.labels[place] == IGNORE_INDEX:
            place += 1
        said = 0  # characters of the answer
        first = True
        while place < len(stream.labels) and stream.labels[place] != IGNORE_INDEX:
            if said < len(turn.answer):
                text = processor.tokenizer.convert_ids_to_tokens(stream.input_ids[place]).replace("\u2581", " ")
                text = text.removeprefix(" ") if first else text
                first = False
                # A token without a character, the space before the first word, looks ahead.
                cells = [cell for of_one in turn.reads[said : said + max(1, len(text))] for cell in of_one]
                if cells:
                    made.reads.append((place - 1, positions(0, cells)))
                if turn.finds is not None:
                    own = (positions(0, turn.finds[0]), positions(-1, turn.finds[1]))
                    made.finds.append((place - 1, own))
                said += len(text)
            place += 1
    return made


def batch_of(
    processor: Phi3VProcessor, conversations: Sequence[Conversation]
) -> tuple[dict[str, torch.Tensor], list[tuple[tuple[int, tuple[int, ...]], torch.Tensor, torch.Tensor]]]:
    """What the model takes, and for layer and heads: the (batch, position) of queries, and (heads, T) wanted keys."""
    rows = pad_rows([one.input_ids for one in conversations], processor.tokenizer.pad_token_id, "right")
    length = rows["input_ids"].shape[1]
    labels = torch.full(rows["input_ids"].shape, IGNORE_INDEX)
    for row, one in enumerate(conversations):
        labels[row, : len(one.labels)] = torch.tensor(one.labels)
    crops = [processor.image_processor.crops(image) for one in conversations for image in one.images]
    inputs = dict(rows) | {
        "pixel_values": torch.stack([pixels for pixels, _ in crops]),
        "image_sizes": torch.tensor([size for _, size in crops]),
        "labels": labels,
        "loss_weights": (labels != IGNORE_INDEX).float(),
    }
    reads = [(row, at, (seen, seen)) for row, one in enumerate(conversations) for at, seen in one.reads]
    finds = [(row, at, seen) for row, one in enumerate(conversations) for at, seen in one.finds]
    told = []
    for where, entries in ((READING, reads), (FINDING, finds)):
        if entries:
            wanted = torch.zeros(len(entries), 2, length)
            for entry, (_, _, of_heads) in enumerate(entries):
                for head, seen in enumerate(of_heads):
                    wanted[entry, head, seen] = 1
            told.append((where, torch.tensor([entry[:2] for entry in entries]), wanted))
    return inputs, told


# --- learning -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def start_copying(model: Phi3VForCausalLM) -> None:
    """Let values and outputs be each other's inverse, and two of the four heads compare what tokens look like."""
    width = model.config.hidden_size
    head_dim = width // model.config.num_attention_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        turned = torch.linalg.qr(torch.randn(width, width))[0]
        attention.qkv_proj.weight[2 * width :] = turned
        attention.o_proj.weight.copy_(COPYING * turned.T)
        for head in range(2):
            compared = torch.linalg.qr(torch.randn(width, width))[0][:head_dim]
            for start in (0, width):  # queries, keys
                attention.qkv_proj.weight[start + head * head_dim : start + (head + 1) * head_dim] = compared
        layer.mlp.down_proj.weight.mul_(QUIET)


def watch(model: Phi3VForCausalLM) -> dict[int, dict[str, Any]]:
    """What the attention of the layers that are told is called with, renewed at every forward pass."""
    inputs_of: dict[int, dict[str, Any]] = {}
    for layer in (READING[0], FINDING[0]):
        model.model.layers[layer].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: inputs_of.update({layer: kwargs}), with_kwargs=True
        )
    return inputs_of


def attention_of(
    model: Phi3VForCausalLM, layer: int, heads: tuple[int, int], queries: torch.Tensor, inputs: dict[str, Any]
) -> torch.Tensor:
    """(N, 2, T): what two heads attend to at ``queries`` (N, 2), (batch, position); rows are padded on the right.

    Args:
        inputs: what the layer's attention was called with.
    """
    attention = model.model.layers[layer].self_attn
    states, (cosines, sines) = inputs["hidden_states"], inputs["position_embeddings"]
    projected = attention.qkv_proj(states).unflatten(-1, (3, -1, attention.head_dim))  # [B, T, 3, heads, D]
    query, key = projected[:, :, :2, list(heads)].permute(2, 0, 3, 1, 4)  # [B, 2, T, D] each
    query, key = apply_rotary_pos_emb(query, key, cosines, sines)
    rows, places = queries.unbind(-1)
    scores = torch.einsum("nhd,nhtd->nht", query[rows, :, places], key[rows]) * attention.scaling
    later = torch.arange(key.shape[2]) > places[:, None]
    return scores.masked_fill(later[:, None], float("-inf")).softmax(-1)


@reproducible()
def teach_pointers(start: Path, out: Path, *, steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Teach the decoder of the model at ``start`` and save the whole model to ``out``.

    Stopped and started again, it goes on from the last `SAVE_STEPS`.
    """
    torch.manual_seed(seed)
    model = Phi3VForCausalLM.from_pretrained(start, attn_implementation="sdpa")
    processor = Phi3VProcessor.from_pretrained(start)
    start_copying(model)
    model.model.vision_embed_tokens.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, 1.0, (steps - step) / (0.4 * steps))
    )
    inputs_of = watch(model)
    state = out.with_name(f"{out.name}.state")
    step = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        step = kept["step"]
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
    began, first, seen = time.perf_counter(), step, defaultdict[str, list[float]](list)
    while step < steps:
        scenes = draw(seed, step, batch_size)
        inputs, told = batch_of(processor, [conversation(processor, scene) for scene in scenes])
        loss = model(**inputs, logits_to_keep=None).loss
        seen["loss"].append(loss.item())
        for (layer, heads), queries, wanted in told:
            mass = (attention_of(model, layer, heads, queries, inputs_of[layer]) * wanted).sum(-1)  # [N, 2]
            loss = loss - (mass + 1e-6).log().mean()
            seen["reading" if layer == READING[0] else "finding"].append(mass.mean().item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        if step % 50 == 0 or step == steps:
            means = "  ".join(f"{name} {np.mean(values):.3f}" for name, values in seen.items())
            speed = (step - first) * batch_size / (time.perf_counter() - began)
            print(f"pointers step {step}/{steps}  {means}  {speed:.1f} samples/s", flush=True)
            seen.clear()
        if step % SAVE_STEPS == 0:
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            with replacing(state) as temporary:
                torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, temporary)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    state.unlink(missing_ok=True)


def draw(seed: int, step: int, batch_size: int) -> list[Guided]:
    """Scenes of a batch, all of one kind: so their rows are about as long."""
    kind = np.random.default_rng([seed, step]).choice(len(KINDS), p=list(KINDS.values()))
    make = list(KINDS)[int(kind)]
    scenes = []
    for row in range(batch_size):
        rng = np.random.default_rng([seed, step, row])
        scenes.append(make(rng, int(rng.choice(3, p=[0.4, 0.4, 0.2]))))
    return scenes


KINDS: dict[Callable[[Rng, int], Guided], float] = {reading_scene: 0.6, single_scene: 0.15, pair_scene: 0.25}
