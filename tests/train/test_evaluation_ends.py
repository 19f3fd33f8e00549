"""An evaluation with reading processes: a signal to the whole job, and an output that cannot be written."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_helpers import Train, read_metrics

from phi3v.cli import main
from phi3v.data import jsonl
from phi3v.evaluate import evaluation
from phi3v.evaluate.generate import TorchAnswerer


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture
def stop_while_answering(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """SIGTERM to this process and its readers, as a job's end sends it, when answering begins; gives the readers."""
    readers: list[int] = []
    before = children()  # the server that other tests fork ranks from
    plain = TorchAnswerer.answer

    def answer(self: TorchAnswerer, *args: Any) -> Any:
        if not readers:
            readers.extend(children() - before)
            for pid in (*readers, os.getpid()):
                os.kill(pid, signal.SIGTERM)
        return plain(self, *args)

    monkeypatch.setattr(TorchAnswerer, "answer", answer)
    return readers


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_measurement_while_training_is_finished_first(train: Train, stop_while_answering: list[int]) -> None:
    code, folder = train(
        *("evaluation.before", "false", "evaluation.eval_steps", 2, "evaluation.batch_size", 1),
        *("data.num_workers", 2, "method.name", "lora", "method.lora.rank", 4),
    )
    assert code == 3
    assert [line["step"] for line in read_metrics(folder) if "eval" in line] == [2]
    assert (folder / "checkpoint-2").is_dir()
    assert len(stop_while_answering) >= 2
    assert all(map(is_gone, stop_while_answering))


def test_eval_ends_with_its_readers(
    train: Train, easy_vqa: Path, stop_while_answering: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = children()
    code, folder = train("data.num_workers", 2, "evaluation.before", "false", "evaluation.after", "false")
    assert code == 0
    assert children() <= before
    capsys.readouterr()
    assert main(["eval", str(folder), "--data", str(easy_vqa / "test.jsonl"), "--batch-size", "1"]) == 3
    assert "stopped by SIGTERM while evaluating" in capsys.readouterr().err
    assert len(stop_while_answering) >= 2
    assert all(map(is_gone, stop_while_answering))


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Nothing can be written to files of this name any more."""
    plain: Callable[[Path], Any] = jsonl.replacing

    def replacing(path: Path) -> Any:
        if path.name.startswith(name):
            raise OSError(28, "No space left on device", str(path))
        return plain(path)

    for module in (jsonl, evaluation):
        monkeypatch.setattr(module, "replacing", replacing)


@pytest.mark.parametrize("name", ["eval", "predictions"])
def test_a_score_is_shown_though_it_cannot_be_written(
    name: str,
    small_model_dir: Path,
    easy_vqa: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full_disk(monkeypatch, name)
    ask = ["eval", str(small_model_dir), "--data", str(easy_vqa / "test.jsonl"), "--max-questions", "2"]
    assert main([*ask, "--max-new-tokens", "2", "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "accuracy: 0.00 %" in captured.out
    assert "the evaluation cannot be written: No space left on device" in captured.err


def test_an_output_that_cannot_be_written_is_found_first(
    small_model_dir: Path,
    easy_vqa: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("phi3v.train.finetuned.load_weights", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        ask = ["eval", str(small_model_dir), "--data", str(easy_vqa / "test.jsonl"), "--out", str(out)]
        assert main(ask) == 2
        assert "cannot be written" in capsys.readouterr().err


def test_a_measured_step_is_shown_on_a_full_disk(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, "eval_after")
    code, folder = train("training.max_steps", 1, "evaluation.before", "false")
    assert code == 2
    captured = capsys.readouterr()
    assert "accuracy after: " in captured.out
    assert "its scores are printed above" in captured.err
    assert json.loads((folder / "final" / "manifest.json").read_text())
