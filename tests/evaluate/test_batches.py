"""Which questions are answered together, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3v.data.collate import QuestionDataset
from phi3v.data.table import open_table
from phi3v.evaluate.batches import (
    PreparedQuestions,
    Prompt,
    PromptBatches,
    cut_batches,
    list_prompts,
    prompts_of_ranks,
)
from phi3v.processing.processor import Phi3VProcessor


def prompts(*pages: int, prefix: int = 100) -> list[Prompt]:
    """As many prompts on each page."""
    made: list[Prompt] = []
    for page, count in enumerate(pages):
        made += [Prompt(len(made) + k, page, prefix + page, prefix + page + 5 + k) for k in range(count)]
    return made


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("pages", [(7,), (1, 1, 1), (4, 9, 2, 1), (1,)])
def test_every_prompt_goes_to_exactly_one_rank(ranks: int, pages: tuple[int, ...]) -> None:
    asked = prompts(*pages)
    shares = prompts_of_ranks(asked, ranks, 4)
    assert len(shares) == ranks
    assert sorted(p.index for share in shares for p in share) == [p.index for p in asked]
    assert sum(1 for share in shares if share) == min(ranks, len(asked)) or len(asked) > ranks
    batches = [cut_batches(share, 3, 10**6) for share in shares]
    assert sorted(p.index for share in batches for batch in share for p in batch) == [p.index for p in asked]


def test_ranks_get_about_as_much_to_do() -> None:
    shares = prompts_of_ranks(prompts(*[4] * 50), 4, 8)
    loads = [sum(p.length for p in share) for share in shares]
    assert max(loads) < 1.1 * min(loads)


def test_pages_stay_together_and_similar_lengths_too() -> None:
    mixed = prompts(3, 3) + [Prompt(6 + k, 10 + k, 0, length) for k, length in enumerate((500, 20, 480, 30))]
    batches = cut_batches(prompts_of_ranks(mixed, 1, 3)[0], 3, 10**6)
    assert [[p.length for p in batch] for batch in batches] == [
        [500, 480, 108],
        [107, 106, 107],
        [106, 105, 30],
        [20],
    ]


def test_the_token_budget_counts_padding() -> None:
    one, two = Prompt(0, 0, 90, 100), Prompt(1, 1, 50, 80)  # padded to 90 + 30 each
    assert len(cut_batches([one, two], 8, 240)) == 1
    assert len(cut_batches([one, two], 8, 239)) == 2
    assert cut_batches([one], 8, 10) == [[one]]  # a prompt that is longer than the budget goes alone


@pytest.fixture
def questions(easy_vqa: Path, tiny_model_dir: Path) -> QuestionDataset:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (easy_vqa / "test.jsonl").read_text().splitlines()[:6]]
    lines[4]["conversations"][0].pop("images")
    lines[5]["conversations"].insert(0, {"user": "hello", "assistant": "there"})
    file = easy_vqa / "some.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return QuestionDataset(open_table(file), Phi3VProcessor.from_pretrained(tiny_model_dir))


def test_lengths_are_known_without_decoding(questions: QuestionDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [questions[index].input_ids for index in range(len(questions))]
    monkeypatch.setattr("phi3v.data.table.load_image", lambda *args, **kwargs: pytest.fail("decoded"))
    measured = list_prompts(questions, 4096)
    assert [p.length for p in measured] == [len(row) for row in ids]
    # Four questions about one image share it; text only and a turn before the image do not.
    pages = [p.page for p in measured]
    assert len({*pages[:4]}) == 1
    assert len({*pages}) == 4
    assert measured[0].prefix == ids[0].index(-1) + ids[0].count(-1)
    assert measured[4].prefix == 0


def test_a_prefix_is_not_shared_across_the_rotary_switch(questions: QuestionDataset) -> None:
    first = list_prompts(questions, 4096)[0]
    short, long = first.prefix, first.length
    for start, shared in ((short - 1, True), (short, False), (long - 1, False), (long, True)):
        again = list_prompts(questions, start)[0]
        assert (again.prefix > 0) == shared, start


def test_a_shared_batch_decodes_each_image_once(questions: QuestionDataset) -> None:
    batches = cut_batches(list_prompts(questions, 4096)[:4], 8, 10**6)
    batch = PromptBatches(questions, batches)[0]
    assert len(batch.prefixes) == len(batch.images["image_sizes"]) == 1
    for row, index in enumerate(batch.indices):
        assert batch.prefixes[batch.page_of_row[row]] + batch.suffixes[row] == questions[index].input_ids
    assert batch.lengths() == [len(questions[index].input_ids) for index in batch.indices]


@pytest.mark.parametrize("start", [4096, 200])
def test_prompts_that_come_made_share_what_those_of_a_file_share(questions: QuestionDataset, start: int) -> None:
    prepared = PreparedQuestions([questions[index] for index in range(len(questions))])
    ours, theirs = list_prompts(questions, start), list_prompts(prepared, start)
    assert [(p.index, p.length) for p in theirs] == [(p.index, p.length) for p in ours]
    # Before an image that stands in a later turn, both have the turn before it.
    assert [p.prefix for p in theirs] == [p.prefix for p in ours]
    numbers = dict(zip([p.page for p in theirs], [p.page for p in ours], strict=True))
    assert [numbers[p.page] for p in theirs] == [p.page for p in ours]
    prepared[0].input_ids = []
    assert len(prepared[0].input_ids) == theirs[0].length
