"""What an export says of itself: its result, and the README.md in its folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal

from phi3v.evaluate.metrics import Score
from phi3v.export.divergence import CONTROL_BITS, TAIL, Divergence, Speed
from phi3v.export.formats import FORMATS
from phi3v.export.proof import DRAWN, TOLERANCE, Comparison
from phi3v.terminal import say
from phi3v.train.card import write_card
from phi3v.train.finetuned import FinetunedModel

CHECKED = """
## How it was checked

On {count} prompts ({probes}), logits of the last tokens and greedy answers:

| compared | worst logit difference | largest logit | equal answers |
|---|---|---|---|
{rows}

{explanation}
"""
MODEL_ELSEWHERE = """
vLLM serves the folder; with phi3v installed beside vLLM it needs no remote code:

```bash
vllm serve {folder} --max-model-len 4096 --limit-mm-per-prompt '{{"image": 4}}'
```

Above 4096, vLLM takes LongRoPE's long factors for every prompt, and the answers to shorter prompts change: more is
right only if all prompts are longer than 4096 tokens.

The official remote code {code}. There is no converter of this architecture for llama.cpp, and so none for Ollama.
"""
ADAPTER_ELSEWHERE = """
vLLM and others take the merged model, not the adapter.
`phi3v export` without `--adapter` makes it.
"""


@dataclass(frozen=True)
class ExportResult:
    """An export and how far it is from what was tuned.

    Attributes:
        merge: the merged weights in float32 against adapter and base apart; none without an adapter.
        files: a fresh process that loaded the folder against the same weights here.
        tuned: the export against the model as it was tuned, with what rounding and 4-bit weights do.
        probes: where the prompts are from.
    """

    folder: Path
    source: str
    method: str
    dtype: str
    is_adapter: bool
    parameters: int
    merge: Comparison | None
    files: Comparison
    tuned: Comparison
    probes: str

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "source": self.source,
            "method": self.method,
            "dtype": self.dtype,
            "adapter": self.is_adapter,
            "parameters": self.parameters,
            "probes": self.probes,
            "tolerance": TOLERANCE,
            "merge": vars(self.merge) if self.merge is not None else None,
            "files": vars(self.files),
            "tuned": vars(self.tuned),
        }

    def render(self, console: Console) -> None:
        what = "adapter" if self.is_adapter else f"model, {self.dtype}"
        say(console, f"{what}: {self.parameters:,} parameters in {self.folder}")
        for text, value in (
            ("merged against unmerged, float32", self.merge),
            ("a fresh process against this one", self.files),
            ("the export against the model as tuned", self.tuned),
        ):
            if value is not None:
                say(console, f"{text}: {value}")
        say(console, f"next: phi3v eval {self.folder} --data …, or see {self.folder / 'README.md'}")


def write_export_card(folder: Path, result: ExportResult, tuned: FinetunedModel, base_id: str | None) -> None:
    """Write ``README.md`` into the export, with how it was checked."""
    rows = [
        ("merged weights against adapter and base apart, float32", result.merge),
        ("the files, loaded by a fresh process, against the same weights before they were written", result.files),
        ("this export against the model as it was tuned", result.tuned),
    ]
    code = (
        "is in the folder" if list(folder.glob("*.py")) else "must be beside it (it is in the original model's folder)"
    )
    name = result.folder.name
    checked = CHECKED.format(
        count=result.files.num_texts,
        probes="drawn images" if result.probes.startswith(DRAWN) else "questions of the run's own data",
        rows="\n".join(
            f"| {what} | {found.worst:.1e} | {found.largest:.1f} | {found.equal_texts} of {found.num_texts} |"
            for what, found in rows
            if found is not None
        ),
        explanation=_explanation(result, tuned),
    )
    write_card(
        folder,
        tuned,
        name=name,
        what=None if result.is_adapter else f"A model in the official layout, {result.dtype}",
        is_adapter=result.is_adapter,
        base_id=base_id,
        more=checked,
        end=ADAPTER_ELSEWHERE if result.is_adapter else MODEL_ELSEWHERE.format(folder=name, code=code),
    )


def _explanation(result: ExportResult, tuned: FinetunedModel) -> str:
    text = (
        f"The rows before the last must be within {TOLERANCE:.0e} of the largest logit with equal answers, which is "
        "what another order of float32 sums does; else there would be no export."
    )
    if tuned.is_quantised:
        text += (
            " The last row is larger, as expected: the adapter was tuned on weights in 4 bits, and the export has the "
            "unquantised ones below it. Evaluate the export with `phi3v eval` before you rely on it."
        )
    elif result.dtype != "float32" and tuned.adapter is not None and not result.is_adapter:
        text += f" The last row holds the one rounding of the merged weights to {result.dtype}."
    return text


GRAPH_SNIPPET = """from phi3v.runtime import load_runtime

