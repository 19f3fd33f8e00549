"""Proof that a folder holds the model it was made from: the same logits and answers in a process that knows only it.

Run as a module this file is that process: ``python -m phi3v.export.proof FOLDER PROBES.json OUT``.

Shapes: ``T`` tokens of a prompt, ``V`` vocabulary.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from phi3v.config import Sources
from phi3v.data.mixture import open_sources
from phi3v.errors import UserError
from phi3v.processing.conversation import decode_answer, stop_token_ids, user_prompt
from phi3v.processing.processor import Phi3VProcessor
from phi3v.train.finetuned import FinetunedModel

DRAWN = "drawn images"
NEW_TOKENS = 24  # of an answer
KEPT_LOGITS = 64  # of a prompt's last tokens; those of a page would fill the memory with a real vocabulary
# The same weights in the same float32 arithmetic differ by the order of sums only, which another process may choose
# otherwise. Merging reorders more: W x + B (A x) becomes (W + B A) x.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Probe:
    """A prompt in the chat format, with image tags, and its images."""

    prompt: str
    images: tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """What a model says to the probes.

    Attributes:
        logits: of each probe, float32 (min(T, KEPT_LOGITS), V).
        texts: greedy answers.
    """

    logits: list[torch.Tensor]
    texts: list[str]


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart.

    Attributes:
        worst: the largest difference of two logits.
        largest: the largest logit, in absolute value.
        equal_texts, num_texts: greedy answers that are the same, and all.
    """

    worst: float
    largest: float
    equal_texts: int
    num_texts: int

    @property
    def relative(self) -> float:
        """The worst difference as a share of the largest logit, or of 1 where all are smaller."""
        return self.worst / max(1.0, self.largest)

    @property
    def same(self) -> bool:
        """Within the order of float32 sums."""
        return self.relative <= TOLERANCE and self.equal_texts == self.num_texts

    def __str__(self) -> str:
        return (
            f"worst logit difference {self.worst:.1e} (largest logit {self.largest:.1f}), "
            f"{self.equal_texts} of {self.num_texts} answers equal"
        )


def make_probes(tuned: FinetunedModel, count: int, folder: Path) -> tuple[list[Probe], str]:
    """``count`` probes and where they are from: the run's own questions where they are still there, else drawn ones.

    Args:
        folder: for their images; must stay until the last use.
    """
    why = ""
    if data := own_data(tuned):
        try:
            return own_probes(tuned, count, folder), name_data(data)
        except UserError as error:  # of a file or an image that is there no more, or not as it was
            why = f", as the run's own data cannot be used ({str(error).splitlines()[0]})"
    return [drawn_probe(folder, index) for index in range(count)], f"{DRAWN}{why}"


def own_data(tuned: FinetunedModel) -> Sources:
    """What the run was evaluated on, else what it was trained on; none of a model that is no run's."""
    return tuned.run.data.eval or tuned.run.data.train


def name_data(data: Sources) -> str:
    """The files of data, for a message."""
    return data if isinstance(data, str) else ", ".join(source.path for source in data or ())


