"""How long records are, counted once; and those that are longer than the model reads."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_files import image_bytes

from phi3v.cli import main
from phi3v.data import lengths as lengths_module
from phi3v.data import sizes as sizes_module
from phi3v.data.collate import PageReader, make_sample
from phi3v.data.lengths import Context, TableLengths, measure_table, require_context
from phi3v.data.table import RecordTable, open_table
from phi3v.errors import UserError
from phi3v.processing.processor import Phi3VProcessor


@pytest.fixture
def table(tmp_path: Path) -> RecordTable:
    """Records of many kinds, among short ones."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image_bytes(1))
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
    reader = PageReader(table, processor.image_processor)
    lengths = measure_table(table, processor)
    at = lengths.at(4)
    for index, record in enumerate(table):
        sample = make_sample(reader, record, processor)
        tokens = len(sample.input_ids)
        assert Context(1, processor).count(record, table.image_sizes(record)) == at.tokens[index] == tokens
        assert at.targets[index] == sum(label != -100 for label in sample.labels)
        # What is not counted is never too long.
        assert Context(tokens - 1, processor).may_exceed(record)
        questions = np.array([[index, turn] for turn in range(len(record.turns))])
        prompts, prefixes, _ = lengths.prompts_at(questions, 4, 4096)
        for turn, prompt, prefix in zip(questions[:, 1].tolist(), prompts, prefixes, strict=True):
            ids = make_sample(reader, record, processor, question=turn).input_ids
            assert prompt == len(ids)
            assert prefix == max((place + 1 for place, token in enumerate(ids) if token < 0), default=0)


def forbid_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((lengths_module, "count_record"), (sizes_module, "image_size")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("counted again"))


def assert_equal(one: TableLengths, other: TableLengths) -> None:
    for field in fields(TableLengths):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_counted_once(table: RecordTable, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    first = measure_table(table, processor)
    estimated = measure_table(table, None)
    assert not np.array_equal(first.text, estimated.text)
    forbid_counting(monkeypatch)
    assert_equal(measure_table(open_table(table.path), processor), first)
    assert_equal(measure_table(open_table(table.path), None), estimated)
    # Not by what does not change them.
    assert_equal(measure_table(table, Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=1)), first)


@pytest.mark.parametrize("kind", ["tokens", "sizes"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "another's", "gone"])
def test_damaged_lengths_are_counted_again(table: RecordTable, kind: str, damage: str) -> None:
    first = measure_table(table, None)
    (kept,) = table.folder.glob(f"{kind}-*.npz")
    whole = kept.read_bytes()
    if damage == "truncated":
        kept.write_bytes(whole[: len(whole) // 2])
    elif damage == "garbage":
        kept.write_bytes(whole[:100] + bytes(len(whole) - 100))
    elif damage == "another's":
        np.savez(kept, text=np.zeros(1), targets=np.zeros(1), sizes=np.zeros(1), stamps=np.zeros(1))
    else:
        kept.unlink()
    assert_equal(measure_table(table, None), first)
    assert kept.read_bytes() == whole


def test_a_replaced_image_is_measured_again(table: RecordTable, tmp_path: Path) -> None:
    measure_table(table, None)
    Image.new("RGB", (700, 100)).save(tmp_path / "images" / "a.png")
    assert measure_table(table, None).sizes.tolist() == [[700, 100]] * 3
    with pytest.raises(UserError, match="above the limit of 100"):
        measure_table(open_table(table.path, max_pixels=100), None)


def test_lengths_that_cannot_be_kept(table: RecordTable, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert_equal(measure_table(table, None), measure_table(table, None))
    assert [file.name for file in table.folder.iterdir() if file.suffix == ".npz"] == []


def test_counted_in_parallel_as_in_one_process(
    table: RecordTable, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir)
    alone = measure_table(table, processor)
    (kept,) = table.folder.glob("tokens-*.npz")
    kept.unlink()
    counted = lengths_module.count_record
    parent = os.getpid()

    def elsewhere(*args: Any) -> Any:
        assert os.getpid() != parent
        return counted(*args)

    monkeypatch.setattr(lengths_module, "count_record", elsewhere)
    monkeypatch.setattr(lengths_module, "PARALLEL", 1)
    monkeypatch.setattr(lengths_module, "CHUNK", 2)
    assert_equal(measure_table(table, processor), alone)


def test_images_that_cannot_be_read(table: RecordTable, tmp_path: Path) -> None:
    image = tmp_path / "images" / "a.png"
    whole = image.read_bytes()
    image.write_bytes(b"no image")
    with pytest.raises(UserError, match="not an image that can be read") as caught:
        measure_table(table, None)
    assert f"{table.path}:5: conversations[0].images[0]" in str(caught.value)
    lengths = measure_table(table, None, skip_unreadable=True).at(16)
    assert lengths.crops.tolist() == lengths.image_tokens.tolist() == [0] * 5
    image.write_bytes(whole)
    assert measure_table(table, None).at(16).crops[2] > 0


def test_the_lines_that_are_too_long_are_named(table: RecordTable, tiny_model_dir: Path) -> None:
    processor = Phi3VProcessor.from_pretrained(tiny_model_dir, num_crops=1)
    counts = [Context(1, processor).count(record, table.image_sizes(record)) for record in table]
    lengths = measure_table(table, processor).at(1)
    require_context(table, Context(max(counts), processor), lengths)
    with pytest.raises(UserError) as error:
        require_context(table, Context(300, processor), lengths)
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
