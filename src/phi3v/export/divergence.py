"""Proof of a quantised export: how far its next-token distributions are from the float model's.

Prompts of every kind of page are answered by the float model; the export reads the same prompts, is given the same
answers token by token, and at every position of an answer the Kullback-Leibler divergence KL(float || export) says how
much the rounding changed. Answers themselves show little: on easy questions even 3-bit weights give the same ones. That
the prompts could show a fault is proven by a control: decoder weights rounded to 2 bits must exceed the bound.

Run as a module this file is the process that knows the export alone, ``python -m phi3v.export.divergence FOLDER PROMPTS
OUT``.

Shapes: ``T`` tokens of a prompt, ``n`` of an answer, ``V`` vocabulary.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.numpy import load_file, save_file

from phi3v.evaluate.decoding import Decoder, Logits, Pixels, decoder_of
from phi3v.export.proof import own_data, own_probes
from phi3v.json_files import read_json
from phi3v.model.quantised import decoder_linears
from phi3v.processing.conversation import ChatTurn, encode_conversation, tokenize_text
from phi3v.processing.hd_transform import CROP_SIZE, num_img_tokens
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.finetuned import FinetunedModel

NEW_TOKENS = 12  # of an answer
CONTROL_BITS = 2
GROUP_SIZE = 64  # of the control's weights
# The mean divergence that weights of so many bits may have: in nats, and as a share of the control's, which is what
# counts for a model whose predictions are nearly certain, or nearly even.
BOUNDS = {4: (5e-2, 1 / 4), 5: (2e-2, 1 / 10), 8: (5e-3, 1 / 50)}
# How many times as large the 99th percentile may be, and the mean over one kind of prompt, which are few.
TAIL, KIND = 10, 4
LEAST_CONTROL = 1e-7  # below, the order of sums is seen, not the rounding of weights
OWN, DRAWN = "own questions", "drawn prompts"
LOGITS = "logits.safetensors"
# A folder in the export: the drawn prompts, what the float model says to them, and the bound.
PROOF = "proof"
PROOF_FACTS = "proof.json"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and once the float model has answered it, the answer.

    Attributes:
        kind: what it tries, such as the grid of its pages.
        input_ids: image k is a run of ``-k``.
        pages: uint8 (height, width, 3), multiples of 336.
        answer: tokens that are forced.
    """

    kind: str
    input_ids: list[int]
    pages: list[Pixels]
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Speed:
    """How long reading and answering took, in seconds of CPU time; on a GPU of time."""

    prompt_tokens: int
    prompt_seconds: float
    answer_tokens: int
    answer_seconds: float

    @property
    def prompt(self) -> float:
        """Tokens a second."""
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def answer(self) -> float:
        """Tokens a second."""
        return self.answer_tokens / max(self.answer_seconds, 1e-9)


@dataclass(frozen=True)
class Divergence:
    """KL(float || export) in nats over the positions of all answers.

    Attributes:
        mean, p99, worst: of all positions.
        same: share of positions at which both have the same likeliest token.
        kinds: mean of each kind of prompt.
    """

    mean: float
    p99: float
    worst: float
    same: float
    positions: int
    kinds: dict[str, float]

    def fault(self, bound: float) -> str | None:
        """How it exceeds a bound of the mean, if it does."""
        found = [("on average", self.mean, bound), ("at the 99th percentile", self.p99, TAIL * bound)]
        found += [(f"on average on {kind}", mean, KIND * bound) for kind, mean in self.kinds.items()]
        for where, value, most in found:
            if not value <= most:  # also of NaN
                return f"KL {value:.1e} {where}, where {most:.1e} is the most"
        return None

    def __str__(self) -> str:
        return (
            f"KL {self.mean:.1e} on average, {self.p99:.1e} at the 99th percentile, the same likeliest token at "
            f"{100 * self.same:.1f} % of {self.positions} positions"
        )


