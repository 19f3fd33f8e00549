"""``phi3v data pairs``: from a model and questions to a data file of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import command, run_ranks

from phi3v.cli import main
from phi3v.data.check import check_file
from phi3v.data.shards.write import ShardOptions, shard_data
from phi3v.data.table import open_table
from phi3v.model.presets import copy_pretrained
from phi3v.runtime.session import BACKENDS
from phi3v.train import pairs as module


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny model, which answers some questions about shapes rightly."""
    folder = tmp_path_factory.mktemp("base") / "model"
    copy_pretrained("tiny", folder)
    return folder


@pytest.fixture(scope="module")
def data(easy_vqa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of four conversations about shapes."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "images").symlink_to(easy_vqa / "images")
    lines = [json.loads(line) for line in (easy_vqa / "train.jsonl").read_text().splitlines()[:4]]
    for line in lines:
        line["conversations"] = line["conversations"][:3]
    lines[0]["system"] = "Answer in one word."
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def arguments(base: Path, data: Path) -> list[object]:
    return ["data", "pairs", "--model", base, "--data", data, "--samples", 4, "--max-new-tokens", 8]


@pytest.fixture(scope="module")
def whole(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a command that ran in one go."""
    out = tmp_path_factory.mktemp("whole") / "pairs"
    assert command(*arguments, "--out", out) == 0
    return out


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_pairs_are_a_data_file_with_the_questions_as_they_were(whole: Path, data: Path) -> None:
    report = check_file(whole / "pairs.jsonl")
    assert report.ok, report.faults
    answers = {line["id"]: line for line in lines_of(whole / "answers.jsonl")}
    assert len(answers) == 12
    source = {record.id: record for record in open_table(data)}
    made = list(open_table(whole / "pairs.jsonl"))
    assert 0 < len(made) < 12
    assert report.pairs == len(made)
    for record in made:
        name, _, number = record.id.partition("#")
        asked = source[name].turns[int(number) - 1]
        drawn = {answer["text"]: answer["score"] for answer in answers[record.id]["answers"]}
        last = record.turns[-1]
        assert (last.user, last.images, last.answers) == (asked.user, asked.images, (asked.assistant,))
        assert last.scores == (max(drawn.values()), min(drawn.values()))
        assert (drawn[last.assistant], drawn[last.rejected[0]]) == last.scores
        assert [turn.weight for turn in record.turns] == [0] * (int(number) - 1) + [1]
        assert [turn.assistant for turn in record.turns[:-1]] == [
            turn.assistant for turn in source[name].turns[: int(number) - 1]
        ]
        assert record.system == source[name].system


def test_of_shards_the_pairs_have_their_images_beside_them(base: Path, data: Path, tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "pairs"
    shard_data([data], shards, ShardOptions())
    few = ("--chosen", "reference", "--samples", 1, "--max-questions", 4, "--max-new-tokens", 2)
    assert command("data", "pairs", "--model", base, "--data", shards, *few, "--out", out) == 0
    assert check_file(out / "pairs.jsonl").ok
    table, source = open_table(out / "pairs.jsonl"), open_table(shards)
    assert len(table) > 0
    assert table.images.root == out / "images"
    for name in table.distinct_images()[0]:
        assert table.images.sha256(name) == source.images.sha256(name)


def test_an_interrupted_command_goes_on_and_refuses_another_one(
    whole: Path, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "pairs"
    sample = module.sample_answers

    def interrupted(model: Any, processor: Any, questions: Any, wanted: Any, take: Any, **settings: Any) -> None:
        sample(model, processor, questions, wanted[:5], take, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sample_answers", interrupted)
    assert command(*arguments, "--out", out) == 130
    with (out / "answers-rank0.jsonl").open("ab") as file:
        file.write(b'{"id": "train-000003#2", "answ')  # as a killed process leaves it
    asked: list[list[int]] = []

    def counted(model: Any, processor: Any, questions: Any, wanted: Any, take: Any, **settings: Any) -> None:
        asked.append(list(wanted))
        sample(model, processor, questions, wanted, take, **settings)

    monkeypatch.setattr(module, "sample_answers", counted)
    capsys.readouterr()
    assert command(*arguments, "--out", out, "--seed", 1) == 2
    assert "drawn with other settings: seed 0 → 1" in capsys.readouterr().err
    assert command(*arguments, "--out", out, "--batch-size", 16) == 0
    assert [len(wanted) for wanted in asked] == [7]
    for name in ("pairs.jsonl", "answers.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in out.iterdir()} == {"pairs.jsonl", "answers.jsonl", "settings.json", "images"}
    # Other pairs of the same answers: the old file must go first, and nothing is drawn.
    assert command(*arguments, "--out", out, "--chosen", "reference") == 2
    assert "exists already" in capsys.readouterr().err
    (out / "pairs.jsonl").unlink()
    assert command(*arguments, "--out", out, "--chosen", "reference", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pairs"] == len(lines_of(out / "pairs.jsonl")) >= len(lines_of(whole / "pairs.jsonl"))
    assert len(asked) == 1
    references = {line["id"]: line["references"] for line in lines_of(out / "answers.jsonl")}
    for line in lines_of(out / "pairs.jsonl"):
        assert [line["conversations"][-1]["assistant"]] == references[line["id"]]


def test_two_ranks_give_the_same_files(whole: Path, arguments: list[object], tmp_path: Path) -> None:
    run_ranks(2, command, *arguments, "--out", tmp_path / "out", folder=tmp_path / "ranks")
    for name in ("pairs.jsonl", "answers.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_what_cannot_work_is_said_before_the_model_is_loaded(
    arguments: list[object], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(module, "load_tuned", None)
    out = tmp_path / "out"
    bad = data.with_name("bad.jsonl")
    labelled = {"user": "Which?", "assistant": "red", "label": False}
    bad.write_text(json.dumps({"id": "a", "conversations": [labelled]}) + "\n")
    (tmp_path / "taken" / "images").mkdir(parents=True)
    (tmp_path / "held").mkdir()
    with module.FileLock(tmp_path / "held" / ".drawing"):
        for options, what in (
            (["--out", out, "--samples", 1], "all answers to a question would be the same"),
            (["--out", out, "--temperature", 0], "all answers to a question would be the same"),
            (["--out", out, "--temperature", -1], "--temperature: must be in 0 to 100"),
            (["--out", out, "--top-p", 0], "--top-p: must be in 0 to 1"),
            (["--out", out, "--min-margin", "nan"], "--min-margin: must be in 0 to 1"),
            (["--out", out, "--max-questions", 0], "--max-questions: must be at least 1"),
            (["--out", out, "--metric", "auroc"], "auroc"),
            (["--out", tmp_path / "taken"], "is not the folder of the images"),
            (["--out", tmp_path / "held"], "another command is writing into this folder"),
        ):
            given = [*arguments] if "--samples" not in options else arguments[:6] + arguments[8:]
            assert command(*given, *options) == 2, options
            assert what in capsys.readouterr().err
    (graphs := tmp_path / "graphs").mkdir()
    (graphs / next(iter(BACKENDS))).touch()
    assert command("data", "pairs", "--model", graphs, "--data", data, "--out", out) == 2
    assert "is an export as graphs, which draw no answers" in capsys.readouterr().err
    assert main([*map(str, arguments[:4]), "--data", str(bad), "--out", str(out)]) == 2
    assert f"{bad}:1: conversations[0]: is labelled as a bad answer" in capsys.readouterr().err
