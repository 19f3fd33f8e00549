"""The file that a benchmark's official evaluator takes, written from a model's answers.

Which one is said by the records' key ``source``; their ids are the dataset's own, as its converter keeps them. UCF-101
has no evaluator of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phi3v.config import EvaluationConfig
from phi3v.data.collate import Question
from phi3v.data.faults import quote
from phi3v.data.jsonl import replacing
from phi3v.data.table import RecordTable
from phi3v.errors import UserError
from phi3v.evaluate.generate import Generated
from phi3v.evaluate.text_scores import normalize_answer
from phi3v.paths import cannot_write, require_writable


@dataclass(frozen=True)
class Benchmark:
    """What the official evaluator of a benchmark takes.

    Attributes:
        id: pattern of the dataset's own ids.
        id_name: what the dataset calls them.
        text: the file, of the questions and their answers.
        answer_words: the answers whose probabilities it is made of, the positive one first.
    """

    id: str
    id_name: str
    text: Callable[[Sequence[Question], Sequence[Generated]], str]
    answer_words: tuple[str, ...] = ()


_TRUTH = {"true": "True", "false": "False"}


def _docvqa(questions: Sequence[Question], answers: Sequence[Generated]) -> str:
    """A JSON list, as rrc.cvc.uab.es takes it (task 17)."""
    pairs = zip(questions, answers, strict=True)
    return json.dumps([{"questionId": int(question.id), "answer": answer.text} for question, answer in pairs])


def _nlvr2(questions: Sequence[Question], answers: Sequence[Generated]) -> str:
    """``identifier,prediction`` without a header, as the repository's ``metrics.py`` reads it.

    An answer that is neither True nor False becomes the likelier of the two.
    """
    lines = []
    for question, answer in zip(questions, answers, strict=True):
        likelier = str(answer.probabilities[0] >= 0.5)
        lines.append(f"{question.id},{_TRUTH.get(normalize_answer(answer.text), likelier)}\n")
    return "".join(lines)


def _hateful_memes(questions: Sequence[Question], answers: Sequence[Generated]) -> str:
    """``id,proba,label``, as DrivenData takes it: the probability that a meme is hateful, and 1 from a half on."""
    lines = [
        f"{question.id},{answer.probabilities[0]:.6f},{int(answer.probabilities[0] >= 0.5)}\n"
        for question, answer in zip(questions, answers, strict=True)
    ]
    return "id,proba,label\n" + "".join(lines)


BENCHMARKS = {
    "docvqa": Benchmark(r"\d+", "questionId", _docvqa),
    "hateful-memes": Benchmark(r"\d+", "id", _hateful_memes, ("Yes", "No")),
    "nlvr2": Benchmark(r"\w+-\d+-\d+-\d+", "identifier", _nlvr2, ("True", "False")),
}


def find_benchmark(table: RecordTable) -> Benchmark:
    """The benchmark that all records of a data file are of.

    Raises:
        UserError: they are of none or of several, or their ids are not the dataset's own.
    """
    first: str | None = None
    for record in table:
        where = table.where(record)
        first = first or record.source
        if record.source not in BENCHMARKS:
            source = "no source" if record.source is None else f"the source {quote(record.source)}"
            hint = f'the key "source" says it: {", ".join(BENCHMARKS)} have an official evaluator'
            raise UserError(f"the record has {source}, so there is no form for --submission", where=where, hint=hint)
        if record.source != first:
            hint = "evaluate the datasets one by one"
            raise UserError(f"is of {record.source}, the first record of {first}", where=where, hint=hint)
        benchmark = BENCHMARKS[record.source]
        if len(record.turns) > 1:
            hint = f"one question a record, its id the dataset's {benchmark.id_name}"
            raise UserError(f"the record has {len(record.turns)} questions under one id", where=where, hint=hint)
        if not re.fullmatch(benchmark.id, record.id, re.ASCII):
            raise UserError(
                f"the id {quote(record.id)} is no {benchmark.id_name} of {record.source}, which --submission needs",
                where=where,
                hint=f"convert the original distribution with `phi3v data convert {record.source} --source …`; the "
                "hub's the_cauldron lacks the dataset's ids",
            )
    assert first is not None  # a table has a record
    return BENCHMARKS[first]


def submission_config(config: EvaluationConfig, benchmark: Benchmark, *, all_questions: bool) -> EvaluationConfig:
    """The settings of an evaluation that a submission is made of: every question, and the benchmark's answer words.

    Args:
        all_questions: lift a limit that is the run's own; one that was asked for stands against a submission.

    Raises:
        UserError: they are set to something else.
    """
    if config.max_questions is not None and not all_questions:
        hint = "leave it out: the evaluator wants an answer to each"
        raise UserError("a submission is of all questions", where="--max-questions", hint=hint)
    words = list(benchmark.answer_words)
    given = [normalize_answer(word) for word in config.answer_words]
    if words and given and given != [normalize_answer(word) for word in words]:
        hint = f"leave --answer-words out, or give {' '.join(words)}"
        raise UserError(
            f"the submission is made of the probabilities of {' and '.join(words)}, not of "
            f"{' and '.join(config.answer_words)}",
            where="evaluation.answer_words",
            hint=hint,
        )
    return replace(config, max_questions=None, answer_words=config.answer_words or words)


def require_new_file(path: Path, option: str) -> None:
    """Look whether a file may and can be written.

    Args:
        option: what names it on the command line.

    Raises:
        UserError: it is there already, or could not be written.
    """
    if path.exists():
        raise UserError("is there already", where=str(path), hint=f"remove it, or choose another {option}")
    require_writable(path.parent, str(path), f"choose another {option}")


def write_submission(
    path: Path, benchmark: Benchmark, questions: Sequence[Question], answers: Sequence[Generated]
) -> str:
    """Write the file, complete or not at all.

    Returns:
        What to say about it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(benchmark.text(questions, answers), encoding="utf-8", newline="\n")
    except OSError as error:
        raise cannot_write(error, str(path), "choose another --submission") from None
    words = {normalize_answer(word) for word in benchmark.answer_words}
    other = sum(normalize_answer(answer.text) not in words for answer in answers) if words else 0
    note = (
        f" ({other:,} answers are neither {' nor '.join(benchmark.answer_words)}: the likelier counts)" if other else ""
    )
    return f"submission: {path}{note}"
