"""The model card of a fine-tuned model: ``README.md`` in its folder, by the hub's conventions.

A card names no local path: neither the base model, nor the data, nor the folder itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from phi3v import __version__
from phi3v.config import DataSource
from phi3v.data.shards.index import is_shards
from phi3v.data.sources import OWN_DATA, SOURCES
from phi3v.data.table import open_table
from phi3v.errors import UserError
from phi3v.json_files import content_of, read_json
from phi3v.paths import is_hub_id
from phi3v.train.finetuned import FinetunedModel
from phi3v.train.methods.weights import CARD_FILE

TASK = "image-text-to-text"
# Their cards are not among the files that loading a model downloads.
OFFICIAL = ("microsoft/Phi-3.5-vision-instruct", "microsoft/Phi-3-vision-128k-instruct")
PUBLIC = tuple(name for name in SOURCES if name not in OWN_DATA)  # all of them in English

CARD = """
# {title}

{what}{origin}. Made with phi3v {version}.
{scores}{more}
## Use

```python
{snippet}
```
"""
SNIPPET = """import phi3v  # so that transformers knows this architecture
{imports}

name = "{name}"  # this folder, or its name on the hub
model = {model}.from_pretrained(name, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(name)
content = [{{"type": "image", "path": "image.png"}}, {{"type": "text", "text": "What is shown?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
LIBRARIES = {  # what loads it, and where that is from
    "transformers": (
        "AutoModelForImageTextToText",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
    ),
    "peft": (
        "AutoPeftModelForCausalLM",
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoProcessor",
    ),
}


def write_card(
    folder: Path,
    tuned: FinetunedModel,
    *,
    name: str,
    what: str | None = None,
    is_adapter: bool | None = None,
    base_id: str | None = None,
    library: str | None = None,
    snippet: str | None = None,
    is_rounded: bool = False,
    more: str = "",
    end: str = "",
) -> None:
    """Write the card of ``tuned``, or of what was made of it, into ``folder``.

    Args:
        name: what the snippet loads; its title too.
        what: what is in the folder.
        is_adapter: whether that is an adapter; default: as ``tuned``.
        base_id: what the base model is called on the hub; default: as ``tuned`` names it, if that is no path.
        library, snippet: what loads it and how; default: transformers, or PEFT.
        is_rounded: its weights are not the run's, whose scores it does not claim.
        more, end: text before and after the snippet.

    Raises:
        UserError: it cannot be written, or the run's scores are damaged.
    """
    is_adapter = tuned.adapter is not None if is_adapter is None else is_adapter
    base = base_id or (tuned.origin if tuned.origin is not None and is_hub_id(tuned.origin) else None)
    loader, imports = LIBRARIES["peft" if is_adapter else "transformers"]
    # What is rounded is another model than the base, unless nothing is known to have been tuned.
    is_base = is_rounded and tuned.origin is None
    relation = "quantized" if is_base else "adapter" if is_adapter else "finetune"
    if is_base and base is None and is_hub_id(tuned.base):
        base = tuned.base
    method = tuned.run.method.name if tuned.run_folder is not None else None
    data = ModelCardData(
        library_name=library or ("peft" if is_adapter else "transformers"),
        pipeline_tag=TASK,
        base_model=base,
        base_model_relation=relation if base is not None else None,
        tags=["phi3_v", "phi3v", *([method] if method is not None else [])],
        **_of_the_base(base, tuned.origin),
    )
    trained_on = _datasets(tuned.run.data.train_sources)
    if trained_on:
        data.datasets, data.language = trained_on, "en"
    # Merged into weights that are not in 4 bits, it is another model.
    if not is_rounded and (is_adapter or not tuned.is_quantised):
        data.eval_results = _model_index(tuned) or None
    if data.eval_results:
        data.model_name = name
        data.metrics = list(dict.fromkeys(result.metric_type for result in data.eval_results))
    text = CARD.format(
        title=name,
        what=what or ("A LoRA adapter in PEFT's layout" if is_adapter else "A model in the official layout"),
        origin=_origin(base, method) if tuned.origin is not None else "",
        version=__version__,
        scores="" if is_rounded else score_table(tuned),
        more=more,
        snippet=(snippet or SNIPPET).format(name=name, model=loader, imports=imports),
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{text}{end}")
    try:
        card.save(folder / CARD_FILE)
    except OSError as error:
        raise UserError(f"the card cannot be written: {error.strerror or error}", where=str(folder)) from None


def _origin(base: str | None, method: str | None) -> str:
    model = f"[{base}](https://huggingface.co/{base})" if base is not None else "a local model"
    return f", fine-tuned from {model}" + (f" with the method `{method}`" if method is not None else "")


def _of_the_base(base: str | None, origin: str | None) -> dict[str, Any]:
    """Licence and language, as the base model's own card has them, if that is at hand."""
    if base in OFFICIAL:
        return {"license": "mit", "language": "multilingual"}
    file = Path(origin, CARD_FILE) if origin is not None and Path(origin).is_dir() else None
    if file is None and base is not None:
        cached = try_to_load_from_cache(base, CARD_FILE)
        file = Path(cached) if isinstance(cached, str) else None
    if file is None:
        return {}
    try:
        found = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
    return {key: found[key] for key in ("license", "license_name", "license_link", "language") if key in found}


def _datasets(files: Sequence[DataSource]) -> list[str]:
    """The public datasets whose records data files hold, where these are still there."""
    sources = set()
    for file in files:
        try:
            if is_shards(file.path):
                sources |= set(open_table(Path(file.path)).dataset.data.column("source").unique().to_pylist())
                continue
            with open(file.path, encoding="utf-8") as lines:
                for line in lines:
                    sources.add(json.loads(line).get("source") if line.strip() else None)
        except (OSError, ValueError, AttributeError, UserError):
            continue
    return [name for name in PUBLIC if name in sources]


@dataclass(frozen=True)
class _Score:
    when: str
    name: str
    value: float
    low: float
    high: float
    questions: int
    source: str | None = None  # None: of all

    @property
    def title(self) -> str:
        return self.name if self.source is None else f"{self.name} on {self.source}"


def _scores(tuned: FinetunedModel) -> list[_Score]:
    """What the run measured before and after training; nothing of weights that it did not measure."""
    scores = []
    if tuned.run_folder is not None and not tuned.is_checkpoint:
        for when in ("before", "after"):
            path = tuned.run_folder / f"eval_{when}.json"
            if not path.is_file():
                continue
            found = read_json(path)
            with content_of(path):
                for source, part in [(None, found), *found.get("sources", {}).items()]:
                    for name, score in part["scores"].items():
                        if score["value"] is not None:  # data may have no such score
                            value, low, high = (float(score[key]) for key in ("value", "low", "high"))
                            scores.append(_Score(when, name, value, low, high, part["num_questions"], source))
    return scores


def score_table(tuned: FinetunedModel) -> str:
    """The run's scores before and after training, where it has them.

    Raises:
        UserError: the file that holds them is damaged.
    """
    lines = [
        f"| {score.when} training | {score.title} | {100 * score.value:.2f} % "
        f"| {100 * score.low:.2f} – {100 * score.high:.2f} % | {score.questions} |\n"
        for score in _scores(tuned)
    ]
    return (
        "".join(["\n| | metric | score | 95 % interval | questions |\n|---|---|---|---|---|\n", *lines])
        if lines
        else ""
    )


def _model_index(tuned: FinetunedModel) -> list[EvalResult]:
    """The scores after training as the hub lists them; their intervals stand in the name and among the arguments."""
    files = {source.name: source for source in tuned.run.data.eval_sources}
    # Of several files the scores of each: all of them together are no dataset that others know.
    only = next(iter(files)) if isinstance(tuned.run.data.eval, str) else None
    results = []
    for score in _scores(tuned):
        file = files.get(only or score.source or "")
        if score.when != "after" or file is None:
            continue
        dataset = next(iter(_datasets([file])), file.name)
        results.append(
            EvalResult(
                task_type=TASK,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=Path(file.path).stem,
                metric_type=score.name,
                metric_name=f"{score.title}, 95 % interval {score.low:.4f} – {score.high:.4f}",
                metric_value=round(score.value, 4),
                metric_args={"interval_95": [round(score.low, 4), round(score.high, 4)], "questions": score.questions},
            )
        )
    return results
