"""Records that are longer than the model reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sample_files import picture

from phi3v.cli import main
from phi3v.data.collate import make_sample
from phi3v.data.lengths import Context, require_context
from phi3v.data.pages import PageReader
from phi3v.data.table import RecordTable, open_table
from phi3v.errors import UserError
from phi3v.processing.processor import Phi3VProcessor


@pytest.fixture
def table(tmp_path: Path) -> RecordTable:
    """Records of many kinds, among short ones."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture(1))
    records: list[dict[str, Any]] = [
        {"conversations": [{"user": "short", "assistant": "yes"}]},
        {"conversations": [{"user": "long " * 400, "assistant": "yes"}]},
        {"conversations": [{"images": ["a.png"] * 3, "user": "which?", "assistant": "ünï" * 50}]},
        {"system": "be kind " * 300, "conversations": [{"user": "short", "assistant": "yes"}]},
        {"conversations": [{"user": "again", "assistant": "and again"}] * 60},
    ]
    lines = [json.dumps({"id": str(k)} | record, ensure_ascii=False) + "\n" for k, record in enumerate(records)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")  # with blank lines between
    return open_table(tmp_path / "data.jsonl")


def test_counted_without_images_as_with_them(table: RecordTable, tiny_model_dir: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=4)
    context = Context(1, processor)
    reader = PageReader(table, processor.image_processor)
    for index, (size, turns, images) in enumerate(
        zip(table.text_bytes(), table.turn_counts(), table.image_counts(), strict=True)
    ):
        record = table[index]
        tokens = len(make_sample(reader, record, processor).input_ids)
        assert context.count(record, table.image_sizes(record)) == tokens
        # What is not counted is never too long.
        assert Context(tokens - 1, processor).may_exceed(size, turns, images)


def test_the_lines_that_are_too_long_are_named(table: RecordTable, tiny_model_dir: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=1)
    counts = [Context(1, processor).count(record, table.image_sizes(record)) for record in table]
    require_context(table, Context(max(counts), processor))
    with pytest.raises(UserError) as error:
        require_context(table, Context(300, processor))
    said = str(error.value)
    too_long = [(2 * k + 1, count) for k, count in enumerate(counts) if count > 300]
    assert len(too_long) == 4
    assert f"data.jsonl:{too_long[0][0]}: the record has {too_long[0][1]:,} tokens" in said
    for line, count in too_long[1:]:
        assert f"{line} ({count:,})" in said


def test_the_command_line_tells_by_a_model_and_without(
    table: RecordTable, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(table.path), "--model.path", str(tiny_model_dir)]) == 0
    text = json.dumps({"id": "long", "conversations": [{"user": "word " * 140_000, "assistant": "yes"}]})
    with table.path.open("a") as file:
        file.write(text + "\n")
    for options, words in (
        ([], "about 175,000 tokens, and Phi-3.5-vision reads 131,072"),
        (["--model.path", str(tiny_model_dir)], "tokens, and the model reads 131,072"),
    ):
        capsys.readouterr()
        assert main(["data", "check", str(table.path), *options, "--json"]) == 2
        [fault] = json.loads(capsys.readouterr().out)["faults"]
        assert fault["line"] == 10
        assert words in fault["what"]
