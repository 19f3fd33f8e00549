"""How long an answer may become, by the reference answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3v.data.collate import QuestionDataset
from phi3v.data.table import open_table
from phi3v.evaluate.answer_limit import LONGEST, MARGIN, SHORTEST, answer_limit
from phi3v.processing.conversation import END
from phi3v.processing.processor import Phi3VProcessor

LONG = json.dumps([{"n": n, "name": "red"} for n in range(12)])


def asked(folder: Path, model: Path, *answers: list[str]) -> QuestionDataset:
    """Questions about no image with these references."""
    file = folder / "eval.jsonl"
    lines = [
        {"id": f"q{k}", "conversations": [{"user": "what?", "assistant": texts[0], "answers": texts}]}
        for k, texts in enumerate(answers)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return QuestionDataset(open_table(file), Phi3VProcessor.from_pretrained(model))


def test_the_longest_reference_fits_with_a_margin(tmp_path: Path, tiny_model_dir: Path) -> None:
    questions = asked(tmp_path, tiny_model_dir, ["red"], ["blue", LONG], ["green"])
    tokens = len(questions.processor.tokenize_text(LONG + END))
    assert tokens > SHORTEST
    limit = answer_limit(questions, None)
    assert limit.longest == tokens
    assert MARGIN * tokens <= limit.tokens < MARGIN * tokens + 1
    assert limit.finding is None
    assert str(tokens) in str(limit)


def test_short_references_leave_the_least_limit(tmp_path: Path, tiny_model_dir: Path) -> None:
    limit = answer_limit(asked(tmp_path, tiny_model_dir, ["red"], ["blue"]), None)
    assert (limit.tokens, limit.finding) == (SHORTEST, None)


@pytest.mark.parametrize("wanted", [8, None])
def test_what_no_answer_can_reach_is_counted(tmp_path: Path, tiny_model_dir: Path, wanted: int | None) -> None:
    long = LONG * 20
    questions = asked(tmp_path, tiny_model_dir, ["red"], ["blue", long], [long], [long, long + "!"])
    limit = answer_limit(questions, wanted)
    assert limit.tokens == (wanted or LONGEST)
    assert limit.too_long == 2
    assert limit.finding is not None
    assert "2 of 4 questions" in limit.finding.what
    assert "'q2'" in limit.finding.what
    hint = limit.finding.hint or ""
    raised = answer_limit(questions, int(hint.split("max_new_tokens to ")[1].split(",")[0]))
    assert raised.finding is None