model = load_runtime("{name}")  # this folder, downloaded if it is on the hub
print(model.answer("What is shown?", ["image.png"]))"""


@dataclass(frozen=True)
class Part:
    """Some of the prompts of a proof.

    Attributes:
        bound: of the mean divergence; others follow from it.
    """

    divergence: Divergence
    control: Divergence
    bound: float

    def fault(self) -> str | None:
        """How the bound is exceeded, if it is."""
        return self.divergence.fault(self.bound)

    def __str__(self) -> str:
        return f"{self.divergence}; at most {self.bound:.1e}, 2-bit weights have {self.control.mean:.1e}"


@dataclass(frozen=True)
class Proof:
    """What an export in another format was compared with, and how it came out.

    Attributes:
        divergence, control: of the export, and of the float model with its decoder's weights rounded to 2 bits.
        parts: the same of own questions and of drawn prompts, each with the bound that it is held to.
        speed, float_speed: of the export and of the float model in phi3v.
        score, float_score: of the run's task, on the same questions.
        size, float_size: bytes on the disk.
        is_fitted: the rounding was fitted to data.
    """

    format: str
    bits: int
    folder: Path
    divergence: Divergence
    control: Divergence
    parts: dict[str, Part]
    speed: Speed
    float_speed: Speed
    size: int
    float_size: int
    is_fitted: bool = False
    score: Score | None = None
    float_score: Score | None = None

    @property
    def relative_speed(self) -> str:
        reads, writes = self.speed.prompt / self.float_speed.prompt, self.speed.answer / self.float_speed.answer
        clock = "time" if torch.cuda.is_available() else "CPU time"
        return f"in the same {clock} it reads {reads:.2g} and writes {writes:.2g} times the tokens of the float model"

    def to_json_dict(self) -> dict[str, Any]:
        told = asdict(replace(self, score=None, float_score=None)) | {"folder": str(self.folder)}
        for name, score in (("score", self.score), ("float_score", self.float_score)):
            told[name] = score.to_json_dict() if score is not None else None
        return told

    def render(self, console: Console) -> None:
        say(
            console, f"{self.format}: {decimal(self.size)} of {decimal(self.float_size)} in {self.folder}", style="bold"
        )
        for name, part in self.parts.items():
            say(console, f"  {name}: {part}")
        say(console, f"  {self.relative_speed}")
        if self.score is not None:
            say(console, f"  {self.score.name} {self.score}; the float model {self.float_score}")
        say(console, f"next: phi3v chat {self.folder}, or see {self.folder / 'README.md'}")


def write_format_card(folder: Path, proof: Proof, tuned: FinetunedModel, base_id: str | None) -> None:
    """Write ``README.md`` into an export in another format, with how far it is from the float model."""
    write_card(
        folder,
        tuned,
        name=proof.folder.name,
        what=f"A model in the format {proof.format} ({_made(proof)})",
        is_adapter=False,
        base_id=base_id,
        library="phi3v" if FORMATS[proof.format].is_graph else None,
        snippet=GRAPH_SNIPPET if FORMATS[proof.format].is_graph else None,
        is_rounded=True,
        more=_card(proof),
    )


def _made(proof: Proof) -> str:
    """How the weights are stored, which several options may have decided."""
    about = FORMATS[proof.format].about.partition(";")[0]
    bits = f"{proof.bits} bits, " if "bits" in FORMATS[proof.format].choices else ""
    return f"{about}; {bits}{'fitted to data (GPTQ)' if proof.is_fitted else 'rounded to the nearest'}"


def _card(proof: Proof) -> str:
    kinds = "\n".join(f"| {kind} | {mean:.1e} |" for kind, mean in proof.divergence.kinds.items())
    parts = "\n".join(
        f"| {name} | {part.divergence.mean:.1e} | {part.bound:.1e} | {part.control.mean:.1e} "
        f"| {part.divergence.p99:.1e} | {TAIL * part.bound:.1e} | {part.control.p99:.1e} |"
        for name, part in proof.parts.items()
    )
    score = (
        f"\n{proof.score.name}: {proof.score}; the float model: {proof.float_score}.\n"
        if proof.score is not None
        else ""
    )
    return f"""
## How far it is from the float model

KL divergence of the next-token distribution from the float model's, in nats, at {proof.divergence.positions} positions
of its answers, beside what was allowed and what {CONTROL_BITS}-bit weights would have:

| prompts | mean | at most | {CONTROL_BITS} bits | 99th percentile | at most | {CONTROL_BITS} bits |
|---|---|---|---|---|---|---|
{parts}

| prompts | mean |
|---|---|
{kinds}
{score}
It takes {decimal(proof.size)}, the float model {decimal(proof.float_size)}. Run by phi3v where it was made,
{proof.relative_speed} in phi3v. `phi3v export --verify` proves it again. It is run by {FORMATS[proof.format].runs_it}.
"""
