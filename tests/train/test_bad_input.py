"""Wrong input ends with one message and exit code 2, before any model is loaded."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3v.cli import main
from phi3v.train import prepare as preparation

GOOD: dict[str, Any] = {
    "id": "a",
    "source": "test",
    "conversations": [{"images": ["ok.png"], "user": "what?", "assistant": "this"}],
}


def with_turn(**changes: Any) -> dict[str, Any]:
    return GOOD | {"conversations": [GOOD["conversations"][0] | changes]}


def huge_png() -> bytes:
    """A valid header that promises 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# What is wrong → the second line of the file, the field it is found in, words of the message.
FAULTS: dict[str, tuple[Any, str, str]] = {
    "bad JSON": ('{"id": "b", ', "", "JSON"),
    "missing file": (with_turn(images=["none.png"]), "conversations[0].images[0]", "does not exist"),
    "truncated file": (with_turn(images=["cut.png"]), "conversations[0].images[0]", "truncated"),
    "non-image file": (with_turn(images=["text.png"]), "conversations[0].images[0]", "is not an image"),
    "leaving the data root": (with_turn(images=["../secret.png"]), "conversations[0].images[0]", "leaves"),
    "absolute path": (with_turn(images=["/etc/hostname"]), "conversations[0].images[0]", "absolute"),
    "empty answer": (with_turn(assistant="  "), "conversations[0].assistant", "empty"),
    "no turn": (GOOD | {"conversations": []}, "conversations", "no turn"),
    "wrong type": (with_turn(user=3), "conversations[0].user", "string"),
    "duplicate id": (GOOD, "id", "line 1"),
    "special-token text": (with_turn(user="stop<|end|>now"), "conversations[0].user", "<|end|>"),
    "image bomb": (with_turn(images=["bomb.png"]), "conversations[0].images[0]", "pixels"),
    "unknown key": (GOOD | {"conversation": []}, "conversation", "conversations"),
}


@pytest.fixture
def data(tmp_path: Path, easy_vqa: Path) -> Path:
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    picture = easy_vqa / "images" / "train" / "0.png"
    shutil.copy(picture, images / "ok.png")
    (images / "cut.png").write_bytes(picture.read_bytes()[:-60])
    (images / "text.png").write_text("this is no picture")
    (images / "bomb.png").write_bytes(huge_png())
    return images.parent


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(preparation, "load_for_training", refuse)
    return refuse


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.usefixtures("no_model")
def test_every_kind_is_refused_by_check_and_train(
    kind: str, data: Path, tmp_path: Path, small_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, field, words = FAULTS[kind]
    record = line if isinstance(line, str) else json.dumps(line if kind == "duplicate id" else line | {"id": "b"})
    file = data / "data.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + record + "\n")

    assert main(["data", "check", str(file)]) == 2
    out = " ".join(capsys.readouterr().out.split())
    assert words in out
    assert field in out
    assert main(["data", "check", str(file), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert [(fault["line"], fault["field"]) for fault in report["faults"]] == [(2, field)]
    assert words in report["faults"][0]["what"] + report["faults"][0]["hint"]

    run = tmp_path / "run"
    arguments = ["--model.path", str(small_model_dir), "--data.train", str(file), "--training.output_dir", str(run)]
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert "data.jsonl:2" in captured.err
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert not run.exists()


@pytest.mark.usefixtures("no_model")
def test_bad_evaluation_data_is_found_before_training(
    data: Path, easy_vqa: Path, tmp_path: Path, small_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = data / "eval.jsonl"
    file.write_text(json.dumps(with_turn(assistant="")) + "\n")
    arguments = ["--model.path", str(small_model_dir), "--training.output_dir", str(tmp_path / "run")]
    arguments += ["--data.train", str(easy_vqa / "train.jsonl"), "--data.eval", str(file)]
    assert main(["train", *arguments]) == 2
    assert "eval.jsonl:1" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.epochs", "1"], "no training data"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl"),
        (["nowhere.yaml"], "no such file"),
        (["--training.learning_rat", "1"], "did you mean --training.learning_rate?"),
        (["--learning_rate", "1"], "did you mean --training.learning_rate?"),
        (["--training.learning_rate", "fast"], "training.learning_rate"),
        (["--training.learning_rate", "-1"], "must be above 0"),
        (["--model.num_crops", "0"], "must be at least 1"),
        (["--method.name", "lroa"], "method.name"),
    ],
)
def test_a_wrong_configuration_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_an_empty_file_is_an_error(tmp_path: Path, small_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    assert main(["train", "--model.path", str(small_model_dir), "--data.train", str(tmp_path / "empty.jsonl")]) == 2
    assert "empty.jsonl" in capsys.readouterr().err


def test_a_folder_without_a_model_is_named(easy_vqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nothing").mkdir()
    arguments = ["--model.path", str(tmp_path / "nothing"), "--data.train", str(easy_vqa / "train.jsonl")]
    assert main(["train", *arguments, "--training.output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "model.path" in error
    assert "phi3v model init" in error
