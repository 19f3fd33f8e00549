"""Files for official evaluators, from a dataset's own annotations to what the evaluator reads."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_files import cauldron_row, write_parquet
from sample_files import image_bytes

from phi3v.cli import main
from phi3v.data.collate import Question
from phi3v.evaluate.generate import Generated
from phi3v.evaluate.submission import BENCHMARKS

IDS = {"docvqa": [49153, 24580], "hateful-memes": [8291, 46971], "nlvr2": ["dev-850-0-0", "dev-850-0-1"]}
SPLIT = {"docvqa": "val", "hateful-memes": "dev_seen", "nlvr2": "dev"}


def write_original(benchmark: str, folder: Path) -> Path:
    """Two questions as the dataset's authors distribute them."""
    for name in ("documents/a.png", "img/a.png", "dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_bytes(0))
    ids = IDS[benchmark]
    if benchmark == "docvqa":
        entries = [{"questionId": k, "question": "Who?", "image": "documents/a.png", "answers": ["me"]} for k in ids]
        (folder / "val_v1.0_withQT.json").write_text(json.dumps({"data": entries}))
    elif benchmark == "nlvr2":
        rows = [{"identifier": k, "sentence": f"{k} is red.", "label": "True"} for k in ids]
        (folder / "dev.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        rows = [{"id": k, "img": "img/a.png", "label": 1, "text": "x"} for k in ids]
        (folder / "dev_seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def convert(benchmark: str, source: Path, out: Path) -> Path:
    assert main(["data", "convert", benchmark, "--source", str(source), "--out", str(out)]) == 0
    return out / f"{SPLIT[benchmark]}.jsonl"


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_from_the_original_annotations_to_the_file_of_the_evaluator(
    benchmark: str, small_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = convert(benchmark, write_original(benchmark, tmp_path / "in"), tmp_path / "data")
    capsys.readouterr()
    file = tmp_path / "new" / "result"
    command = ["eval", str(small_model_dir), "--data", str(data), "--submission", str(file), "--num-crops", "1"]
    assert main([*command, "--out", str(tmp_path / "out"), "--max-new-tokens", "3", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["submission"] == str(file)
    assert f"submission: {file}" in shown.err
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    if benchmark == "docvqa":
        assert json.loads(file.read_text()) == [
            {"questionId": own, "answer": line["prediction"]} for own, line in zip(IDS["docvqa"], lines, strict=True)
        ]
    elif benchmark == "nlvr2":  # as its metrics.py reads it
        predictions = dict(line.strip().split(",") for line in file.read_text().splitlines())
        assert list(predictions) == IDS["nlvr2"]
        assert set(predictions.values()) <= {"True", "False"}
        assert "2 answers are neither True nor False: the likelier counts" in shown.err
    else:
        rows = list(csv.DictReader(file.open()))
        assert [int(row["id"]) for row in rows] == IDS["hateful-memes"]
        for row, line in zip(rows, lines, strict=True):
            assert float(row["proba"]) == pytest.approx(line["probabilities"]["Yes"], abs=1e-6)
            assert row["label"] == str(int(line["probabilities"]["Yes"] >= 0.5))


def test_an_answer_that_is_neither_true_nor_false_becomes_the_likelier() -> None:
    answers = [Generated("true.", [0.1, 0.9]), Generated(" False", [0.9, 0.1])]
    answers += [Generated("a dog, \n or two", [0.3, 0.7]), Generated("", [0.8, 0.2])]
    questions = [Question(f"dev-{k}-0-0", "", ("True",), ()) for k in range(4)]
    text = BENCHMARKS["nlvr2"].text(questions, answers)
    assert text == "dev-0-0-0,True\ndev-1-0-0,False\ndev-2-0-0,False\ndev-3-0-0,True\n"


def make_record(name: str, source: str | None, turns: int = 1) -> dict[str, Any]:
    record = {"id": name, "conversations": [{"user": "q", "assistant": "Yes"}] * turns}
    return record if source is None else record | {"source": source}


REFUSED: dict[str, tuple[list[dict[str, Any]], list[str], str]] = {
    "another source": ([make_record("1", "csv")], [], ":1: the record has the source 'csv', so there is no form"),
    "no source": ([make_record("1", None)], [], "the record has no source"),
    "no evaluator": ([make_record("v_Biking_g08_c01", "ucf101")], [], "the source 'ucf101'"),
    "two sources": ([make_record("1", "docvqa"), make_record("2", "hateful-memes")], [], ":2: is of hateful-memes"),
    "turns": ([make_record("1", "docvqa", turns=2)], [], "has 2 questions under one id"),
    "ids of the hub": ([make_record("val-000000-00", "docvqa")], [], "is no questionId of docvqa"),
    "ids of the hub, nlvr2": ([make_record("val-000000-00", "nlvr2")], [], "is no identifier of nlvr2"),
    "not all": ([make_record("1", "docvqa")], ["--max-questions", "1"], "a submission is of all questions"),
    "words": ([make_record("1", "hateful-memes")], ["--answer-words", "No", "Yes"], "not of No and Yes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_evaluator_would_take_is_refused_before_anything_is_loaded(
    case: str,
    tmp_path: Path,
    small_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines, options, what = REFUSED[case]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("phi3v.train.evaluate_finetuned.load_tuned", pytest.fail)
    command = ["eval", str(small_model_dir), "--data", str(data), "--submission", str(tmp_path / "s"), *options]
    assert main(command) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("prepare", "what"),
    [
        (lambda path: path.mkdir(), "is there already"),
        (lambda path: path.write_text("old"), "is there already"),
        (lambda path: path.parent.rmdir() or path.parent.write_text(""), "cannot be written"),
    ],
)
def test_where_it_goes_is_looked_at_first(
    prepare: Callable[[Path], object],
    what: str,
    tmp_path: Path,
    easy_vqa: Path,
    small_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "folder" / "s.json"
    path.parent.mkdir()
    prepare(path)
    command = ["eval", str(small_model_dir), "--data", str(easy_vqa / "test.jsonl"), "--submission", str(path)]
    assert main(command) == 2
    assert f"{path}: {what}" in capsys.readouterr().err


def test_the_collection_of_the_hub_has_no_ids(
    tmp_path: Path, small_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    write_parquet(source / "val-0.parquet", [cauldron_row([image_bytes(0)], [("Who?", "me")])])
    data = convert("docvqa", source, tmp_path / "data")
    command = ["eval", str(small_model_dir), "--data", str(data), "--submission", str(tmp_path / "s.json")]
    assert main(command) == 2
    assert "the hub's the_cauldron lacks the dataset's ids" in capsys.readouterr().err
