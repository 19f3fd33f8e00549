"""Images with questions, drawn from a seed: what the tiny base model is pretrained on.

A scene is one or several images and questions whose answers can be seen in them: words, numbers and labelled fields
in many fonts, handwritten digits, coloured shapes, captions, pairs to compare, frames in order. ``level`` 0 to 2 goes
from a few large things to many small ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from drawing import BASE_PHOTOS, CELLS, choose, font_files, handwritten_digits, nudge, photo, write
from phi3v.processing.tiny_tokenizer import WORDS

SIDE = 336
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 40),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "brown": (120, 72, 30),
    "purple": (130, 50, 160),
    "orange": (240, 140, 30),
    "pink": (245, 150, 190),
    "teal": (30, 140, 140),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LABELS = (
    "name", "date", "total", "city", "number", "page", "address", "phone", "company", "title", "year", "month", "day",
    "time", "price", "amount", "country", "state", "field", "value", "form", "color", "class", "report",
)  # fmt: skip
BASE_DIGITS = 300  # of the 500 of each class; the tasks draw from the others

Turn = tuple[str, str]
Rng = np.random.Generator
T = TypeVar("T")


@dataclass
class Scene:
    """Images, and questions about them with their answers."""

    images: list[Image.Image]
    turns: list[Turn]


@dataclass
class Thing:
    """A coloured shape in a cell of a 3 x 3 grid."""

    shape: str
    colour: str
    cell: int

    @property
    def place(self) -> str:
        return place_name(self.cell)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def place_name(cell: int) -> str:
    row, column = ROWS[cell // 3], COLUMNS[cell % 3]
    return "center" if (row, column) == ("middle", "center") else f"{row} {column}"


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


def true_false(value: bool) -> str:
    return "True" if value else "False"


def pick(rng: Rng, items: Sequence[T], count: int) -> list[T]:
    """``count`` of ``items`` in random order."""
    return [items[index] for index in rng.permutation(len(items))[:count]]


def pick_even(rng: Rng, turns: list[Turn], count: int) -> list[Turn]:
    """As :func:`pick`, with as many True as False answers as there can be."""
    mixed = pick(rng, turns, len(turns))
    apart: dict[str, list[Turn]] = {}
    for turn in mixed:
        apart.setdefault(turn[1], []).append(turn)
    rounds = sorted(((rank, index) for index, group in enumerate(apart.values()) for rank in range(len(group))))
    groups = list(apart.values())
    return pick(rng, [groups[index][rank] for rank, index in rounds][:count], count)


# --- text ---------------------------------------------------------------------------------------------------------


def word(rng: Rng, level: int, longest: int = CELLS) -> str:
    """A word of English, a pronounceable one, a number or a mix of letters and digits; at most ``longest`` letters."""
    while True:
        text = _any_word(rng, level)
        if len(text) <= longest:
            return text


def _any_word(rng: Rng, level: int) -> str:
    kind = rng.random()
    if level == 0:
        return str(choose(rng, WORDS)) if kind < 0.6 else str(rng.integers(100))
    if kind < 0.4:
        text = str(choose(rng, WORDS))
    elif kind < 0.7:
        text = "".join(choose(rng, "bcdfghjklmnprstvwz") + choose(rng, "aeiou") for _ in range(int(rng.integers(1, 4))))
        text += choose(rng, ["", "n", "r", "s", "t", "l"])
    elif kind < 0.95:
        return number(rng, level)
    else:
        return "".join(choose(rng, "ABCDEFGHKLMNPRSTUVWXYZ23456789") for _ in range(int(rng.integers(2, 5))))
    return [text, text.capitalize(), text.upper()][int(rng.choice(3, p=[0.5, 0.35, 0.15]))]


def number(rng: Rng, level: int) -> str:
    kind = rng.random()
    if level == 1 or kind < 0.5:
        return str(rng.integers(10 ** int(rng.integers(1, 4 + level))))
    if kind < 0.7:
        return f"{rng.integers(1, 1000)}.{rng.integers(100):02d}"
    if kind < 0.85:
        return f"{rng.integers(1, 29)}/{rng.integers(1, 13)}/{rng.integers(1950, 2030)}"
    return f"{rng.integers(1, 100)}-{rng.integers(100, 1000)}"


def paper(rng: Rng, level: int, size: tuple[int, int] = (SIDE, SIDE)) -> tuple[Image.Image, tuple[int, int, int]]:
    """A background and a colour of ink that can be read on it."""
    kind = rng.random()
    if kind < (0.95, 0.8, 0.7)[level]:
        shade = tuple(int(value) for value in rng.integers(215, 256, size=3))
        ink = tuple(int(value) for value in rng.integers(0, 90, size=3))
    elif kind < (1.0, 0.9, 0.85)[level]:
        shade = tuple(int(value) for value in rng.integers(0, 60, size=3))
        ink = tuple(int(value) for value in rng.integers(190, 256, size=3))
    else:
        pale = Image.blend(photo_crop(rng, size), Image.new("RGB", size, "white"), 0.7)
        return pale, tuple(int(value) for value in rng.integers(0, 60, size=3))  # type: ignore[return-value]
    return Image.new("RGB", size, shade), ink  # type: ignore[return-value]


def photo_crop(rng: Rng, size: tuple[int, int]) -> Image.Image:
    """A random part of a photograph, between its own scale and twice that."""
    image = photo(choose(rng, BASE_PHOTOS))
    scale = rng.uniform(0.5, 1.0) * min(1.0, image.width / size[0], image.height / size[1])
    width, height = int(size[0] * scale), int(size[1] * scale)
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    return image.resize(size, box=(left, top, left + width, top + height))


def write_lines(
    rng: Rng, page: Image.Image, lines: list[str], ink: tuple[int, int, int]
) -> list[list[list[tuple[int, int]]]]:
    """Lines of text, one below the other with gaps between, in one font or several, some twice as large.

    Returns:
        The (row, column) of the cells of every character of every line.
    """
    draw, path = ImageDraw.Draw(page), choose(rng, font_files())
    several, shift = rng.random() < 0.4, nudge(rng)
    room = CELLS - len(lines)
    sizes = []
    for line in lines:
        sizes.append(2 if room and 2 * len(line) <= CELLS and rng.random() < 0.25 else 1)
        room -= sizes[-1] - 1
    left_aligned, row, cells = rng.random() < 0.4, 0, []
    for line, size in zip(lines, sizes, strict=True):
        gap = int(rng.integers(min(room, 3) + 1))
        row, room = row + gap, room - gap
        if several:
            path = choose(rng, font_files())
        column = int(rng.integers(CELLS - size * len(line) + 1))
        if left_aligned:
            column = min(column, 1)
        write(draw, line, column, row, path, ink, size=size, nudge=shift)
        cells.append(
            [
                [(row + below, column + size * place + right) for below in range(size) for right in range(size)]
                for place in range(len(line))
            ]
        )
        row += size
    return cells


def text_scene(rng: Rng, level: int) -> Scene:
    """Words and numbers, to be read."""
    count = int(rng.integers(1, (2, 4, 6)[level] + 1))
    words = [word(rng, level) for _ in range(count)]
    page, ink = paper(rng, level)
    write_lines(rng, page, words, ink)
    # An answer given before would spare the reading, so every page is read in one way only.
    kind, turns = rng.random(), list[Turn]()
    if kind < 0.3:
        turns.append(("Read the text.", " ".join(words)))
    elif kind < 0.7 or len(set(words)) < count:
        turns += [(f"What is the {ORDINALS[index]} word?", words[index]) for index in range(count)]
        turns[-1] = turns[-1] if rng.random() < 0.5 else ("What is the last word?", words[-1])
    else:
        for above, below in pairwise(words):
            turns.append((f"What is below {above}?", below) if kind < 0.85 else (f"What is above {below}?", above))
        turns.append(("What is the first word?", words[0]) if kind < 0.85 else ("What is the last word?", words[-1]))
    turns.append(("How many words are there?", NUMBERS[count]))
    for _ in range(2):
        asked = choose(rng, words) if rng.random() < 0.5 else word(rng, level)
        turns.append((f"Is the word {asked} there?", yes_no(asked in words)))
    return Scene([page], pick(rng, turns, len(turns)))


def fields_scene(rng: Rng, level: int) -> Scene:
    """A form of labelled fields."""
    count = int(rng.integers(1, (2, 4, 6)[level] + 1))
    labels = [LABELS[index] for index in rng.permutation(len(LABELS))[:count]]
    page, ink = paper(rng, level)
    style = [str, str.capitalize, str.upper][int(rng.choice(3, p=[0.3, 0.6, 0.1]))]
    mark = choose(rng, [":", ":", ":", "", " -"])
    beside = rng.random() < 0.75  # or the value below its label
    values = [word(rng, level, CELLS - (len(f"{label}{mark} ") if beside else 0)) for label in labels]
    if beside:
        lines = [f"{style(label)}{mark} {value}" for label, value in zip(labels, values, strict=True)]
    else:
        lines = [text for pair in zip(map(style, labels), values, strict=True) for text in pair]
    write_lines(rng, page, lines, ink)
    turns = []
    for label, value in zip(labels, values, strict=True):
        form = rng.random()
        if form < 0.6:
            turns.append((f"What is the {label}?", value))
        elif form < 0.85 or values.count(value) > 1:
            turns.append((f"Read the {label}.", value))
        else:
            turns.append((f"Which field says {value}?", label))
    other = choose(rng, LABELS)
    turns.append((f"Is there a {other}?", yes_no(other in labels)))
    if rng.random() < 0.3:
        turns.append(("How many fields are there?", NUMBERS[count]))
    return Scene([page], pick(rng, turns, len(turns)))


# --- digits -------------------------------------------------------------------------------------------------------


def digit_image(rng: Rng, value: int, side: int) -> Image.Image:
    """A handwritten digit as a mask, ``side`` pixels wide."""
    pixels, classes = handwritten_digits()
    own = np.flatnonzero(classes == value)[:BASE_DIGITS]
    return Image.fromarray(pixels[int(choose(rng, own))]).resize((side, side), Image.Resampling.BILINEAR)


def digits_scene(rng: Rng, level: int) -> Scene:
    """Handwritten digits in a row or scattered."""
    count = int(rng.integers(1, (2, 4, 6)[level] + 1))
    values = [int(value) for value in rng.integers(10, size=count)]
    page, ink = paper(rng, level)
    in_row = rng.random() < 0.6 or count > 4
    cells = sorted(int(cell) for cell in rng.permutation(9)[:count])
    side = min(120, SIDE // count) if in_row else 105
    top = int(rng.integers(SIDE - side))
    for index, value in enumerate(values):
        at = (index * (SIDE // count), top) if in_row else (cells[index] % 3 * 112, cells[index] // 3 * 112)
        page.paste(ink, at, digit_image(rng, value, side))
    turns = [(f"What is the {ORDINALS[index]} digit?", str(value)) for index, value in enumerate(values)]
    if not in_row:
        turns = [(f"Which digit is at the {place_name(cell)}?", str(v)) for cell, v in zip(cells, values, strict=True)]
    if rng.random() < 0.3:
        turns = [("Which digits are shown?", " ".join(map(str, values)))]
    turns.append(("How many digits are there?", NUMBERS[count]))
    for form in ("Is there a {}?", "Is there no {}?", "Do you see a {}?"):
        asked = int(rng.integers(10)) if rng.random() < 0.5 else choose(rng, values)
        turns.append((form.format(asked), yes_no((asked in values) != ("no" in form))))
    return Scene([page], pick(rng, turns, len(turns)))


# --- shapes -------------------------------------------------------------------------------------------------------


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: float, y: float, r: float
) -> None:
    """A shape of radius ``r`` around (x, y)."""
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=max(3, int(r * 0.3)))
    elif shape == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    elif shape == "cross":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=colour)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=colour)
    else:
        points, inner = {"triangle": (3, 1.0), "diamond": (4, 1.0), "star": (10, 0.45)}[shape]
        corners = []
        for index in range(points):
            radius = r * (inner if index % 2 and inner < 1 else 1.0)
            angle = 2 * math.pi * index / points - math.pi / 2
            corners.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
        draw.polygon(corners, fill=colour)


def some_things(rng: Rng, most: int, least: int = 1) -> list[Thing]:
    count = int(rng.integers(least, most + 1))
    cells = sorted(int(cell) for cell in rng.permutation(9)[:count])
    return [Thing(choose(rng, SHAPES), choose(rng, list(COLOURS)), cell) for cell in cells]


def draw_things(rng: Rng, things: list[Thing], side: int = SIDE) -> Image.Image:
    """Things on a background that none of them vanishes in."""
    if rng.random() < 0.2:
        page = Image.blend(photo_crop(rng, (side, side)), Image.new("RGB", (side, side), (200, 200, 200)), 0.5)
    else:
        page = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(170, 245, size=3)))
    draw = ImageDraw.Draw(page)
    step = side / 3
    for thing in things:
        r = step * rng.uniform(0.28, 0.44)
        x = (thing.cell % 3 + 0.5) * step + rng.uniform(-0.08, 0.08) * step
        y = (thing.cell // 3 + 0.5) * step + rng.uniform(-0.08, 0.08) * step
        draw_shape(draw, thing.shape, COLOURS[thing.colour], x, y, r)
    return page


def statement(rng: Rng, things: list[Thing]) -> tuple[str, bool]:
    """What an image contains, and whether it does; true about half of the time."""
    thing = choose(rng, things)
    kind = int(rng.integers(4))
    honest = rng.random() < 0.5
    if kind == 0:
        shape = thing.shape if honest else choose(rng, SHAPES)
        return f"a {shape}", any(t.shape == shape for t in things)
    if kind == 1:
        colour = thing.colour if honest else choose(rng, list(COLOURS))
        return f"something {colour}", any(t.colour == colour for t in things)
    if kind == 2:
        name = thing.name if honest else f"{choose(rng, list(COLOURS))} {thing.shape}"
        return f"a {name}", any(t.name == name for t in things)
    count = len(things) if honest else int(rng.integers(1, 7))
    return f"{NUMBERS[count]} shape{'s' if count > 1 else ''}", len(things) == count


def shape_turns(rng: Rng, things: list[Thing]) -> list[Turn]:
    turns: list[Turn] = []
    for thing in things:
        if sum(t.shape == thing.shape for t in things) == 1:
            turns.append((f"What color is the {thing.shape}?", thing.colour))
            turns.append((f"Where is the {thing.shape}?", thing.place))
        if sum(t.colour == thing.colour for t in things) == 1:
            turns.append((f"What shape is {thing.colour}?", thing.shape))
            turns.append((f"Where is the {thing.colour} shape?", thing.place))
        turns.append((f"What is at the {thing.place}?", thing.name))
    turns = pick(rng, turns, 10)
    cell = int(rng.integers(9))
    at = [thing.name for thing in things if thing.cell == cell]
    turns.append((f"What is at the {place_name(cell)}?", at[0] if at else "nothing"))
    turns.append(("How many shapes are there?", NUMBERS[len(things)]))
    shape = choose(rng, things).shape
    turns.append((f"How many {shape}s are there?", NUMBERS[sum(t.shape == shape for t in things)]))
    for _ in range(2):
        what, holds = statement(rng, things)
        if rng.random() < 0.5:
            turns.append((f"Does the picture show {what}?", yes_no(holds)))
        else:
            turns.append((f"The picture shows {what}.", true_false(holds)))
    if len(things) > 1:
        first, second = pick(rng, things, 2)
        above = bool(rng.integers(2))
        holds = first.cell // 3 < second.cell // 3 if above else first.cell % 3 < second.cell % 3
        side = "above" if above else "left of"
        turns.append((f"Is the {first.name} {side} the {second.name}?", yes_no(holds)))
    return turns


def this_or_any(rng: Rng, this: str, names: Sequence[str]) -> str:
    """What to ask for, so that yes and no are about as often right."""
    return this if rng.random() < 0.5 else choose(rng, names)


def one_scene(rng: Rng, level: int) -> Scene:
    """One coloured shape on a coloured ground: the first thing to see, asked about in many ways."""
    ground, colour = pick(rng, list(COLOURS), 2)
    shape = choose(rng, SHAPES)
    page = Image.new("RGB", (SIDE, SIDE), COLOURS[ground])
    radius = rng.uniform(40, 150)
    x, y = (rng.uniform(radius, SIDE - radius) for _ in range(2))
    draw_shape(ImageDraw.Draw(page), shape, COLOURS[colour], x, y, radius)
    turns = [
        ("What color is the background?", ground),
        (choose(rng, ["What color is the shape?", "What is the color?", f"What color is the {shape}?"]), colour),
        (choose(rng, ["What shape is shown?", "Which shape is there?", f"What is {colour}?"]), shape),
        ("What is shown?", f"{colour} {shape}"),
    ]
    for _ in range(2):
        asked = this_or_any(rng, shape, SHAPES)
        turns.append(
            (choose(rng, ["Is there a {}?", "Is it a {}?", "Do you see a {}?"]).format(asked), yes_no(asked == shape))
        )
        asked = this_or_any(rng, colour, list(COLOURS))
        form = choose(rng, ["Is the shape {}?", "Is there a {} shape?"])
        turns.append((form.format(asked), yes_no(asked == colour)))
    asked = this_or_any(rng, shape, SHAPES)
    turns.append((f"Is there no {asked}?", yes_no(asked != shape)))
    asked = this_or_any(rng, colour, list(COLOURS))
    turns.append((f"Is there no {asked} shape?", yes_no(asked != colour)))
    asked = this_or_any(rng, ground, list(COLOURS))
    turns.append((f"Is the background {asked}?", yes_no(asked == ground)))
    what, holds_true = statement(rng, [Thing(shape, colour, 4)])
    turns.append((f"The picture shows {what}.", true_false(holds_true)))
    return Scene([page], pick(rng, turns, len(turns)))


def shapes_scene(rng: Rng, level: int) -> Scene:
    """Coloured shapes: what, which colour, how many, where."""
    things = some_things(rng, (2, 4, 6)[level])
    return Scene([draw_things(rng, things)], pick(rng, shape_turns(rng, things), 16))


def caption_scene(rng: Rng, level: int) -> Scene:
    """A thing with a line of text that names it, or something else."""
    page, ink = paper(rng, level)
    above = rng.random() < 0.7  # the text
    if rng.random() < 0.5:
        shape, colour = choose(rng, SHAPES), choose(rng, list(COLOURS)[:5])
        draw_shape(ImageDraw.Draw(page), shape, COLOURS[colour], SIDE / 2, 198 if above else 138, rng.uniform(60, 110))
        shown, others = shape, SHAPES
    else:
        value = int(rng.integers(10))
        page.paste(ink, (68, 100 if above else 40), digit_image(rng, value, 200))
        shown, others = NUMBERS[value], NUMBERS[:10]
    said = shown if rng.random() < 0.5 else choose(rng, others)
    text = choose(rng, ["", "", "a ", "this is ", "see the ", "my "]) + said
    if rng.random() < 0.3:
        text = text.upper()
    lines = [text] if len(text) <= CELLS else [text[: -len(said)], text[-len(said) :]]
    top, font, shift = 0 if above else CELLS - len(lines), choose(rng, font_files()), nudge(rng)
    for row, line in enumerate(lines, start=top):
        line = line.strip()
        write(ImageDraw.Draw(page), line, (CELLS - len(line)) // 2, row, font, ink, nudge=shift)
    turns = [
        ("What does the text say?", text),
        ("What is shown?", shown),
        ("Does the text fit the picture?", yes_no(said == shown)),
        ("Does the text name something else?", yes_no(said != shown)),
    ]
    return Scene([page], pick(rng, turns, 4))


# --- several images ---------------------------------------------------------------------------------------------


def pair_scene(rng: Rng, level: int) -> Scene:
    """Two images to compare."""
    side = int(choose(rng, [224, 280, 336]))
    if rng.random() < 0.3:
        values = [int(rng.integers(10)) for _ in range(2)]
        if rng.random() < 0.4:
            values[1] = values[0]
        images = []
        for value in values:
            page, ink = paper(rng, level, (side, side))
            page.paste(ink, (side // 6, side // 6), digit_image(rng, value, side * 2 // 3))
            images.append(page)
        turns = [
            ("What digit is in the left picture?", str(values[0])),
            ("What digit is in the right picture?", str(values[1])),
            ("Both pictures show the same digit.", true_false(values[0] == values[1])),
            ("The left digit is larger than the right digit.", true_false(values[0] > values[1])),
        ]
        return Scene(images, pick(rng, turns, 4))
    groups = [some_things(rng, (1, 2, 4)[level]) for _ in range(2)]
    if rng.random() < 0.4:  # something in common
        groups[1][0].shape = groups[0][0].shape
        if rng.random() < 0.5:
            groups[1][0].colour = groups[0][0].colour
    images = [draw_things(rng, things, side) for things in groups]
    turns = []
    for _ in range(12):
        source = choose(rng, groups)
        what, _ = statement(rng, source)
        there = [holds(what, things) for things in groups]
        form = int(rng.integers(5))
        if form == 0:
            turns.append((f"Both pictures show {what}.", true_false(all(there))))
        elif form == 1:
            turns.append((f"The left picture shows {what}.", true_false(there[0])))
        elif form == 2:
            turns.append((f"The right picture shows {what}.", true_false(there[1])))
        elif form == 3:
            turns.append((f"Only one picture shows {what}.", true_false(sum(there) == 1)))
        else:
            answer = {(True, True): "both", (True, False): "left", (False, True): "right", (False, False): "none"}
            turns.append((f"Which picture shows {what}?", answer[there[0], there[1]]))
    more = len(groups[0]) > len(groups[1])
    turns.append(("The left picture shows more shapes than the right picture.", true_false(more)))
    turns.append(("Both pictures show as many shapes.", true_false(len(groups[0]) == len(groups[1]))))
    left, right = (groups[index][0] for index in range(2))
    for side_name, things in zip(("left", "right"), groups, strict=True):
        if len(things) == 1:
            turns.append((f"What shape is in the {side_name} picture?", things[0].shape))
            turns.append((f"What color is the {side_name} shape?", things[0].colour))
    if len(groups[0]) == len(groups[1]) == 1:
        turns.append(("Both shapes are the same.", true_false(left.shape == right.shape)))
        turns.append(("Both colors are the same.", true_false(left.colour == right.colour)))
    return Scene(images, pick_even(rng, list(dict(turns).items()), 10))


def holds(what: str, things: list[Thing]) -> bool:
    """Whether a phrase of :func:`statement` is true of other things."""
    if what.startswith("something "):
        return any(thing.colour == what.removeprefix("something ") for thing in things)
    if what.startswith("a "):
        name = what.removeprefix("a ")
        return any(name in (thing.shape, thing.name) for thing in things)
    return NUMBERS[len(things)] == what.split()[0]


def frames_scene(rng: Rng, level: int, count: int | None = None) -> Scene:
    """Frames of something that moves, stays, is cut, or counts."""
    count = count or int(rng.integers(3, 5))
    side = int(choose(rng, [112, 168, 224]))
    kind = int(rng.integers(5))
    if kind == 0:  # digits one after the other
        values = [int(value) for value in rng.integers(10, size=count)]
        frames = []
        page, ink = paper(rng, level, (side, side))
        for value in values:
            frame = page.copy()
            frame.paste(ink, (side // 6, side // 6), digit_image(rng, value, side * 2 // 3))
            frames.append(frame)
        turns = [("Read the digits in order.", " ".join(map(str, values)))]
        turns += [(f"What digit is in the {ORDINALS[k]} picture?", str(v)) for k, v in enumerate(values[:6])]
        return Scene(frames, pick(rng, turns, 4))
    if kind == 1:  # a shape on its way
        way = choose(rng, [*WAYS, "not at all"])
        dx, dy = WAYS.get(way, (0, 0))
        shape, colour = choose(rng, SHAPES), choose(rng, list(COLOURS))
        page = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(170, 245, size=3)))
        across = rng.uniform(0.25, 0.75, size=2)
        frames = []
        for index in range(count):
            t = 0.15 + 0.7 * index / (count - 1)
            x = t if dx > 0 else 1 - t if dx < 0 else across[0]
            y = t if dy > 0 else 1 - t if dy < 0 else across[1]
            frame = page.copy()
            draw_shape(ImageDraw.Draw(frame), shape, COLOURS[colour], x * side, y * side, 0.14 * side)
            frames.append(frame)
        turns = [
            ("Which way does the shape move?", way),
            ("What moves?" if way != "not at all" else "What is shown?", f"{colour} {shape}"),
            ("Does the shape move?", yes_no(way != "not at all")),
            ("What shape is it?", shape),
            ("What color is it?", colour),
            *way_turns(rng, "shape", way),
        ]
        return Scene(frames, pick(rng, turns, len(turns)))
    if kind == 2:  # a photograph that the camera pans over, slowly, fast or not at all
        way = choose(rng, [*WAYS, "not at all"])
        dx, dy = WAYS.get(way, (0, 0))
        speed = choose(rng, ["slow", "fast"])
        step = int(side * (0.06 if speed == "slow" else 0.3))
        wide = photo_crop(rng, (side + step * (count - 1), side + step * (count - 1)))
        frames = []
        for index in range(count):
            k = index * step
            last = (count - 1) * step
            x = k if dx > 0 else last - k if dx < 0 else last // 2
            y = k if dy > 0 else last - k if dy < 0 else last // 2
            frames.append(wide.crop((x, y, x + side, y + side)))
        turns = [("Which way does the camera move?", way), ("Does the picture change?", yes_no(way != "not at all"))]
        turns += way_turns(rng, "camera", way)
        if way != "not at all":
            turns.append(("Is the motion slow or fast?", speed))
        return Scene(frames, turns)
    if kind == 3:  # a photograph that turns dark, or light, or stays
        end = choose(rng, ["dark", "light", None])
        first = photo_crop(rng, (side, side))
        goal = first if end is None else Image.new("RGB", first.size, "black" if end == "dark" else "white")
        frames = [Image.blend(first, goal, 0.95 * index / (count - 1)) for index in range(count)]
        turns = [(f"Does the picture turn {what}?", yes_no(end == what)) for what in ("dark", "light")]
        turns += [("Is there a cut?", "no"), ("Does the picture change?", yes_no(end is not None))]
        return Scene(frames, pick(rng, turns, len(turns)))
    cut = int(rng.integers(count)) if rng.random() < 0.8 else 0  # a cut before this image; 0 is none
    first, second = photo_crop(rng, (side, side)), photo_crop(rng, (side, side))
    frames = [second if cut and index >= cut else first for index in range(count)]
    turns = [("Is there a cut?", yes_no(cut > 0)), ("Does the picture change?", yes_no(cut > 0))]
    turns.append(("Does the picture turn dark?", "no"))
    if 0 < cut < len(ORDINALS):
        turns.append(("Which picture is the first after the cut?", ORDINALS[cut]))
    return Scene(frames, turns)


def way_turns(rng: Rng, what: str, way: str) -> list[Turn]:
    """Whether something moves one way and another."""
    asked = pick(rng, list(WAYS), 2)
    return [(f"Does the {what} move {one}?", yes_no(one == way)) for one in asked]


SINGLE: dict[str, Callable[[Rng, int], Scene]] = {
    "one": one_scene,
    "text": text_scene,
    "fields": fields_scene,
    "digits": digits_scene,
    "shapes": shapes_scene,
    "caption": caption_scene,
}
SEVERAL: dict[str, Callable[[Rng, int], Scene]] = {"pair": pair_scene, "frames": frames_scene}