def own_probes(tuned: FinetunedModel, count: int, folder: Path) -> list[Probe]:
    """Questions from all over `own_data`; raises as `open_sources` and `load_images`."""
    table = open_sources(own_data(tuned), **tuned.run.data.reading, progress=False)
    probes = []
    for place in sorted({index * len(table) // count for index in range(count)}):
        record = table[place]
        turn = record.turns[0]
        names = []
        for k, image in enumerate(table.load_images(record)[: len(turn.images)]):
            names.append(str(folder / f"probe-{place}-{k}.png"))
            image.save(names[-1])
        numbers = range(1, len(names) + 1)
        prompt = user_prompt(turn.user, numbers, turn.image_offsets, system=record.system)
        probes.append(Probe(prompt, tuple(names)))
    return probes


def drawn_probe(folder: Path, index: int) -> Probe:
    """A page with a line of text and a disc, of another size and colour each time; written to ``folder``."""
    width, height = ((336, 336), (500, 340), (300, 640), (900, 420))[index % 4]
    page = Image.new("RGB", (width, height), (236, 232, 220))
    draw = ImageDraw.Draw(page)
    draw.ellipse((40, 40, 160, 160), fill=((200, 40, 40), (40, 90, 200), (40, 150, 60), (230, 180, 30))[index % 4])
    draw.text((40, 200), f"Number {index + 1}", fill=(10, 10, 10))
    path = folder / f"drawn-{index}.png"
    page.save(path)
    return Probe(user_prompt("What is shown?", [1]), (str(path),))


@torch.inference_mode()
def answer_probes(model: Any, processor: Phi3VProcessor, probes: Sequence[Probe]) -> Answers:
    """Logits and greedy answers by the library's own ways, on the device where the model is."""
    device = next(model.parameters()).device
    stops = stop_token_ids(processor.backend_tokenizer)
    logits, texts = [], []
    for probe in probes:
        images = [Image.open(path) for path in probe.images]
        inputs = processor(probe.prompt, images or None, return_tensors="pt").to(device)
        logits.append(model(**inputs, logits_to_keep=KEPT_LOGITS, use_cache=False).logits[0].float().cpu())
        ids = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        texts.append(decode_answer(processor.backend_tokenizer, ids[0, inputs["input_ids"].shape[1] :].tolist(), stops))
    return Answers(logits, texts)


def compare(ours: Answers, theirs: Answers) -> Comparison:
    """How far apart they are."""
    pairs = list(zip(ours.logits, theirs.logits, strict=True))
    return Comparison(
        worst=max(float((a - b).abs().max()) for a, b in pairs),
        largest=max(float(a.abs().max()) for a, _ in pairs),
        equal_texts=sum(a == b for a, b in zip(ours.texts, theirs.texts, strict=True)),
        num_texts=len(ours.texts),
    )


def answer_in_fresh_process(folder: Path, probes: Sequence[Probe], work: Path) -> Answers:
    """What a process says that loads ``folder`` and nothing else.

    Args:
        work: a folder for what the processes exchange.

    Raises:
        RuntimeError: it fails; with the end of what it printed.
    """
    (work / "probes.json").write_text(json.dumps([asdict(probe) for probe in probes]), encoding="utf-8")
    command = [sys.executable, "-m", "phi3v.export.proof", str(folder), str(work / "probes.json"), str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a fresh process cannot use {folder}:\n{done.stderr[-2000:]}")
    logits = load_file(work / "logits.safetensors")
    texts = json.loads((work / "texts.json").read_text(encoding="utf-8"))
    return Answers([logits[str(index)] for index in range(len(texts))], texts)


def load_export(folder: Path, device: torch.device, base: str | None = None) -> tuple[Any, Phi3VProcessor]:
    """A model or an adapter as anyone would load it, computing in float32.

    Args:
        base: the model that the adapter goes on, if not the one that it names.
    """
    from peft import PeftConfig, PeftModel

    from phi3v.model.modeling import Phi3VForCausalLM

    is_adapter = (folder / "adapter_config.json").is_file()
    source = (base or PeftConfig.from_pretrained(folder).base_model_name_or_path) if is_adapter else str(folder)
    model = Phi3VForCausalLM.from_pretrained(source, dtype=torch.float32)
    if is_adapter:
        model = PeftModel.from_pretrained(model, str(folder))
    return model.eval().to(device), Phi3VProcessor.from_pretrained(folder)


def main(arguments: Sequence[str]) -> None:
    """The fresh process."""
    logging.disable(logging.WARNING)
    folder, probes, out = (Path(name) for name in arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load_export(folder, device)
    entries = json.loads(probes.read_text(encoding="utf-8"))
    answers = answer_probes(model, processor, [Probe(entry["prompt"], tuple(entry["images"])) for entry in entries])
    save_file({str(index): logits for index, logits in enumerate(answers.logits)}, out / "logits.safetensors")
    (out / "texts.json").write_text(json.dumps(answers.texts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
