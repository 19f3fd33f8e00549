"""What checks ask of the data of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi3v.config import EvaluationConfig, ObjectiveConfig
from phi3v.data.collate import QuestionDataset
from phi3v.data.table import RecordTable
from phi3v.errors import UserError
from phi3v.evaluate.evaluation import check_references
from phi3v.findings import Finding


@dataclass(frozen=True)
class DataFacts:
    """What checks ask of the data.

    Attributes:
        where: the file to learn from.
        records: in it.
        pairs: records with a rejected answer.
        labels, bad: records whose answer is labelled good or bad, and bad.
        no_pair: file and line of the first record without a rejected answer.
        no_judgement: of the first record without a rejected answer and without a label.
        bad_answer: of the first record whose answer is labelled bad.
        unusable: why the metrics cannot be computed on the evaluation data.
    """

    where: str
    has_images: bool
    unusable: UserError | None = None
    records: int = 0
    pairs: int = 0
    labels: int = 0
    bad: int = 0
    no_pair: str | None = None
    no_judgement: str | None = None
    bad_answer: str | None = None

    @classmethod
    def of(cls, table: RecordTable, questions: QuestionDataset | None, evaluation: EvaluationConfig) -> DataFacts:
        """Those of open files."""

        def first(wrong: npt.NDArray[np.bool_]) -> str | None:
            return table.where(table[int(wrong.argmax())]) if wrong.any() else None

        unusable = None
        try:
            if questions is not None:
                check_references(questions, evaluation)
        except UserError as error:
            unusable = error
        is_pair, is_labelled = table.rejected_counts() > 0, table.labels() >= 0
        return cls(
            table.shown,
            bool(table.image_counts().any()),
            unusable,
            len(table),
            int(is_pair.sum()),
            int(is_labelled.sum()),
            int((table.labels() == 0).sum()),
            first(~is_pair),
            first(~is_pair & ~is_labelled),
            first(table.labels() == 0),
        )


def doubtful_answers(objective: ObjectiveConfig, data: DataFacts) -> Finding | None:
    """What is said where the objective does not look at preferences of the data, or they are all of one kind."""
    if objective.name == "kto" and data.labels and not data.pairs and data.bad in (0, data.labels):
        what = f"kto learns good from bad, and all {data.labels:,} answers are labelled {'bad' if data.bad else 'good'}"
        return Finding("objective", "warn", what, "add records whose answers are labelled the other way")
    if objective.is_preference or not data.pairs + data.labels:
        return None
    what = f"sft learns every record's answer as it is: {data.pairs:,} records have rejected answers that it ignores"
    if data.labels:
        what += f", {data.labels:,} have a label good or bad that it ignores"
    return Finding("objective", "warn", what, "set objective.name to dpo, or kto for labels, to learn from these")
