"""What an export says of itself: its result, and the README.md in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from phi3v import __version__
from phi3v.export.proof import TOLERANCE, Comparison
from phi3v.json_files import content_of, read_json
from phi3v.terminal import say
from phi3v.train.finetuned import FinetunedModel

CARD = """---
library_name: phi3v
tags: [phi3_v, vision, fine-tuned]
---
# {title}

{what} Made by phi3v {version} with method `{method}` from {origin}.
{scores}
## How it was checked

On {count} prompts ({probes}), logits of the last tokens and greedy answers:

| compared | worst logit difference | largest logit | equal answers |
|---|---|---|---|
{rows}

{explanation}

## Use

With phi3v, without remote code:

```python
from PIL import Image, ImageOps
{load}
image = ImageOps.exif_transpose(Image.open("image.png"))
inputs = processor("<|user|>\\n<|image_1|>\\nWhat is shown?<|end|>\\n<|assistant|>\\n", [image])
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

{elsewhere}
"""
MODEL_LOAD = """from phi3v import Phi3VForCausalLM, Phi3VProcessor

model = Phi3VForCausalLM.from_pretrained("{folder}")
processor = Phi3VProcessor.from_pretrained("{folder}")"""
ADAPTER_LOAD = """from peft import PeftModel
from phi3v import Phi3VForCausalLM, Phi3VProcessor

model = PeftModel.from_pretrained(Phi3VForCausalLM.from_pretrained("{base}"), "{folder}")
processor = Phi3VProcessor.from_pretrained("{folder}")"""
MODEL_ELSEWHERE = """The folder has the official layout, so what serves Phi-3.5-vision serves it:

```bash
vllm serve {folder} --trust-remote-code --max-model-len 8192 --limit-mm-per-prompt '{{"image": 4}}'
```

The official remote code {code}. There is no converter of this architecture for llama.cpp, and so none for Ollama."""
ADAPTER_ELSEWHERE = """vLLM and others take the merged model, not the adapter.
`phi3v export` without `--adapter` makes it."""


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


def write_card(folder: Path, result: ExportResult, tuned: FinetunedModel, scores: str) -> None:
    """Write ``README.md`` into the export."""
    rows = [
        ("merged weights against adapter and base apart, float32", result.merge),
        ("the files, loaded by a fresh process, against the same weights before they were written", result.files),
        ("this export against the model as it was tuned", result.tuned),
    ]
    is_adapter = result.is_adapter
    code = (
        "is in the folder" if list(folder.glob("*.py")) else "must be beside it (it is in the original model's folder)"
    )
    load = ADAPTER_LOAD if is_adapter else MODEL_LOAD
    elsewhere = ADAPTER_ELSEWHERE if is_adapter else MODEL_ELSEWHERE
    text = CARD.format(
        title=result.folder.name,
        what="A LoRA adapter in PEFT's layout." if is_adapter else f"A model in the official layout, {result.dtype}.",
        version=__version__,
        method=result.method,
        origin=f"`{tuned.origin}`" if tuned.origin else "a model of unknown origin",
        scores=scores,
        count=result.files.num_texts,
        probes=result.probes,
        rows="\n".join(
            f"| {what} | {found.worst:.1e} | {found.largest:.1f} | {found.equal_texts} of {found.num_texts} |"
            for what, found in rows
            if found is not None
        ),
        explanation=_explanation(result, tuned),
        load=load.format(folder=result.folder, base=tuned.base),
        elsewhere=elsewhere.format(folder=result.folder, code=code),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


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


def score_table(tuned: FinetunedModel) -> str:
    """The run's score, where it has one.

    Raises:
        UserError: the file that holds it is damaged.
    """
    if tuned.run_folder is None:
        return ""
    lines = []
    for when in ("before", "after"):
        path = tuned.run_folder / f"eval_{when}.json"
        if path.is_file():
            found = read_json(path)
            with content_of(path):
                score = found["scores"][found["metric"]]
                lines.append(
                    f"| {when} training | {found['metric']} | {100 * score['value']:.2f} % "
                    f"| {100 * score['low']:.2f} – {100 * score['high']:.2f} % | {found['num_questions']} |"
                )
    if not lines:
        return ""
    head = "\n| | metric | score | 95 % interval | questions |\n|---|---|---|---|---|\n"
    return head + "\n".join(lines) + "\n"
