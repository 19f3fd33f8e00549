"""Questions to start from: some that a run was evaluated on."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from phi3v.train.finetuned import FinetunedModel

LINES_READ = 2000
MOST = 3


@dataclass(frozen=True)
class Example:
    """A question of the evaluation data, its images' paths below ``root``, and the reference answer."""

    prompt: str
    images: tuple[str, ...]
    root: Path
    reference: str


def find_examples(tuned: FinetunedModel, most: int = MOST) -> list[Example]:
    """First questions about different images among the run's predictions; none where run or data are missing."""
    roots = {source.name: Path(source.path).parent / "images" for source in tuned.run.data.eval_sources}
    if tuned.run_folder is None or not roots:
        return []
    found: dict[tuple[str, ...], Example] = {}
    prompts: set[str] = set()
    try:
        with (tuned.run_folder / "predictions_after.jsonl").open(encoding="utf-8") as lines:
            for text in itertools.islice(lines, LINES_READ):
                line = json.loads(text)
                root = roots[line.get("source", next(iter(roots)))]
                images = tuple(line["images"])
                is_new = images not in found and line["prompt"] not in prompts
                # A later turn of a conversation makes no sense alone.
                if images and is_new and "#" not in line["id"] and all((root / image).is_file() for image in images):
                    found[images] = Example(line["prompt"], images, root, (line["references"] or [""])[0])
                    prompts.add(line["prompt"])
                if len(found) == most:
                    break
    except (OSError, ValueError, KeyError):
        return []
    return list(found.values())
