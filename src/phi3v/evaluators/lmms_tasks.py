"""Tasks of lmms-eval on our data files, with our metrics.

A task file names this class, a data file and metrics; the files in ``tasks/`` are those of the recipes' benchmarks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from phi3v.data.collate import Question, question_of, upto_question
from phi3v.data.schema import Turn
from phi3v.data.table import RecordTable, open_table
from phi3v.errors import UserError
from phi3v.evaluate.metrics import METRICS, Answers, score_answers
from phi3v.evaluators.messages import read_answer

try:
    from lmms_eval.api.task import ConfigurableMessagesTask
except ImportError:  # the file can be looked at without it
    ConfigurableMessagesTask = object

DATA = "PHI3V_DATA"  # the environment variable with the folder of the data
SPLIT = "test"


class RecordsTask(ConfigurableMessagesTask):
    """The questions of a data file.

    Its configuration has, beside what every task has, ``dataset_path``, the data file, relative to ``$PHI3V_DATA``
    (default ``data``); ``metric_list``, each with one of our metrics' names; and where one of them needs it
    ``generation_kwargs.answer_words``.

    Raises:
        UserError: the file is missing or faulty, or a metric is not known.
    """

    table: RecordTable

    def __init__(self, config: Mapping[str, Any], **kwargs: Any) -> None:
        names = [entry["metric"] for entry in config["metric_list"]]
        if unknown := [name for name in names if name not in METRICS]:
            hint = f"choose from {', '.join(METRICS)}"
            raise UserError(f"{unknown[0]} is not known", where=f"{config.get('task')}: metric_list", hint=hint)
        metrics = [
            {"metric": name, "aggregation": partial(aggregate, name), "higher_is_better": True} for name in names
        ]
        config = {
            "output_type": "generate_until",
            "test_split": SPLIT,
            "doc_to_text": "question",
            "doc_to_target": "references",
            "num_fewshot": 0,
            "process_results": partial(process_results, names),
            **{key: value for key, value in config.items() if key != "class"},
            "metric_list": metrics,
        }
        super().__init__(config=config, **kwargs)

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Read the data file; nothing is downloaded."""
        path = Path(os.environ.get(DATA, "data")) / self.config.dataset_path
        if not path.is_file():
            hint = (
                f"make it with `phi3v data convert`, or set {DATA} to the folder that {self.config.dataset_path} is in"
            )
            raise UserError("no such data file", where=str(path), hint=hint)
        self.table = open_table(path, special_text="escape")
        words = list((self.config.generation_kwargs or {}).get("answer_words", ()))
        rows = [
            {"record": index, "turn": turn, "answer_words": words, **_columns(question_of(record, turn))}
            for index, record in enumerate(self.table)
            for turn in range(len(record.turns))
            if record.turns[turn].weight
        ]
        self.dataset = DatasetDict({SPLIT: Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset

    def doc_to_messages(self, doc: dict[str, Any], **rounds: Any) -> list[dict[str, Any]]:
        """The messages up to the question, with the paths of its images: a model knows how it wants to see them."""
        record = upto_question(self.table[doc["record"]], doc["turn"])
        messages = []
        if record.system is not None:
            messages.append({"role": "system", "content": [_text(record.system)]})
        for index, turn in enumerate(record.turns):
            blocks = [{"type": "image", "url": self.table.images.where(name)} for name in turn.images]
            messages.append({"role": "user", "content": _place(turn, blocks)})
            if index < doc["turn"]:
                messages.append({"role": "assistant", "content": [_text(turn.assistant)]})
        return messages


def _columns(question: Question) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.text,
        "references": list(question.references),
        "images": list(question.images),
    }


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _place(turn: Turn, images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks of a question: images first, or where the turn says, and then a text, be it empty, is first."""
    if turn.image_offsets is None:
        return [*images, _text(turn.user)]
    blocks, start = [], 0
    for image, offset in zip(images, turn.image_offsets, strict=True):
        blocks += [_text(turn.user[start:offset]), image]
        start = offset
    return [*blocks, _text(turn.user[start:])]


def process_results(names: Sequence[str], doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each metric's `aggregate` takes of a question; with its own ``score`` where the metric is a mean of them."""
    words = doc["answer_words"]
    prediction, probabilities = read_answer(results[0], words)
    item = {
        "id": doc["id"],
        "question": doc["question"],
        "references": doc["references"],
        "prediction": prediction,
        "words": words,
        "probabilities": probabilities,
    }
    of_mean = METRICS["accuracy"].compute
    return {
        name: item | ({"score": metric.of_answer(prediction, doc["references"])} if metric.compute is of_mean else {})
        for name, metric in ((name, METRICS[name]) for name in names)
    }


def aggregate(name: str, items: Sequence[Mapping[str, Any]]) -> float:
    """The score of the metric called ``name`` on all questions, in 0..1; NaN where they have no such score."""
    words = items[0]["words"]
    answers = Answers(
        [item["question"] for item in items],
        [item["references"] for item in items],
        [item["prediction"] for item in items],
        words,
        np.array([item["probabilities"] for item in items]) if words else None,
    )
    value = score_answers(name, answers).value
    return float("nan") if value is None else value