def drawn_prompts(processor: Phi3VProcessor, long_context_start: int, context: int) -> list[Prompt]:
    """A prompt of every kind: grids, several pages, none, more tokens than the short rotary factors hold for."""
    draw = np.random.default_rng(0)

    def ask(kind: str, *grids: tuple[int, int], question: str = "What is shown?") -> Prompt:
        counts = [num_img_tokens(*grid) for grid in grids]
        chat = encode_conversation(processor.backend_tokenizer, [ChatTurn(question, None, len(grids))], counts)
        return Prompt(kind, chat.input_ids, [_drawn_page(*grid, draw) for grid in grids])

    prompts = [ask(f"a page of {rows}x{columns}", (rows, columns)) for rows, columns in GRIDS]
    prompts += [
        ask("two images", (1, 2), (2, 1), question="What color is the shape in image 2?"),
        ask("text only", question="What is two and two?"),
    ]
    if longest_prompt(long_context_start) <= context:
        pages = long_context_start // num_img_tokens(4, 4) + 1
        prompts.append(ask(f"more than {long_context_start:,} tokens", *[(4, 4)] * pages))
        crossing = ask(f"an answer across {long_context_start:,} tokens", (1, 1))
        missing = long_context_start - len(crossing.input_ids)  # an answer has two tokens at least
        filler = tokenize_text(processor.backend_tokenizer, "one and two and three and four and ")
        turn = crossing.input_ids[-6:]  # what stands at the end of a prompt stays there
        longer = crossing.input_ids[:-6] + (filler * (missing // len(filler) + 1))[:missing] + turn
        prompts.append(Prompt(crossing.kind, longer, crossing.pages))
    return prompts


def longest_prompt(long_context_start: int) -> int:
    """The most tokens that a drawn prompt has, with its answer."""
    largest = num_img_tokens(4, 4)
    return (long_context_start // largest + 1) * (largest + 4) + 64 + NEW_TOKENS


GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 4))


def _drawn_page(rows: int, columns: int, draw: np.random.Generator) -> Pixels:
    """Discs, bars and numbers on a light ground; no two crops alike."""
    height, width = rows * CROP_SIZE, columns * CROP_SIZE
    page = Image.new("RGB", (width, height), (236, 232, 220))
    pen = ImageDraw.Draw(page)
    for index in range(3 * rows * columns):
        x, y = int(draw.integers(width)), int(draw.integers(height))
        size, colour = int(draw.integers(30, 120)), tuple(int(value) for value in draw.integers(0, 256, 3))
        shape = pen.ellipse if index % 2 else pen.rectangle
        shape((x - size, y - size // (1 + index % 3), x + size, y + size), fill=colour)
        pen.text((x, y), f"{x * y}", fill=(10, 10, 10), font_size=24)
    return np.array(page)


def own_prompts(tuned: FinetunedModel, processor: Phi3VProcessor, count: int, folder: Path) -> list[Prompt]:
    """Questions of the run's own data.

    Raises:
        UserError: they are there no more, or not as they were.
    """
    if own_data(tuned) is None or not count:
        return []
    prompts = []
    for probe in own_probes(tuned, count, folder):
        images = [Image.open(path) for path in probe.images]
        ids = processor(probe.prompt, images or None)["input_ids"][0]
        pages = [processor.image_processor.page(image).numpy() for image in images]
        prompts.append(Prompt(OWN, ids, pages))
    return prompts


def answer_prompts(
    decoder: Decoder, prompts: Sequence[Prompt], stops: Sequence[int] = ()
) -> tuple[list[list[int]], list[Logits], Speed]:
    """Answers, the logits (n, V) that each of their tokens was chosen from, and how long it took.

    Prompts that have an answer are given it; others are answered greedily, own questions up to a token of ``stops``
    after the first. What a drawn prompt is answered goes on beyond that: a word and its end would be two positions of
    its kind, whose mean says more of chance than of the export.
    """
    answers, logits = [], []
    tokens, seconds = [0, 0], [0.0, 0.0]
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for prompt in prompts:
        before = clock()
        rows = [decoder.start(prompt.input_ids, prompt.pages)]
        read = clock()
        answer = list(prompt.answer) or [int(rows[0].argmax())]
        while len(rows) < (len(prompt.answer) or NEW_TOKENS) and (
            prompt.answer or prompt.kind != OWN or len(answer) == 1 or answer[-1] not in stops
        ):
            rows.append(decoder.step(answer[len(rows) - 1]))
            if not prompt.answer:
                answer.append(int(rows[-1].argmax()))
        answers.append(answer)
        logits.append(np.stack(rows))
        tokens[0] += len(prompt.input_ids)
        tokens[1] += len(rows) - 1
        seconds[0] += read - before
        seconds[1] += clock() - read
    return answers, logits, Speed(tokens[0], seconds[0], tokens[1], seconds[1])


def diverge(prompts: Sequence[Prompt], ours: Sequence[Logits], theirs: Sequence[Logits]) -> Divergence:
    """The divergence of ``theirs`` from ``ours``, each (n, V) of every prompt."""
    kinds: dict[str, list[float]] = {}
    same = 0
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        p, q = (torch.from_numpy(rows).double().log_softmax(-1) for rows in (a, b))
        kinds.setdefault(prompt.kind, []).extend((p.exp() * (p - q)).sum(-1).tolist())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    every = np.array([value for values in kinds.values() for value in values])
    means = {kind: float(np.mean(values)) for kind, values in kinds.items()}
    return Divergence(
        float(every.mean()), float(np.quantile(every, 0.99)), float(every.max()), same / len(every), len(every), means
    )


def bound_of(bits: int, control: Divergence) -> float:
    """The mean divergence that weights of so many bits may have, where the control has that one."""
    most, share = BOUNDS[bits]
    return min(most, share * control.mean)


@torch.no_grad()
def round_decoder(model: Any, bits: int) -> None:
    """Round the weights of the decoder's linear layers to so many bits in place, each group to its own range."""
    for name in decoder_linears(model):
        weight = model.get_submodule(name).weight
        size = GROUP_SIZE if weight.shape[1] % GROUP_SIZE == 0 else weight.shape[1]
        groups = weight.float().view(weight.shape[0], -1, size)
        low = groups.amin(-1, keepdim=True)
        scale = (groups.amax(-1, keepdim=True) - low).clamp(min=1e-12) / (2**bits - 1)
        weight.copy_((((groups - low) / scale).round() * scale + low).view_as(weight))


def write_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts and their answers to ``folder``, which exists; pages as PNG."""
    entries = []
    for number, prompt in enumerate(prompts):
        names = [f"{number}-{k}.png" for k in range(len(prompt.pages))]
        for name, page in zip(names, prompt.pages, strict=True):
            Image.fromarray(page).save(folder / name)
        entries.append({"kind": prompt.kind, "input_ids": prompt.input_ids, "pages": names, "answer": prompt.answer})
    (folder / "prompts.json").write_text(json.dumps(entries) + "\n", encoding="utf-8")


def read_prompts(folder: Path) -> list[Prompt]:
    """What `write_prompts` wrote."""
    entries: Any = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    return [
        Prompt(
            entry["kind"],
            entry["input_ids"],
            [np.array(Image.open(folder / name)) for name in entry["pages"]],
            entry["answer"],
        )
        for entry in entries
    ]


def write_logits(file: Path, logits: Sequence[Logits]) -> None:
    save_file({str(index): np.ascontiguousarray(rows) for index, rows in enumerate(logits)}, file)


def read_logits(file: Path) -> list[Logits]:
    stored = load_file(file)
    return [stored[str(index)] for index in range(len(stored))]


def answer_in_fresh_process(folder: Path, prompts: Path) -> tuple[list[Logits], Speed]:
    """What a process says to the ``prompts`` of `write_prompts` that loads ``folder`` and nothing else.

    Raises:
        RuntimeError: it fails; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "phi3v.export.divergence", str(folder), str(prompts), out]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"a fresh process cannot use {folder}:\n{done.stderr[-2000:]}")
        return read_logits(Path(out, LOGITS)), Speed(**read_json(Path(out, "speed.json")))


def load_decoder(folder: Path) -> Decoder:
    """A model in any format, as `phi3v eval --precision fp32` runs it."""
    from phi3v.train.device import choose_device
    from phi3v.train.finetuned import load_tuned, resolve_model

    runtime = choose_device("fp32")
    return decoder_of(*load_tuned(resolve_model(str(folder)), runtime))


def main(arguments: Sequence[str]) -> None:
    """The fresh process."""
    logging.disable(logging.WARNING)
    folder, prompts, out = (Path(name) for name in arguments)
    _, logits, speed = answer_prompts(load_decoder(folder), read_prompts(prompts))
    write_logits(out / LOGITS, logits)
    (out / "speed.json").write_text(json.dumps(asdict(speed)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
